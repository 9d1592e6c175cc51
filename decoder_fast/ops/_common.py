"""What the operations share: checks of their inputs, and the dtype that they compute in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


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
        torch._assert_async(
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
