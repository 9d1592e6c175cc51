"""``covariate_linear`` on CPUs: hands the tensors to the kernel in ``csrc``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..reference.covariate_linear import ACTIVATIONS, Inputs
from ._common import BAD_LABEL, check_memory

_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_NO_BATCH_NORM, _BATCH_STATISTICS, _RUNNING_STATISTICS = 0, 1, 2


class LabelError(ValueError):
    """A label is out of range: the caller knows how to say which."""


class _Covariate(ctypes.Structure):
    """``decoder_fast::Covariate`` of ``csrc/covariate_linear.h``, field by field."""

    _fields_ = (
        ("n_categories", c_int64),
        ("labels", c_void_p),
        ("matrix", c_void_p),
        ("d_matrix", c_void_p),
    )


class _CovariateLinear(ctypes.Structure):
    """``decoder_fast::CovariateLinear`` of ``csrc/covariate_linear.h``, field by field."""

    _fields_ = (
        [
            (name, c_int64)
            for name in ("n_samples", "n_cells", "n_in", "n_hidden", "n_covariates")
        ]
        + [(name, c_int32) for name in ("activation", "batch_norm", "layer_norm", "n_threads")]
        + [
            (name, c_double)
            for name in ("activation_parameter", "batch_norm_eps", "layer_norm_eps", "momentum")
        ]
        + [
            (name, c_void_p)
            for name in (
                "covariates",
                "x",
                "weight",
                "bias",
                "batch_norm_weight",
                "batch_norm_bias",
                "running_mean",
                "running_var",
                "moved_mean",
                "moved_var",
                "out",
                "linear",
                "mean",
                "invstd",
                "grad",
                "d_x",
                "d_weight",
                "d_bias",
                "d_batch_norm_weight",
                "d_batch_norm_bias",
            )
        ]
    )


class _Kernels(NamedTuple):
    forward: Any
    backward: Any
    update_running: Any


@functools.cache
def _kernels() -> _Kernels:
    results = {
        "covariate_linear": c_int32,
        "covariate_linear_backward": c_int32,
        "update_running": None,
    }
    return _Kernels(
        *native.functions("covariate_linear", [_CovariateLinear, _Covariate], results)
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(
    kernel: Callable[..., int],
    inputs: Inputs,
    outputs: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...] = (),
    matrices: dict[int, Tensor] | None = None,
    moved: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float = 0.0,
) -> None:
    """Call a kernel with tensors in the order of the structure's fields."""
    n_samples, n_cells, n_in = inputs.x.shape
    keep = [  # alive until the kernel has returned
        None if t is None else t.contiguous()
        for t in (
            inputs.x,
            inputs.weight,
            inputs.bias,
            inputs.batch_norm_weight,
            inputs.batch_norm_bias,
            inputs.running_mean,
            inputs.running_var,
        )
    ]
    categories = [category.contiguous() for category in inputs.categories]
    covariates = (_Covariate * len(categories))()
    for k, (category, n_cat) in enumerate(zip(categories, inputs.n_cats, strict=True)):
        covariate = covariates[k]
        covariate.n_categories = n_cat
        if category.is_floating_point():
            covariate.matrix = category.data_ptr()
            covariate.d_matrix = _pointer(matrices.get(k)) if matrices else None
        else:
            covariate.labels = category.data_ptr()
    batch_norm = _NO_BATCH_NORM
    if inputs.use_batch_norm:
        batch_norm = _BATCH_STATISTICS if inputs.batch_statistics else _RUNNING_STATISTICS
    status = kernel(
        _CovariateLinear(
            n_samples,
            n_cells,
            n_in,
            inputs.weight.shape[0],
            len(categories),
            _ACTIVATIONS[inputs.activation],
            batch_norm,
            inputs.use_layer_norm,
            torch.get_num_threads(),
            inputs.activation_parameter,
            inputs.batch_norm_eps,
            inputs.layer_norm_eps,
            momentum,
            ctypes.addressof(covariates),
            *map(_pointer, (*keep, *moved, *outputs, *gradients)),
        )
    )
    check_memory(status, "covariate_linear")
    if status == BAD_LABEL:
        raise LabelError


def forward(
    inputs: Inputs, moved: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what :func:`decoder_fast.reference.covariate_linear.forward` computes.

    Running statistics ``moved``, contiguous float32, take a step of ``momentum`` in place.

    Raises
    ------
    LabelError
        If a label is out of range.
    """
    n_samples, n_cells, _ = inputs.x.shape
    n_hidden = inputs.weight.shape[0]
    n_statistics = 0
    if inputs.use_batch_norm:
        n_statistics = n_samples if inputs.batch_statistics else 1
    out = inputs.x.new_empty((n_samples, n_cells, n_hidden))
    v = torch.empty_like(out) if inputs.keeps_linear else out.new_empty(0)
    shape = (n_statistics, n_hidden) if n_statistics else (0,)
    mean, invstd = out.new_empty(shape), out.new_empty(shape)
    outputs = (out, v, mean, invstd)
    _run(_kernels().forward, inputs, outputs, moved=moved or (None, None), momentum=momentum)
    return out, v, mean, invstd


def backward(
    inputs: Inputs,
    grad: Tensor,
    out: Tensor,
    v: Tensor,
    mean: Tensor,
    invstd: Tensor,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Compute what :func:`decoder_fast.reference.covariate_linear.backward` computes."""
    grads = {
        name: torch.empty_like(inputs.named(name), memory_format=torch.contiguous_format)
        for name in wanted
    }
    matrices = {
        k: grads[name]
        for k in range(len(inputs.categories))
        if (name := f"categories.{k}") in grads
    }
    _run(
        _kernels().backward,
        inputs,
        (out.contiguous(), v.contiguous(), mean.contiguous(), invstd.contiguous()),
        (
            grad.contiguous(),
            *map(grads.get, ("x", "weight", "bias", "batch_norm_weight", "batch_norm_bias")),
        ),
        matrices,
    )
    return grads


def update_running(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    n_cells: int,
) -> None:
    """Move contiguous running statistics (H,) once for each sample, in place."""
    n_samples, n_hidden = mean.shape
    _kernels().update_running(
        _CovariateLinear(
            n_samples=n_samples,
            n_cells=n_cells,
            n_hidden=n_hidden,
            momentum=momentum,
            batch_norm_eps=eps,
            mean=mean.data_ptr(),
            invstd=invstd.data_ptr(),
            moved_mean=running[0].data_ptr(),
            moved_var=running[1].data_ptr(),
        )
    )
