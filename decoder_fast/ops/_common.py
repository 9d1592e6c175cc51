"""What the operations share: checks of their inputs, and the dtype that they compute in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cpp.csr import canonical_parts
from ..reference import counts

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


def check_labels(labels: Tensor, n_cat: int, name: str) -> None:
    """Refuse labels outside ``0..n_cat - 1``, which would read outside the weight.

    Raises
    ------
    ValueError
        On the CPU, naming the covariate, the label found and the number of categories. On a GPU the
        check is an assertion on the device, so that nothing waits for it.
    """
    if labels.numel() == 0:
        return
    if labels.device.type == "cuda":
        counts.assert_on_device(
            ((labels >= 0) & (labels < n_cat)).all(),
            f"{name}: a label is outside 0..{n_cat - 1}",
        )
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= n_cat:
        raise ValueError(
            f"{name}: found label {low if low < 0 else high}, but there are {n_cat} categories "
            f"(labels 0..{n_cat - 1})"
        )


def check_tensors(**values: Any) -> None:
    """Refuse what is no tensor: AnnData holds NumPy's and SciPy's arrays."""
    for name, value in values.items():
        if value is None or isinstance(value, Tensor):
            continue
        kind = type(value)
        advice = f"torch.as_tensor({name})"
        if hasattr(value, "tocsr"):
            advice = f"torch.sparse_csr_tensor of {name}.tocsr()'s indptr, indices, data and shape"
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, expected a torch.Tensor: {advice}"
        )


def check_option(name: str, value: Any, known: Collection[str]) -> None:
    """Refuse an option that is not among the known ones."""
    expected = f"expected one of {', '.join(map(repr, known))}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, {expected}")
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; {expected}")


def check_library(library: Tensor, rows: tuple[int, ...]) -> None:
    """Refuse log library sizes that do not broadcast to one a row, (..., 1)."""
    shape = (*rows, 1)
    try:
        fits = library.shape[-1:] == (1,) and torch.broadcast_shapes(library.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"library has shape {tuple(library.shape)}, expected {shape} or something that "
            "broadcasts to it: one log library size a cell"
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor that does not have the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {expected}: {meaning}"
        )


def check_together(anchor_name: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that are not on the device of ``anchor``."""
    device = anchor.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} is on device '{tensor.device}', but {anchor_name} is on "
                f"'{device}': move them to one device"
            )


def check_floating(**tensors: Tensor | None) -> None:
    """Refuse tensors of an integer, boolean or complex dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point dtype")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32: never a half-precision dtype."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def canonical_csr(x: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Take a ``torch.sparse_csr`` matrix apart, its columns ascending within each row.

    Returns
    -------
    tuple of Tensor
        Row pointers, columns and values; duplicates are summed.

    Raises
    ------
    ValueError
        If indices do not fit the shape.
    """
    parts = canonical_parts(x) if backend == "cpp" else None
    return parts or counts.canonical_csr(x)


def cast(tensor: _Maybe, dtype: torch.dtype) -> _Maybe:
    """Return a tensor, or None, in a dtype; itself if it has that."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # type: ignore[return-value]


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Suspend autocast: the operations choose their own precision, backward as forward."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _Refused(torch.autograd.Function):
    """Gradients that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Any) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "decoder_fast's operations can be differentiated once, and this is a second derivative"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative an error.

    torch's decorator of this name lets the gradient pass for a constant where the upstream gradient
    is one, so that a gradient penalty would silently be ignored.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        # Tied to all that the gradients depend on: torch prunes what does not lead to the inputs
        # it is asked about, and would take gradients that are leaves for constants.
        on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return _Refused.apply(len(outputs), *outputs, *on)

    return wrapper
