"""What the kernels share: how they are launched, and functions that Triton's language lacks.

Every kernel is launched through :func:`launch`, with options that depend on shapes, dtypes and
settings alone: nothing is tuned on the way, nothing waits for the device, so that a training step
can be captured in a CUDA graph, and a tool can compile what would be launched without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: How ``dot`` multiplies, by ``torch.get_float32_matmul_precision()``; sums are always float32.
_PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}

#: The interpreter knows no assembly, and multiplies float32 tiles as they are.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def product_precision() -> str:
    """Return the ``PRECISION`` of :func:`dot` that torch's setting asks for."""
    try:
        precision = _PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch's other interface was used, in which "bf16" is not for GPUs
        allowed = torch.backends.cuda.matmul.fp32_precision
        precision = "tf32" if allowed == "tf32" else "ieee"
    return "ieee" if precision == "tf32" and torch.version.hip else precision


# Triton's own of these two take several microseconds a call.
def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def next_power_of_2(n: int) -> int:
    """Round a positive number up to a power of two."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor, on torch's current stream there."""
    if 0 in grid:
        return
    if torch.version.hip:
        options.pop("maxnreg", None)  # NVIDIA's alone
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@triton.jit
def operand(v, PRECISION: tl.constexpr):
    """Round float32 as a factor of a product in ``PRECISION``, to the nearest.

    As cuBLAS does: left to themselves, tensor cores drop the bits that tf32 lacks.
    """
    if PRECISION == "bf16":
        return v.to(tl.bfloat16)
    elif PRECISION == "tf32" and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return v


@triton.jit
def dot_of_operands(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` of what :func:`operand` returned."""
    if PRECISION == "bf16":
        return tl.dot(a, b, accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` of float32 tiles, multiplied as ``PRECISION`` says."""
    return dot_of_operands(operand(a, PRECISION), operand(b, PRECISION), accumulator, PRECISION)


@triton.jit
def exp(v):
    """``exp(v)`` to two float32 roundings.

    Triton's own loses one for each unit of its argument: about ten at usual library sizes.
    """
    v = tl.where(v < -150.0, -150.0, tl.where(v > 150.0, 150.0, v))  # NaN stays
    # v = n log(2) + r; the first constant has few enough bits for an exact product
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    r = (v - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(n - 1.0) * (2.0 * tl.exp(r))


@triton.jit
def log1p(v):
    """``log(1 + v)`` to float32's accuracy for ``v > -1``, also where ``1 + v`` rounds."""
    u = 1.0 + v
    return tl.log(u) + (v - (u - 1.0)) / u


@triton.jit
def expm1(v):
    """``exp(v) - 1`` to a few float32 roundings, also near zero."""
    # (exp(v) - 1 - v) / v**2 where exp(v) - 1 cancels; relative error of the result 1.6e-8
    p = 1.99448739e-4
    p = p * v + 1.39821856e-3
    p = p * v + 8.33323598e-3
    p = p * v + 0.0416657925
    p = p * v + 0.166666672
    p = p * v + 0.5
    return tl.where(tl.abs(v) < 0.5, v + v * (v * p), tl.exp(v) - 1.0)


@triton.jit
def softplus(v):
    """``log(1 + exp(v))``, from the side on which the exponential is small."""
    return tl.maximum(v, 0.0) + log1p(tl.exp(-tl.abs(v)))


@triton.jit
def sigmoid(v):
    """``1 / (1 + exp(-v))``, without overflow on either side."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v >= 0.0, 1.0, e) / (1.0 + e)
