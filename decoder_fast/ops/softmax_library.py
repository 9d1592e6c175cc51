"""``softmax_library``: logits and library size to ``(px_scale, px_rate)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from ._common import check_floating, check_together, compute_dtype, no_autocast, once_differentiable

__all__ = ["softmax_library"]

SCALE_ACTIVATIONS = ("softmax", "softplus")


def _chosen(tensor: Tensor, backend: str) -> str:
    return choose("softmax_library", backend, device=tensor.device, dtype=tensor.dtype).backend


def check_scale_activation(scale_activation: str) -> None:
    """Refuse an unknown activation of the scale head."""
    if scale_activation not in SCALE_ACTIVATIONS:
        raise ValueError(
            f"scale_activation={scale_activation!r} is unknown; expected 'softmax' or 'softplus'"
        )


def _forward(
    logits: Tensor, library: Tensor, scale_activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    run = implementation("softmax_library", _chosen(logits, backend)).forward
    with no_autocast(logits.device):
        return run(logits.contiguous(), library.contiguous(), scale_activation)


def _backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    backend: str,
    logits_wanted: bool,
    library_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    run = implementation("softmax_library", _chosen(scale, backend)).backward
    with no_autocast(scale.device):
        return run(
            grad_scale, grad_rate, scale, library, scale_activation, logits_wanted, library_wanted
        )


class _SoftmaxLibrary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, library: Tensor, scale_activation: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scale, rate = _forward(logits, library, scale_activation, backend)
        ctx.save_for_backward(scale, library)
        ctx.options = (scale_activation, backend)
        return scale, rate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor | None, grad_rate: Tensor | None) -> Any:
        if grad_scale is None and grad_rate is None:
            return None, None, None, None
        wanted = ctx.needs_input_grad[:2]
        return (
            *_backward(grad_scale, grad_rate, *ctx.saved_tensors, *ctx.options, *wanted),
            None,
            None,
        )


@torch.library.custom_op("decoder_fast::softmax_library", mutates_args=())
def _op(
    logits: Tensor, library: Tensor, scale_activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _forward(logits, library, scale_activation, backend)


@_op.register_fake
def _(
    logits: Tensor, library: Tensor, scale_activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape)


@torch.library.custom_op("decoder_fast::softmax_library_backward", mutates_args=())
def _op_backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_logits, d_library = _backward(
        grad_scale, grad_rate, scale, library, scale_activation, backend, True, True
    )
    assert d_logits is not None and d_library is not None
    return d_logits.contiguous(), d_library.contiguous()


@_op_backward.register_fake
def _(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return scale.new_empty(scale.shape), library.new_empty(library.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], inputs[1])
    ctx.options = inputs[2:]


def _derive(ctx: Any, grad_scale: Tensor | None, grad_rate: Tensor | None) -> Any:
    if grad_scale is None and grad_rate is None:
        return None, None, None, None
    d_logits, d_library = _op_backward(grad_scale, grad_rate, *ctx.saved_tensors, *ctx.options)
    return d_logits, d_library, None, None


_op.register_autograd(_derive, setup_context=_setup)


def softmax_library(
    logits: Tensor,
    library: Tensor,
    *,
    scale_activation: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn logits and library sizes into normalised and expected expression.

    ``px_scale = softmax(logits)`` over the genes (or ``softplus(logits)``) and
    ``px_rate = exp(library) * px_scale``: the scale head of scvi-tools' ``DecoderSCVI``.

    Parameters
    ----------
    logits
        Output of the scale head, (N, G) or (S, N, G), floating point.
    library
        Natural logarithm of the library size: anything that broadcasts to (..., N, 1).
    scale_activation
        ``"softmax"`` or ``"softplus"``.
    backend
        ``"auto"``, or the one implementation to take: ``"triton"``, ``"cpp"`` or ``"torch"``.

    Returns
    -------
    tuple of Tensor
        ``px_scale`` and ``px_rate``, two separate tensors of the shape of ``logits``, float32
        (float64 if either input is). Differentiable once.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, or an option is unknown.
    TypeError
        If an input is not of a floating-point dtype.
    """
    check_scale_activation(scale_activation)
    check_floating(logits=logits, library=library)
    check_together("logits", logits, library=library)
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, expected (cells, genes) or "
            "(samples, cells, genes)"
        )
    shape = (*logits.shape[:-1], 1)
    try:
        fits = torch.broadcast_shapes(library.shape, shape) == shape and library.dim() > 0
    except RuntimeError:
        fits = False
    if not fits or (library.dim() > 0 and library.shape[-1] != 1):
        raise ValueError(
            f"library has shape {tuple(library.shape)}, expected {shape} or something that "
            "broadcasts to it: one log library size a cell"
        )
    dtype = compute_dtype(logits, library)
    library = library.to(dtype).reshape((1,) * (logits.dim() - library.dim()) + library.shape)
    args = (logits.to(dtype), library, scale_activation, backend)
    if torch.compiler.is_compiling():
        return _op(*args)
    return _SoftmaxLibrary.apply(*args)
