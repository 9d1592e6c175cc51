"""One hidden layer: linear + covariate injection + norm + activation, in plain PyTorch.

The one-hot product of an integer covariate is a lookup of weight columns, so neither the one-hot
matrix nor the concatenation with it is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Activations that the operation fuses; the parameter is the slope (leaky_relu) or alpha (elu).
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "gelu", "silu")


@dataclass
class Inputs:
    """One layer; ``S`` samples of ``N`` cells.

    ``x`` (S, N, n_in); ``weight`` (H, n_in + sum of n_cats), columns ``[x | category 1 | ...]``;
    ``categories[k]`` (N,) int64 labels, or an (N, n_cats[k]) floating (one-hot or soft) matrix.
    Batch norm runs if ``use_batch_norm``: over the cells of each sample if ``batch_statistics``,
    else with ``running_mean`` and ``running_var``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    categories: list[Tensor]
    n_cats: list[int]
    batch_norm_weight: Tensor | None
    batch_norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_norm: bool
    batch_statistics: bool
    batch_norm_eps: float
    use_layer_norm: bool
    layer_norm_eps: float
    activation: str
    activation_parameter: float

    @property
    def has_norm(self) -> bool:
        """Whether anything stands between the linear map and the activation."""
        return self.use_batch_norm or self.use_layer_norm

    @property
    def keeps_linear(self) -> bool:
        """Whether the backward pass needs what the norms, or the activation, got."""
        return self.has_norm or self.activation not in ("identity", "relu")

    def named(self, name: str) -> Tensor:
        """Return what ``wanted`` in :func:`backward` calls by this name."""
        field, _, position = name.partition(".")
        return self.categories[int(position)] if position else getattr(self, field)


def _activate(name: str, parameter: float, a: Tensor) -> Tensor:
    if name == "relu":
        return torch.relu(a)
    if name == "leaky_relu":
        return F.leaky_relu(a, parameter)
    if name == "elu":
        return F.elu(a, parameter)
    if name == "gelu":
        return F.gelu(a)
    if name == "silu":
        return F.silu(a)
    return a


def _activate_backward(name: str, parameter: float, grad: Tensor, a: Tensor) -> Tensor:
    aten = torch.ops.aten
    if name == "relu":
        return aten.threshold_backward(grad, a, 0)
    if name == "leaky_relu":
        return aten.leaky_relu_backward(grad, a, parameter, False)
    if name == "elu":
        return aten.elu_backward(grad, parameter, 1.0, 1.0, False, a)
    if name == "gelu":
        return aten.gelu_backward(grad, a)
    if name == "silu":
        return aten.silu_backward(grad, a)
    return grad


def _columns(inputs: Inputs) -> list[tuple[Tensor, slice]]:
    """Each category with the weight columns that belong to it."""
    start = inputs.x.shape[-1]
    columns = []
    for category, n_cat in zip(inputs.categories, inputs.n_cats, strict=True):
        columns.append((category, slice(start, start + n_cat)))
        start += n_cat
    return columns


def _linear(inputs: Inputs) -> Tensor:
    n_in = inputs.x.shape[-1]
    out = F.linear(inputs.x, inputs.weight[:, :n_in], inputs.bias)
    n_cells = inputs.x.shape[1]
    for category, columns in _columns(inputs):
        weight = inputs.weight[:, columns]
        if category.is_floating_point():
            out += F.linear(category, weight)
        elif weight.shape[1] <= n_cells:
            # Few categories: transposed first, so that each lookup reads one contiguous row.
            out += F.embedding(category, weight.t().contiguous())
        else:
            out += weight.index_select(1, category).t()
    return out


def _normalise(inputs: Inputs, v: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """Batch norm of (S, N, H), given the mean and 1 / standard deviation of (S or 1, H)."""
    v = (v - mean[:, None]) * invstd[:, None]
    if inputs.batch_norm_weight is not None:
        v = v * inputs.batch_norm_weight
    return v if inputs.batch_norm_bias is None else v + inputs.batch_norm_bias


def _batch_norm(inputs: Inputs, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of (S, N, H): output, and the mean and 1 / standard deviation that it used."""
    weight, bias, eps = inputs.batch_norm_weight, inputs.batch_norm_bias, inputs.batch_norm_eps
    if v.numel() == 0:
        statistics = v.new_zeros(v.shape[0] if inputs.batch_statistics else 1, v.shape[-1])
        return v, statistics, torch.ones_like(statistics)
    if not inputs.batch_statistics:
        assert inputs.running_mean is not None and inputs.running_var is not None
        # Copies: the caller may go on to change the running statistics.
        mean = inputs.running_mean[None].clone()
        invstd = torch.rsqrt(inputs.running_var[None] + eps)
        flat = F.batch_norm(
            v.flatten(0, 1), mean[0], inputs.running_var, weight, bias, False, 0.0, eps
        )
        return flat.view_as(v), mean, invstd
    samples = [
        torch.native_batch_norm(sample, weight, bias, None, None, True, 0.0, eps) for sample in v
    ]
    if len(samples) == 1:
        out, mean, invstd = samples[0]
        return out[None], mean[None], invstd[None]
    out, mean, invstd = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return out, mean, invstd


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the layer.

    Returns
    -------
    tuple of Tensor
        Output (S, N, H); what the backward pass needs: the linear map's output (S, N, H), empty if
        the output serves; mean and 1 / standard deviation of the batch norm, (S, H), or (1, H)
        where the running statistics are used, or empty without batch norm.
    """
    v = _linear(inputs)
    a = v
    mean, invstd = v.new_empty(0), v.new_empty(0)  # two: outputs of an operation share no memory
    if inputs.use_batch_norm:
        a, mean, invstd = _batch_norm(inputs, v)
    if inputs.use_layer_norm:
        a = F.layer_norm(a, a.shape[-1:], None, None, inputs.layer_norm_eps)
    out = _activate(inputs.activation, inputs.activation_parameter, a)
    if not inputs.keeps_linear:
        v = v.new_empty(0)
    elif out is v:  # nothing was done to no cells
        out = v.clone()
    return out, v, mean, invstd


def _batch_norm_backward(
    inputs: Inputs, grad: Tensor, v: Tensor, mean: Tensor, invstd: Tensor, wanted: frozenset[str]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    weight_wanted = bool({"batch_norm_weight", "batch_norm_bias"} & wanted)
    running_mean = running_var = None
    if not inputs.batch_statistics:
        running_mean, running_var = mean[0], invstd[0].pow(-2) - inputs.batch_norm_eps
    if mean.shape[0] == 1:
        samples = [(grad.flatten(0, 1), v.flatten(0, 1), 0)]
    else:
        samples = [(grad[s], v[s], s) for s in range(v.shape[0])]
    d_v, d_weight, d_bias = [], None, None
    for sample_grad, sample_v, s in samples:
        dv, dw, db = torch.ops.aten.native_batch_norm_backward(
            sample_grad.contiguous(),
            sample_v,
            inputs.batch_norm_weight,
            running_mean,
            running_var,
            mean[s],
            invstd[s],
            inputs.batch_statistics,
            inputs.batch_norm_eps,
            [True, weight_wanted, weight_wanted],
        )
        d_v.append(dv)
        if weight_wanted:
            d_weight = dw if d_weight is None else d_weight + dw
            d_bias = db if d_bias is None else d_bias + db
    out = d_v[0] if len(d_v) == 1 else torch.stack(d_v)
    return out.view_as(v), d_weight, d_bias


def backward(
    inputs: Inputs,
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Compute gradients.

    Parameters
    ----------
    inputs
        As in :func:`forward`.
    grad
        Gradient with respect to the layer's output, (S, N, H).
    out, v, mean, invstd
        As returned by :func:`forward`.
    wanted
        What to differentiate: names of fields of ``inputs``, and ``"categories.k"`` for the soft
        matrix ``k``.

    Returns
    -------
    dict
        Gradient by name.
    """
    if grad.numel() == 0:  # no cells: torch's batch norm would divide by their number
        return {name: torch.zeros_like(inputs.named(name)) for name in wanted}
    grads: dict[str, Tensor] = {}
    v = v if v.numel() else out
    # relu and identity are differentiated from their output; the others from their input.
    a = out
    from_input = inputs.activation not in ("identity", "relu")
    if inputs.use_layer_norm or from_input:
        normalised = v
        if inputs.use_batch_norm:
            normalised = _normalise(inputs, v, mean, invstd)
        a = normalised if from_input else out
        if inputs.use_layer_norm:
            shape = list(v.shape[-1:])
            ln_out, ln_mean, ln_rstd = torch.native_layer_norm(
                normalised, shape, None, None, inputs.layer_norm_eps
            )
            a = ln_out if from_input else out
    grad = _activate_backward(inputs.activation, inputs.activation_parameter, grad, a)
    if inputs.use_layer_norm:
        grad = torch.ops.aten.native_layer_norm_backward(
            grad, normalised, shape, ln_mean, ln_rstd, None, None, [True, False, False]
        )[0]
    if inputs.use_batch_norm:
        grad, d_weight, d_bias = _batch_norm_backward(inputs, grad, v, mean, invstd, wanted)
        if d_weight is not None and d_bias is not None:
            grads["batch_norm_weight"], grads["batch_norm_bias"] = d_weight, d_bias

    n_in = inputs.x.shape[-1]
    flat = grad.flatten(0, 1)
    if "x" in wanted:
        grads["x"] = (flat @ inputs.weight[:, :n_in]).view_as(inputs.x)
    if "bias" in wanted:
        grads["bias"] = flat.sum(0)
    columns = _columns(inputs)
    # Every sample of a cell shares its covariates.
    by_cell = grad[0] if grad.shape[0] == 1 or not columns else grad.sum(0)
    if "weight" in wanted:
        d_weight = torch.empty_like(inputs.weight)
        torch.mm(flat.t(), inputs.x.flatten(0, 1), out=d_weight[:, :n_in])
        for category, cols in columns:
            if category.is_floating_point():
                torch.mm(by_cell.t(), category, out=d_weight[:, cols])
            else:
                n_cat = cols.stop - cols.start
                # A sum by segments: embedding's backward is deterministic on every device.
                d_weight[:, cols] = torch.ops.aten.embedding_dense_backward(
                    by_cell, category, n_cat, -1, False
                ).t()
        grads["weight"] = d_weight
    for k, (_, cols) in enumerate(columns):
        if f"categories.{k}" in wanted:
            grads[f"categories.{k}"] = by_cell @ inputs.weight[:, cols]
    return grads
