"""``csr_linear`` on CPUs: hands the tensors to the kernel in ``csrc``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .. import native
from ..reference import csr_linear as reference
from ._common import check_memory


class _CsrLinear(ctypes.Structure):
    """``decoder_fast::CsrLinear`` of ``csrc/csr_linear.h``, field by field."""

    _fields_ = (
        [(name, c_int64) for name in ("n_rows", "n_columns", "n_out", "weight_stride")]
        + [(name, c_int32) for name in ("index_bytes", "n_threads")]
        + [(name, c_void_p) for name in ("crow", "col", "values", "weight", "bias", "out")]
        + [(name, c_void_p) for name in ("grad_out", "d_weight")]
    )


@functools.cache
def _kernels() -> list[Callable[..., int]]:
    results = {"csr_linear": c_int32, "csr_linear_backward": c_int32}
    return native.functions("csr_linear", [_CsrLinear], results)


def _run(
    kernel: Callable[..., int],
    n_columns: int,
    n_out: int,
    weight_stride: int = 0,
    **tensors: Tensor | None,
) -> None:
    crow = tensors["crow"]
    assert crow is not None
    status = kernel(
        _CsrLinear(
            n_rows=crow.numel() - 1,
            n_columns=n_columns,
            n_out=n_out,
            weight_stride=weight_stride,
            index_bytes=crow.element_size(),
            n_threads=torch.get_num_threads(),
            **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
        )
    )
    check_memory(status, "csr_linear")


def forward(
    crow: Tensor, col: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute what :func:`decoder_fast.reference.csr_linear.forward` computes."""
    shape = (crow.numel() - 1, weight.shape[0])
    if 0 in shape or weight.shape[1] == 0:
        return reference.forward(crow, col, values, weight, bias)
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        weight = weight.contiguous()
    out = weight.new_empty(shape)
    _run(
        _kernels()[0],
        weight.shape[1],
        weight.shape[0],
        weight.stride(0),
        crow=crow,
        col=col,
        values=values,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        out=out,
    )
    return out


def backward(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, n_columns: int
) -> Tensor:
    """Compute what :func:`decoder_fast.reference.csr_linear.backward` computes."""
    if grad.numel() == 0 or n_columns == 0:
        return reference.backward(grad, crow, col, values, n_columns)
    d_weight = grad.new_empty(grad.shape[1], n_columns)
    _run(
        _kernels()[1],
        n_columns,
        grad.shape[1],
        crow=crow,
        col=col,
        values=values,
        grad_out=grad.contiguous(),
        d_weight=d_weight,
    )
    return d_weight
