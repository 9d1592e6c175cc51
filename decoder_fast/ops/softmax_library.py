"""``softmax_library``: logits, or hidden units, and library size to ``(px_scale, px_rate)``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from ..cpp import count_nll as cpp_count_nll
from ..reference import softmax_library as reference
from ._common import (
    cast,
    check_floating,
    check_library,
    check_option,
    check_shape,
    check_tensors,
    check_together,
    compute_dtype,
    no_autocast,
    once_differentiable,
)

__all__ = ["log_sum_exp", "softmax_library"]

SCALE_ACTIVATIONS = ("softmax", "softplus")


def _backend(tensor: Tensor, backend: str) -> str:
    return choose("softmax_library", backend, device=tensor.device, dtype=tensor.dtype).backend


#: Inputs that can be differentiated, in the order of the operation's arguments.
_DIFFERENTIABLE = ("logits", "library", "weight", "bias")


def _forward(
    logits: Tensor,
    library: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = implementation("softmax_library", _backend(logits, backend)).forward
    with no_autocast(logits.device):
        return run(logits.contiguous(), library.contiguous(), scale_activation, weight, bias)


def _backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    scale_activation: str,
    backend: str,
    wanted: frozenset[str],
) -> dict[str, Tensor | None]:
    run = implementation("softmax_library", _backend(scale, backend)).backward
    with no_autocast(scale.device):
        d_logits, d_library = run(
            grad_scale,
            grad_rate,
            scale,
            library,
            scale_activation,
            not wanted.isdisjoint(("logits", "weight", "bias")),
            "library" in wanted,
        )
        grads = {"library": d_library}
        if weight is None:
            grads["logits"] = d_logits
        elif d_logits is not None:
            assert hidden is not None
            d_logits = d_logits.flatten(0, -2)
            if "logits" in wanted:
                grads["logits"] = (d_logits @ weight).view(hidden.shape)
            if "weight" in wanted:
                grads["weight"] = d_logits.t() @ hidden.flatten(0, -2)
            if "bias" in wanted:
                grads["bias"] = d_logits.sum(0)
    return grads


class _SoftmaxLibrary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        library: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale_activation: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scale, rate = _forward(logits, library, weight, bias, scale_activation, backend)
        hidden = None if weight is None else logits
        ctx.save_for_backward(scale, library, hidden, weight)
        ctx.options = (scale_activation, backend)
        return scale, rate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor | None, grad_rate: Tensor | None) -> Any:
        if grad_scale is None and grad_rate is None:
            return (None,) * 6
        scale, library, hidden, weight = ctx.saved_tensors
        scale_activation, backend = ctx.options
        grads = _backward(
            grad_scale,
            grad_rate,
            scale,
            library,
            hidden,
            weight,
            scale_activation,
            backend,
            frozenset(itertools.compress(_DIFFERENTIABLE, ctx.needs_input_grad)),
        )
        return *map(grads.get, _DIFFERENTIABLE), None, None


@torch.library.custom_op("decoder_fast::softmax_library", mutates_args=())
def _op(
    logits: Tensor,
    library: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _forward(logits, library, weight, bias, scale_activation, backend)


@_op.register_fake
def _(
    logits: Tensor,
    library: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n_genes = logits.shape[-1] if weight is None else weight.shape[0]
    shape = (*logits.shape[:-1], n_genes)
    return logits.new_empty(shape), logits.new_empty(shape)


@torch.library.custom_op("decoder_fast::softmax_library_backward", mutates_args=())
def _op_backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    scale_activation: str,
    backend: str,
    wanted: str,
) -> list[Tensor]:
    names = wanted.split()
    grads = _backward(
        grad_scale,
        grad_rate,
        scale,
        library,
        hidden,
        weight,
        scale_activation,
        backend,
        frozenset(names),
    )
    return [grad.contiguous() for name in names if (grad := grads[name]) is not None]


@_op_backward.register_fake
def _(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    scale_activation: str,
    backend: str,
    wanted: str,
) -> list[Tensor]:
    shapes = {"logits": (scale if hidden is None else hidden).shape, "library": library.shape}
    if weight is not None:
        shapes |= {"weight": weight.shape, "bias": weight.shape[:1]}
    return [scale.new_empty(shapes[name]) for name in wanted.split()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logits, library, weight, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], library, None if weight is None else logits, weight)


def _derive(ctx: Any, grad_scale: Tensor | None, grad_rate: Tensor | None) -> Any:
    if grad_scale is None and grad_rate is None:
        return (None,) * 6
    wanted = list(itertools.compress(_DIFFERENTIABLE, ctx.needs_input_grad))
    results = _op_backward(
        grad_scale, grad_rate, *ctx.saved_tensors, *ctx.options, " ".join(wanted)
    )
    grads = dict(zip(wanted, results, strict=True))
    return *map(grads.get, _DIFFERENTIABLE), None, None


_op.register_autograd(_derive, setup_context=_setup)


def softmax_library(
    logits: Tensor,
    library: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_activation: str = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn logits and library sizes into normalised and expected expression.

    ``px_scale = softmax(logits)`` over the genes (or ``softplus(logits)``) and
    ``px_rate = exp(library) * px_scale``: the scale head of scvi-tools' ``DecoderSCVI``. With
    ``weight`` it is the whole head, ``logits = hidden @ weight.T + bias``; logits are not kept for
    the backward pass then, and on a GPU not stored beside the outputs.

    Parameters
    ----------
    logits
        Output of the scale head, (N, G) or (S, N, G), floating point. With ``weight``, the hidden
        units instead, (N, H) or (S, N, H).
    library
        Natural logarithm of the library size: anything that broadcasts to (..., N, 1).
    weight
        Weight of the scale head's linear map, (G, H), floating point; None if the first argument
        holds logits.
    bias
        Its bias, (G,), floating point, or None.
    scale_activation
        ``"softmax"`` or ``"softplus"``.
    backend
        ``"auto"``, or the one implementation to take: ``"triton"``, ``"cpp"`` or ``"torch"``.

    Returns
    -------
    tuple of Tensor
        ``px_scale`` and ``px_rate``, two separate tensors, (N, G) or (S, N, G), float32 (float64 if
        any input is). Differentiable once, in all four tensors. Products on a GPU are as precise as
        ``torch.get_float32_matmul_precision()`` says, under autocast too.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, ``bias`` comes without ``weight``, or an option is unknown.
    TypeError
        If an input is not of a floating-point dtype.
    RuntimeError
        If ``backend`` names one that cannot run here; the message says why.
    MemoryError
        If a kernel for CPUs gets no memory to work in.
    """
    check_option("scale_activation", scale_activation, SCALE_ACTIVATIONS)
    check_tensors(logits=logits, library=library, weight=weight, bias=bias)
    check_floating(logits=logits, library=library, weight=weight, bias=bias)
    check_together("logits", logits, library=library, weight=weight, bias=bias)
    last = "genes" if weight is None else "hidden units"
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, expected (cells, {last}) or "
            f"(samples, cells, {last})"
        )
    if weight is not None:
        if weight.dim() != 2:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected (genes, hidden units)"
            )
        expected = (weight.shape[0], logits.shape[-1])
        check_shape("weight", weight, expected, "(genes, hidden units of logits)")
    if bias is not None:
        if weight is None:
            raise ValueError(
                f"bias of shape {tuple(bias.shape)} was given without weight: add it to the "
                "logits, or pass hidden units, weight and bias"
            )
        check_shape("bias", bias, tuple(weight.shape[:1]), "one number a gene")
    check_library(library, logits.shape[:-1])
    dtype = compute_dtype(logits, library, weight, bias)
    library = library.to(dtype).reshape((1,) * (logits.dim() - library.dim()) + library.shape)
    heads = (cast(t, dtype) for t in (weight, bias))
    args = (cast(logits, dtype), library, *heads, scale_activation, backend)
    if torch.compiler.is_compiling():
        return _op(*args)
    return _SoftmaxLibrary.apply(*args)


def log_sum_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logarithm of the scale head's softmax normaliser, ``logsumexp(hidden @ weight.T + bias)``.

    With it, normalised expression of a few genes takes the logits of those genes alone. Logits come
    tile by tile, and are not kept. Not differentiable.

    Parameters
    ----------
    hidden
        Hidden units, (..., H), float32 or float64.
    weight, bias
        The scale head, (G, H) and (G,) or None, of the same dtype.

    Returns
    -------
    Tensor
        (...), of the same dtype.
    """
    # The native likelihood begins with it; that of an all-zero row asks for nothing else.
    chosen = choose("count_nll", device=hidden.device, dtype=hidden.dtype, likelihood="poisson")
    run = cpp_count_nll if chosen.backend == "cpp" and hidden.numel() > 0 else reference
    with torch.no_grad(), no_autocast(hidden.device):
        return run.log_sum_exp(hidden.flatten(0, -2), weight, bias).view(hidden.shape[:-1])
