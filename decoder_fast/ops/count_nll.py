"""``count_nll``: hidden units, heads, library and counts to one negative log-likelihood a cell."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose, implementation
from ..cpp import count_nll as cpp
from ..reference.count_nll import Inputs
from ..reference.counts import Counts, csr_parts
from ..reference.log_prob import LIKELIHOODS
from ._common import (
    canonical_csr,
    cast,
    check_floating,
    check_labels,
    check_library,
    check_option,
    check_shape,
    check_tensors,
    check_together,
    compute_dtype,
    no_autocast,
    once_differentiable,
)
from .softmax_library import SCALE_ACTIVATIONS

__all__ = ["count_nll"]

#: Inputs that can be differentiated, in the order of the operation's arguments.
_DIFFERENTIABLE = (
    "hidden",
    "library",
    "scale_weight",
    "scale_bias",
    "dropout_weight",
    "dropout_bias",
    "r_weight",
    "r_bias",
    "px_r",
)


class _Rest(NamedTuple):
    """What is not differentiated."""

    backend: str  # as chosen
    px_r_index: Tensor | None
    counts: Counts
    likelihood: str
    scale_activation: str


def _counts(parts: tuple[Any, ...], n_genes: int, likelihood: str) -> Counts:
    dense, crow, col, values = parts
    return Counts(dense, crow, col, values, n_genes, signed=likelihood == "normal")


def _inputs(*args: Any) -> Inputs:
    """Build the inputs from the arguments of the custom operations."""
    likelihood, scale_activation = args[14:]
    counts = _counts(args[10:14], args[2].shape[0], likelihood)
    fields: list[Any] = [*args[:10], counts, likelihood, scale_activation]
    return Inputs(*fields)


def _backend(inputs: Inputs, backend: str) -> str:
    hidden = inputs.hidden
    if hidden.numel() == 0 or inputs.scale_weight.numel() == 0:
        return "torch"  # no kernel is needed to add up nothing
    return choose(
        "count_nll",
        backend,
        device=hidden.device,
        dtype=hidden.dtype,
        likelihood=inputs.likelihood,
    ).backend


def _check(inputs: Inputs) -> None:
    if inputs.px_r_index is not None:
        assert inputs.px_r is not None
        check_labels(inputs.px_r_index, inputs.px_r.shape[1], "px_r_index")


def _with_samples(inputs: Inputs) -> Inputs:
    """Add the dimension of Monte-Carlo samples where there is none."""
    return replace(inputs, hidden=inputs.hidden[None], library=inputs.library[None])


def _forward(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    run = implementation("count_nll", backend).forward
    _check(inputs)
    with no_autocast(inputs.hidden.device):
        if inputs.hidden.dim() == 3:
            return run(inputs)
        nll, shift, usum = run(_with_samples(inputs))
        # In place: autograd would take the result of a custom function for a view.
        return nll.squeeze_(0), shift.squeeze_(0), usum.squeeze_(0)


def _backward(
    inputs: Inputs,
    grad: Tensor,
    shift: Tensor,
    usum: Tensor,
    wanted: frozenset[str],
    backend: str,
) -> dict[str, Tensor]:
    run = implementation("count_nll", backend).backward
    with no_autocast(inputs.hidden.device):
        if inputs.hidden.dim() == 3:
            return run(inputs, grad, shift, usum, wanted)
        grads = run(_with_samples(inputs), grad[None], shift[None], usum[None], wanted)
        for name in {"hidden", "library"} & grads.keys():
            grads[name] = grads[name].squeeze(0)
        return grads


def _constant(grad: Tensor) -> float | None:
    """Return the one number that ``grad``, float32 on the CPU, holds everywhere; or None."""
    if grad.numel() == 0:
        return None
    if not any(grad.stride()):  # one number, expanded
        return grad[(0,) * grad.dim()].item()
    # Compared as bytes: one call instead of several operations.
    grad = grad.contiguous()
    content = ctypes.string_at(grad.data_ptr(), grad.nbytes)
    first = content[: grad.element_size()]
    return struct.unpack("=f", first)[0] if content == first * grad.numel() else None


class _CountNLL(torch.autograd.Function):
    """Any leading shape of ``hidden`` and ``library``, (N,) or (S, N), is the result's.

    A small mini-batch takes little longer than Python does, so tensors that are not differentiated
    come as one object, and no view is made that the native kernel can do without.
    """

    @staticmethod
    def forward(ctx: Any, rest: _Rest, *floats: Any) -> Tensor:
        backend, *options = rest
        inputs = Inputs(*floats, *options)
        _, *needs = ctx.needs_input_grad
        wanted = frozenset(compress(_DIFFERENTIABLE, needs))
        ctx.gradients = None
        if wanted and backend == "cpp":
            # The gradients along the way, for an upstream gradient that is the same for all cells,
            # such as a mean's: no product is taken twice then.
            _check(inputs)
            ctx.upstream = 1 / inputs.library.numel()
            (nll, shift, usum), ctx.gradients = cpp.forward_and_backward(
                inputs, ctx.upstream, wanted
            )
        else:
            nll, shift, usum = _forward(inputs, backend)
        ctx.save_for_backward(shift, usum, *floats, rest.px_r_index, *rest.counts.tensors)
        ctx.static = (rest, wanted)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rest, wanted = ctx.static
        # Handed out once: another backward pass must not meet gradients that others changed.
        grads, ctx.gradients = ctx.gradients, None
        if grads is not None and (constant := _constant(grad)) is not None:
            # Within a rounding of 1 / N it is a mean's; NaN is within nothing.
            if not abs(constant - ctx.upstream) <= 1e-7 * ctx.upstream:
                for gradient in grads.values():
                    gradient.mul_(constant / ctx.upstream)
        else:
            grads = None  # their memory is needed
            backend, *options = rest
            shift, usum, *floats = ctx.saved_tensors[: 2 + len(_DIFFERENTIABLE)]
            grads = _backward(Inputs(*floats, *options), grad, shift, usum, wanted, backend)
        return None, *map(grads.get, _DIFFERENTIABLE)


@torch.library.custom_op("decoder_fast::count_nll", mutates_args=())
def _op(
    hidden: Tensor,
    library: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor | None,
    dropout_weight: Tensor | None,
    dropout_bias: Tensor | None,
    r_weight: Tensor | None,
    r_bias: Tensor | None,
    px_r: Tensor | None,
    px_r_index: Tensor | None,
    x: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    likelihood: str,
    scale_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(
        hidden,
        library,
        scale_weight,
        scale_bias,
        dropout_weight,
        dropout_bias,
        r_weight,
        r_bias,
        px_r,
        px_r_index,
        x,
        crow,
        col,
        values,
        likelihood,
        scale_activation,
    )
    return _forward(inputs, _backend(inputs, backend))


@_op.register_fake
def _(hidden: Tensor, library: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = hidden.shape[:2]
    return hidden.new_empty(shape), hidden.new_empty(shape), hidden.new_empty(shape)


@torch.library.custom_op("decoder_fast::count_nll_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    shift: Tensor,
    usum: Tensor,
    hidden: Tensor,
    library: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor | None,
    dropout_weight: Tensor | None,
    dropout_bias: Tensor | None,
    r_weight: Tensor | None,
    r_bias: Tensor | None,
    px_r: Tensor | None,
    px_r_index: Tensor | None,
    x: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    likelihood: str,
    scale_activation: str,
    backend: str,
    wanted: str,
) -> list[Tensor]:
    inputs = _inputs(
        hidden,
        library,
        scale_weight,
        scale_bias,
        dropout_weight,
        dropout_bias,
        r_weight,
        r_bias,
        px_r,
        px_r_index,
        x,
        crow,
        col,
        values,
        likelihood,
        scale_activation,
    )
    names = wanted.split()
    grads = _backward(inputs, grad, shift, usum, frozenset(names), _backend(inputs, backend))
    return [grads[name].contiguous() for name in names]


@_op_backward.register_fake
def _(grad: Tensor, shift: Tensor, usum: Tensor, *args: Any) -> list[Tensor]:
    named = dict(zip(_DIFFERENTIABLE, args, strict=False))
    return [named[name].new_empty(named[name].shape) for name in args[-1].split()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:14])
    ctx.options = inputs[14:]


def _derive(ctx: Any, grad: Tensor, *_: Any) -> Any:
    shift, usum, *tensors = ctx.saved_tensors
    wanted = [
        name
        for name, need in zip(_DIFFERENTIABLE, ctx.needs_input_grad[:9], strict=True)
        if need
    ]
    results = _op_backward(grad, shift, usum, *tensors, *ctx.options, " ".join(wanted))
    grads = dict(zip(wanted, results, strict=True))
    return *(grads.get(name) for name in _DIFFERENTIABLE), *(None,) * 8


_op.register_autograd(_derive, setup_context=_setup)


def _check_head(
    name: str, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, int]
) -> None:
    if weight is not None:
        check_shape(f"{name}_weight", weight, shape, "(genes, hidden units)")
    if bias is not None:
        if weight is None:
            raise ValueError(f"{name}_bias was given without {name}_weight")
        check_shape(f"{name}_bias", bias, shape[:1], "one number a gene")


def _check_table(
    px_r: Tensor | None, px_r_index: Tensor | None, n_genes: int, n_cells: int
) -> Tensor | None:
    """Check a dispersion by gene, or a table and the labels that look it up; return those."""
    if px_r_index is None:
        if px_r is not None:
            check_shape("px_r", px_r, (n_genes,), "one number a gene, as no px_r_index was given")
        return None
    if px_r is None:
        raise ValueError("px_r_index was given without px_r, the table that it looks up")
    if px_r.dim() != 2 or px_r.shape[0] != n_genes:
        raise ValueError(
            f"px_r has shape {tuple(px_r.shape)}, expected ({n_genes}, n): with px_r_index "
            "it is a table of genes x categories"
        )
    if px_r_index.is_floating_point() or px_r_index.dtype == torch.bool:
        raise TypeError(f"px_r_index has dtype {px_r_index.dtype}, expected integers")
    if px_r_index.shape not in ((n_cells,), (n_cells, 1)):
        raise ValueError(
            f"px_r_index has shape {tuple(px_r_index.shape)}, expected ({n_cells},): one "
            "label a cell"
        )
    return px_r_index.reshape(n_cells).long()


def _prepare_counts(x: Tensor, n_cells: int, n_genes: int, backend: str) -> tuple[Any, ...]:
    """Check the counts; return them as (dense, crow, col, values)."""
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"x has layout {x.layout}, expected a dense tensor or torch.sparse_csr")
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"x has dtype {x.dtype}, expected counts of a real dtype")
    if x.requires_grad:
        raise ValueError("x requires grad, but counts are not differentiable: pass x.detach()")
    check_shape("x", x, (n_cells, n_genes), "the cells of hidden and the genes of scale_weight")
    if x.layout == torch.strided:
        return x, None, None, None
    if backend == "triton":
        return (None, *csr_parts(x))
    return (None, *canonical_csr(x, backend))


def count_nll(
    x: Tensor,
    hidden: Tensor,
    library: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor | None = None,
    *,
    likelihood: str = "zinb",
    scale_activation: str = "softmax",
    dropout_weight: Tensor | None = None,
    dropout_bias: Tensor | None = None,
    px_r: Tensor | None = None,
    px_r_index: Tensor | None = None,
    r_weight: Tensor | None = None,
    r_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the negative log-likelihood of counts from hidden units.

    The heads' products, the activation of the scale, the mean ``exp(library) * px_scale`` and the
    log-likelihood are taken gene tile by gene tile and summed at once: no cells x genes tensor is
    built. Formulas: negative binomial and zero-inflated negative binomial of Lopez et al. 2018 (Nat
    Methods 15:1053) with scvi-tools' ``eps = 1e-8``; they hold for inverse dispersions from 1e-6 to
    1e6 and beyond.

    Parameters
    ----------
    x
        Counts (N, G), dense of any real dtype or ``torch.sparse_csr``; non-negative, fractions
        allowed. Any real value under ``likelihood="normal"``. Not differentiated.
    hidden
        Hidden units of the decoder, (N, H) or (S, N, H).
    library
        Natural logarithm of the library size: anything that broadcasts to (..., N, 1).
    scale_weight, scale_bias
        Scale head, (G, H) and (G,).
    likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    scale_activation
        ``"softmax"`` (over genes) or ``"softplus"``.
    dropout_weight, dropout_bias
        Head of the dropout logits, (G, H) and (G,); required by ``"zinb"``, ignored by the others.
    px_r
        Log inverse dispersion (log standard deviation under ``"normal"``): (G,), or (G, n) with
        ``px_r_index``.
    px_r_index
        Column of ``px_r`` for each cell, integer (N,) or (N, 1).
    r_weight, r_bias
        Head of the log inverse dispersion, (G, H) and (G,), in place of ``px_r``: 'gene-cell'.
    backend
        ``"auto"``, or the one implementation to take: ``"triton"``, ``"cpp"`` or ``"torch"``.

    Returns
    -------
    Tensor
        Negative log-likelihood of each cell in nats, (N,) or (S, N), float32 (float64 if ``hidden``
        or ``scale_weight`` is). A fresh tensor, differentiable once with respect to everything but
        ``x``.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, a label is out of range, a count is negative or not a
        number, or an option is unknown or missing.
    TypeError
        If an input has a dtype or layout that does not fit.
    RuntimeError
        If ``backend`` names one that cannot run here; the message says why.
    MemoryError
        If a kernel for CPUs gets no memory to work in.

    Notes
    -----
    On CPUs, gradients are computed along with the likelihood, for an upstream gradient that is the
    same for all cells (a mean's or a sum's); another one costs a second pass. Under
    ``torch.set_float32_matmul_precision("medium")``, processors with AVX-512 BF16 multiply in
    bfloat16 and accumulate in float32: about 5e-5 relative error in the likelihood and 4e-3 in the
    gradients, instead of 1e-7 and 5e-7.
    """
    check_option("likelihood", likelihood, LIKELIHOODS)
    check_option("scale_activation", scale_activation, SCALE_ACTIVATIONS)
    check_tensors(x=x, hidden=hidden, scale_weight=scale_weight)
    if hidden.dim() not in (2, 3):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected (cells, hidden units) or "
            "(samples, cells, hidden units)"
        )
    if scale_weight.dim() != 2:
        raise ValueError(
            f"scale_weight has shape {tuple(scale_weight.shape)}, expected (genes, hidden units)"
        )
    n_cells, n_hidden = hidden.shape[-2:]
    n_genes = scale_weight.shape[0]
    if likelihood != "zinb":
        dropout_weight = dropout_bias = None
    if likelihood == "poisson":
        r_weight = r_bias = px_r = px_r_index = None
    head = (n_genes, n_hidden)
    _check_head("scale", scale_weight, scale_bias, head)
    _check_head("dropout", dropout_weight, dropout_bias, head)
    _check_head("r", r_weight, r_bias, head)
    floats = (
        hidden,
        library,
        scale_weight,
        scale_bias,
        dropout_weight,
        dropout_bias,
        r_weight,
        r_bias,
        px_r,
    )
    named = dict(zip(_DIFFERENTIABLE, floats, strict=True))
    check_tensors(**named, px_r_index=px_r_index)
    check_floating(**named)
    check_together("hidden", hidden, **named, px_r_index=px_r_index, x=x)
    if likelihood == "zinb" and dropout_weight is None:
        raise ValueError("likelihood='zinb' needs dropout_weight, the head of the dropout logits")
    if likelihood != "poisson" and (px_r is None) == (r_weight is None):
        raise ValueError(
            f"likelihood={likelihood!r} needs the dispersion either as px_r (log inverse "
            "dispersion by gene) or as r_weight (its head, for 'gene-cell' dispersion), "
            f"but {'neither was' if px_r is None else 'both were'} given"
        )
    px_r_index = _check_table(px_r, px_r_index, n_genes, n_cells)
    dtype = compute_dtype(hidden, scale_weight)
    compiling = torch.compiler.is_compiling()
    if not compiling:  # else the operation chooses, which the compiler does not look into
        backend = choose(
            "count_nll", backend, device=hidden.device, dtype=dtype, likelihood=likelihood
        ).backend
        if hidden.numel() == 0 or n_genes == 0:
            backend = "torch"  # no kernel is needed to add up nothing
    parts = _prepare_counts(x, n_cells, n_genes, backend)

    rows = hidden.shape[:-1]
    if library.shape != (*rows, 1):
        check_library(library, rows)
        library = library.expand(*rows, 1)
    inputs: list[Any] = [hidden, library.select(-1, 0), *floats[2:]]
    inputs = [cast(t, dtype) for t in inputs]
    if compiling:
        if len(rows) == 1:
            inputs[:2] = (t[None] for t in inputs[:2])
        options = (px_r_index, *parts, likelihood, scale_activation, backend)
        nll = _op(*inputs, *options)[0]
        return nll if len(rows) == 2 else nll.squeeze(0)
    counts = _counts(parts, n_genes, likelihood)
    rest = _Rest(backend, px_r_index, counts, likelihood, scale_activation)
    if torch.is_grad_enabled():
        return _CountNLL.apply(rest, *inputs)
    # autograd would have gradients computed along the way for parameters that want them
    inputs += rest[1:]
    return _forward(Inputs(*inputs), backend)[0]
