"""What Triton's interpreter does otherwise than a GPU, put right for the tests.

The interpreter computes on NumPy arrays and keeps bfloat16 as bare bits, so that arithmetic on it
is garbage, and it multiplies float32 tiles exactly where a GPU would round them to tf32. With
:func:`round_products` ``tl.dot`` rounds as tensor cores do, and float32 rounds to the nearest
bfloat16. :func:`patch_once` spares a third of the interpreter's time. Both reach into Triton's
private classes: for tests alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def patch_once() -> None:
    """Have a module's functions redirect Triton's language once, not at every call."""
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _round_to(values: np.ndarray, dropped_bits: int) -> np.ndarray:
    """Round float32 to the nearest number, ties to even, with fewer bits of mantissa."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    half = np.uint64((1 << (dropped_bits - 1)) - 1)
    odd = (bits >> np.uint64(dropped_bits)) & np.uint64(1)
    kept = np.uint64(0xFFFFFFFF ^ ((1 << dropped_bits) - 1))
    rounded = ((bits + half + odd) & kept).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    return _round_to(values, 16)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    return _round_to(values, 13)


def round_products(monkeypatch: Any) -> None:
    """Make the interpreter's products those of tensor cores, for one test."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def is_bf16(tensor: Any) -> bool:
        return tensor.dtype.scalar == tl.bfloat16

    def widened(tensor: Any) -> np.ndarray:
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, *rest: Any) -> Any:
        if is_bf16(a):
            product = widened(a).astype(np.float64) @ widened(b).astype(np.float64)
            return handle((product + c.data).astype(np.float32), c.dtype.scalar)
        if str(precision).endswith("TF32"):
            a, b = (handle(round_to_tf32(t.data), t.dtype.scalar) for t in (a, b))
        return plain_dot(self, a, b, c, precision, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            bits = round_to_bf16(source.data).view(np.uint32) >> 16
            return handle(bits.astype(np.uint16), tl.bfloat16)
        return plain_cast(self, source, kind)

    def create_fp_trunc(self: Any, source: Any, kind: Any) -> Any:
        return cast_impl(self, source, kind)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)
