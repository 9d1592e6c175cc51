"""``covariate_linear``: linear + covariate injection + norm + activation, one hidden layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from ..cpp import covariate_linear as cpp
from ..reference.covariate_linear import ACTIVATIONS, Inputs
from ._common import (
    cast,
    check_floating,
    check_labels,
    check_option,
    check_shape,
    check_tensors,
    check_together,
    compute_dtype,
    no_autocast,
    once_differentiable,
)

__all__ = ["covariate_linear"]

_DIFFERENTIABLE = ("x", "weight", "bias", "batch_norm_weight", "batch_norm_bias")


def _backend(tensor: Tensor, backend: str) -> str:
    return choose("covariate_linear", backend, device=tensor.device, dtype=tensor.dtype).backend


def _module(inputs: Inputs, backend: str) -> tuple[str, Any]:
    """Choose the backend, and its module; without cells or units, plain PyTorch's."""
    chosen = _backend(inputs.x, backend)
    n_samples, n_cells, _ = inputs.x.shape
    if n_samples * n_cells * inputs.weight.shape[0] == 0:
        chosen = "torch"
    return chosen, implementation("covariate_linear", chosen)


def _check_labels(inputs: Inputs) -> None:
    for k, (category, n_cat) in enumerate(zip(inputs.categories, inputs.n_cats, strict=True)):
        if not category.is_floating_point():
            check_labels(category, n_cat, f"category {k}")


def _forward(
    inputs: Inputs, backend: str, update: tuple[Tensor, Tensor, float] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer, and move the running statistics of ``update`` by its momentum."""
    chosen, module = _module(inputs, backend)
    # These kernels look at every label anyway.
    if chosen != "cpp" and not (chosen == "triton" and inputs.x.is_cuda):
        _check_labels(inputs)
    with no_autocast(inputs.x.device):
        try:
            if update is not None and chosen != "torch" and _movable(update[:2]):
                return module.forward(inputs, update[:2], update[2])
            results = module.forward(inputs)
        except cpp.LabelError:
            _check_labels(inputs)
            raise
    if update is not None:
        n_cells, eps = inputs.x.shape[1], inputs.batch_norm_eps
        _update_running(*update[:2], results[2], results[3], update[2], eps, n_cells, backend)
    return results


def _backward(
    inputs: Inputs,
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    wanted: frozenset[str],
    backend: str,
) -> dict[str, Tensor]:
    _, module = _module(inputs, backend)
    with no_autocast(grad.device):
        return module.backward(inputs, grad, out, v, mean, invstd, wanted)


@functools.cache
def _names(n_categories: int) -> tuple[str, ...]:
    """Name what can be differentiated, in the order of the operation's arguments."""
    return (*_DIFFERENTIABLE, *(f"categories.{k}" for k in range(n_categories)))


class _CovariateLinear(torch.autograd.Function):
    # Takes and returns 2-D tensors as they are: views outside would be autograd's nodes too.
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        options: tuple[Any, ...],
        n_cats: list[int],
        running: tuple[Tensor | None, Tensor | None],
        update: tuple[Tensor, Tensor, float] | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch_norm_weight: Tensor | None,
        batch_norm_bias: Tensor | None,
        *categories: Tensor,
    ) -> Tensor:
        inputs = Inputs(
            x if x.dim() == 3 else x[None],
            weight,
            bias,
            list(categories),
            n_cats,
            batch_norm_weight,
            batch_norm_bias,
            *running,
            *options,
        )
        out, v, mean, invstd = _forward(inputs, backend, update)
        if x.dim() == 2:
            out = out[0]
        ctx.save_for_backward(
            out, v, mean, invstd, x, weight, bias, batch_norm_weight, batch_norm_bias, *categories
        )
        ctx.static = (backend, options, n_cats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        backend, options, n_cats = ctx.static
        out, v, mean, invstd, x, weight, bias, bn_weight, bn_bias, *categories = ctx.saved_tensors
        names = _names(len(categories))
        wanted = frozenset(itertools.compress(names, ctx.needs_input_grad[5:]))
        if flat := x.dim() == 2:
            x, out, grad = x[None], out[None], grad[None]
        # Running statistics are in (mean, invstd) where they were used.
        inputs = Inputs(
            x, weight, bias, categories, n_cats, bn_weight, bn_bias, None, None, *options
        )
        grads = _backward(inputs, grad, out, v, mean, invstd, wanted, backend)
        if flat and "x" in grads:
            grads["x"] = grads["x"][0]
        return (None,) * 5 + tuple(map(grads.get, names))


@torch.library.custom_op("decoder_fast::covariate_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    categories: list[Tensor],
    n_cats: list[int],
    batch_norm_weight: Tensor | None,
    batch_norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_batch_norm: bool,
    batch_statistics: bool,
    batch_norm_eps: float,
    use_layer_norm: bool,
    layer_norm_eps: float,
    activation: str,
    activation_parameter: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(
        Inputs(
            x,
            weight,
            bias,
            categories,
            n_cats,
            batch_norm_weight,
            batch_norm_bias,
            running_mean,
            running_var,
            use_batch_norm,
            batch_statistics,
            batch_norm_eps,
            use_layer_norm,
            layer_norm_eps,
            activation,
            activation_parameter,
        ),
        backend,
    )


@_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, _ = args
    inputs = Inputs(*fields)
    x, (n_samples, n_cells, _) = inputs.x, inputs.x.shape
    n_hidden = inputs.weight.shape[0]
    out = x.new_empty(n_samples, n_cells, n_hidden)
    v = torch.empty_like(out) if inputs.keeps_linear else x.new_empty(0)
    if not inputs.use_batch_norm:
        return out, v, x.new_empty(0), x.new_empty(0)
    shape = (n_samples if inputs.batch_statistics else 1, n_hidden)
    return out, v, x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("decoder_fast::covariate_linear_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    categories: list[Tensor],
    n_cats: list[int],
    batch_norm_weight: Tensor | None,
    batch_norm_bias: Tensor | None,
    use_batch_norm: bool,
    batch_statistics: bool,
    batch_norm_eps: float,
    use_layer_norm: bool,
    layer_norm_eps: float,
    activation: str,
    activation_parameter: float,
    backend: str,
    wanted: str,
) -> list[Tensor]:
    inputs = Inputs(
        x,
        weight,
        bias,
        categories,
        n_cats,
        batch_norm_weight,
        batch_norm_bias,
        None,
        None,
        use_batch_norm,
        batch_statistics,
        batch_norm_eps,
        use_layer_norm,
        layer_norm_eps,
        activation,
        activation_parameter,
    )
    names = wanted.split()
    grads = _backward(inputs, grad, out, v, mean, invstd, frozenset(names), backend)
    return [grads[name].contiguous() for name in names]


@_op_backward.register_fake
def _(
    grad: Tensor, out: Tensor, v: Tensor, mean: Tensor, invstd: Tensor, *args: Any
) -> list[Tensor]:
    fields: list[Any] = [*args[:7], None, None, *args[7:-2]]
    inputs, wanted = Inputs(*fields), args[-1]
    return [inputs.named(name).new_empty(inputs.named(name).shape) for name in wanted.split()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, categories, n_cats, bn_weight, bn_bias, _, _, *options = inputs
    ctx.save_for_backward(*output, x, weight, bias, bn_weight, bn_bias, *categories)
    ctx.static = (n_cats, options)
    ctx.n_categories = len(categories)


def _derive(ctx: Any, grad: Tensor, *_: Any) -> Any:
    n_cats, options = ctx.static
    out, v, mean, invstd, x, weight, bias, bn_weight, bn_bias, *categories = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [
        name
        for name, position in zip(_DIFFERENTIABLE, (0, 1, 2, 5, 6), strict=True)
        if need[position]
    ]
    wanted += [
        f"categories.{k}" for k, category in enumerate(categories) if category.requires_grad
    ]
    results = _op_backward(
        grad,
        out,
        v,
        mean,
        invstd,
        x,
        weight,
        bias,
        categories,
        n_cats,
        bn_weight,
        bn_bias,
        *options,
        " ".join(wanted),
    )
    grads = dict(zip(wanted, results, strict=True))
    return (
        grads.get("x"),
        grads.get("weight"),
        grads.get("bias"),
        [grads.get(f"categories.{k}") for k in range(ctx.n_categories)],
        None,
        grads.get("batch_norm_weight"),
        grads.get("batch_norm_bias"),
        *(None,) * (2 + len(options)),
    )


_op.register_autograd(_derive, setup_context=_setup)


def _movable(running: tuple[Tensor, Tensor]) -> bool:
    """Say whether a kernel can move these running statistics where they are."""
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in running)


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    n_cells: int,
    backend: str,
) -> None:
    """Move the running statistics once for each sample, as stock batch norm does slice by slice."""
    chosen, running = _backend(mean, backend), (running_mean, running_var)
    if chosen != "torch" and _movable(running):
        module = implementation("covariate_linear", chosen)
        module.update_running(running, mean, invstd, momentum, eps, n_cells)
        return
    with torch.no_grad():
        unbiased = (invstd.pow(-2) - eps).clamp_(min=0) * (n_cells / (n_cells - 1))
        for sample_mean, sample_var in zip(mean.unbind(), unbiased.unbind(), strict=True):
            running_mean.mul_(1 - momentum).add_(sample_mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(sample_var, alpha=momentum)


_op_update_running = torch.library.custom_op(
    "decoder_fast::update_running", _update_running, mutates_args=("running_mean", "running_var")
)


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse a parameter that is not a tensor, not floating point, or not where ``x`` is."""
    if not isinstance(tensor, Tensor):
        check_tensors(**{name: tensor})
    if not tensor.is_floating_point():
        check_floating(**{name: tensor})
    if tensor.device != x.device:
        check_together("x", x, **{name: tensor})


def _prepared_category(
    k: int, category: Tensor, n_cat: int, n_cells: int, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """Check a covariate; return int64 labels (N,), or a matrix of ``dtype``."""
    if not isinstance(category, Tensor):
        check_tensors(**{f"category {k}": category})
    if category.device != x.device:
        check_together("x", x, **{f"category {k}": category})
    if category.dim() == 2 and category.shape[1] == n_cat and n_cat > 1:
        check_shape(f"category {k}", category, (n_cells, n_cat), "one row a cell")
        return cast(category, dtype)
    if category.is_floating_point() or category.dtype == torch.bool:
        raise TypeError(
            f"category {k} has dtype {category.dtype} and shape {tuple(category.shape)}; "
            f"expected integer labels (cells, 1), or a ({n_cells}, {n_cat}) one-hot matrix"
        )
    if category.shape not in ((n_cells,), (n_cells, 1)):
        raise ValueError(
            f"category {k} has shape {tuple(category.shape)}, expected ({n_cells}, 1) "
            f"integer labels or a ({n_cells}, {n_cat}) one-hot matrix"
        )
    return cast(category.reshape(n_cells), torch.int64)


def covariate_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    categories: Sequence[Tensor] = (),
    n_cats: Sequence[int] = (),
    *,
    use_batch_norm: bool = False,
    batch_norm_weight: Tensor | None = None,
    batch_norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    batch_norm_eps: float = 1e-3,
    use_layer_norm: bool = False,
    layer_norm_eps: float = 1e-5,
    activation: str = "relu",
    activation_parameter: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute one hidden layer: linear + covariates + batch norm + layer norm + activation.

    The product of a one-hot covariate with its weight columns is a lookup of those columns, so no
    one-hot matrix is built. Norms and their order are those of scvi-tools' ``FCLayers``.

    Parameters
    ----------
    x
        (N, n_in) or (S, N, n_in), floating point.
    weight
        (H, n_in + sum(n_cats)), columns ``[x | category 1 | category 2 | ...]``.
    bias
        (H,), or None.
    categories
        For each covariate integer labels (N,) or (N, 1), or a floating-point (N, n_cats[k]) matrix
        (one-hot or soft), shared by all samples.
    n_cats
        Number of categories of each covariate.
    use_batch_norm, momentum, batch_norm_eps
        Batch norm over cells, as ``torch.nn.functional.batch_norm`` (Ioffe and Szegedy 2015).
    batch_norm_weight, batch_norm_bias, running_mean, running_var
        Its parameters and running statistics, (H,) each, or None. In training the statistics are
        updated in place, once for each sample of a 3-D ``x``.
    training
        Whether batch norm uses the batch's own statistics; without running statistics it always
        does.
    use_layer_norm, layer_norm_eps
        Layer norm over hidden units, without affine parameters (Ba et al. 2016).
    activation
        ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"gelu"`` or ``"silu"``.
    activation_parameter
        Negative slope of ``"leaky_relu"``, alpha of ``"elu"``.
    backend
        ``"auto"``, or the one implementation to take: ``"triton"``, ``"cpp"`` or ``"torch"``.

    Returns
    -------
    Tensor
        (N, H) or (S, N, H), float32 (float64 if ``x`` or ``weight`` is). Differentiable once.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, a label is out of range, an option is unknown, or batch
        norm is to be trained on a single cell.
    TypeError
        If an input has a dtype that does not fit.
    RuntimeError
        If ``backend`` names one that cannot run here; the message says why.
    MemoryError
        If a kernel for CPUs gets no memory to work in.
    """
    check_option("activation", activation, ACTIVATIONS)
    check_tensors(x=x, weight=weight)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (cells, n_in) or (samples, cells, n_in)"
        )
    check_floating(x=x, weight=weight)
    if weight.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (hidden units, columns)"
        )
    if len(categories) != len(n_cats):
        raise ValueError(f"got {len(categories)} categories, but {len(n_cats)} numbers of them")
    n_cells, n_in = x.shape[-2:]
    n_hidden = weight.shape[0]
    if weight.shape[1] != n_in + sum(n_cats):
        check_shape(
            "weight",
            weight,
            (n_hidden, n_in + sum(n_cats)),
            f"{n_in} columns for x and {sum(n_cats)} for the categories",
        )
    dtype = compute_dtype(x, weight)
    prepared = [
        _prepared_category(k, category, n_cat, n_cells, x, dtype)
        for k, (category, n_cat) in enumerate(zip(categories, n_cats, strict=True))
    ]

    def vector(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        _check_kind(name, tensor, x)
        if tensor.shape != (n_hidden,):
            check_shape(name, tensor, (n_hidden,), "one number a hidden unit")
        # Contiguous, because torch's batch norm on the CPU ignores its weight's stride backwards.
        return cast(tensor, dtype).contiguous()

    _check_kind("weight", weight, x)
    bias = vector("bias", bias)
    bn_weight = bn_bias = bn_mean = bn_var = None
    if use_batch_norm:
        bn_weight = vector("batch_norm_weight", batch_norm_weight)
        bn_bias = vector("batch_norm_bias", batch_norm_bias)
        bn_mean = vector("running_mean", running_mean)
        bn_var = vector("running_var", running_var)
    batch_statistics = use_batch_norm and (training or bn_mean is None or bn_var is None)
    if batch_statistics and n_cells == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size "
            f"{(n_cells, n_hidden)}: batch norm cannot be trained on a single cell "
            "(drop the last, smaller mini-batch, or call .eval())"
        )
    options = (
        use_batch_norm,
        batch_statistics,
        float(batch_norm_eps),
        use_layer_norm,
        float(layer_norm_eps),
        activation,
        float(activation_parameter),
    )
    x, weight = cast(x, dtype), cast(weight, dtype)
    update = None
    if training and batch_statistics and momentum != 0 and n_cells > 0:
        if running_mean is not None and running_var is not None:
            update = (running_mean, running_var, float(momentum))
    if not torch.compiler.is_compiling():
        return _CovariateLinear.apply(  # type: ignore[no-any-return]
            backend,
            options,
            list(n_cats),
            (bn_mean, bn_var),
            update,
            x,
            weight,
            bias,
            bn_weight,
            bn_bias,
            *prepared,
        )
    out, _, mean, invstd = _op(
        x if x.dim() == 3 else x.unsqueeze(0),
        weight,
        bias,
        prepared,
        list(n_cats),
        bn_weight,
        bn_bias,
        bn_mean,
        bn_var,
        *options,
        backend,
    )
    if update is not None:
        _op_update_running(
            *update[:2], mean.detach(), invstd.detach(), momentum, batch_norm_eps, n_cells, backend
        )
    return out if x.dim() == 3 else out.squeeze(0)
