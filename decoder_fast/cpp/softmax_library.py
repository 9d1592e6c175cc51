"""``softmax_library`` on CPUs: hands the tensors to the kernel in ``csrc``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..reference import softmax_library as reference
from ._common import ACTIVATIONS


class _SoftmaxLibrary(ctypes.Structure):
    """``decoder_fast::SoftmaxLibrary`` of ``csrc/softmax_library.h``, field by field."""

    _fields_ = (
        [(name, c_int64) for name in ("n_rows", "n_genes")]
        + [(name, c_int32) for name in ("activation", "n_threads")]
        + [
            (name, c_void_p)
            for name in (
                "logits",
                "library",
                "scale",
                "rate",
                "grad_scale",
                "grad_rate",
                "d_logits",
                "d_library",
            )
        ]
    )


@functools.cache
def _kernels() -> list[Callable[..., None]]:
    results = {"softmax_library": None, "softmax_library_backward": None}
    return native.functions("softmax_library", [_SoftmaxLibrary], results)


def _arguments(rows: Tensor, scale_activation: str, **tensors: Tensor | None) -> _SoftmaxLibrary:
    return _SoftmaxLibrary(
        n_rows=rows.shape[:-1].numel(),
        n_genes=rows.shape[-1],
        activation=ACTIVATIONS[scale_activation],
        n_threads=torch.get_num_threads(),
        **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
    )


def _by_row(library: Tensor, rows: Tensor) -> Tensor:
    return library.expand(*rows.shape[:-1], 1).contiguous()


def forward(
    logits: Tensor,
    library: Tensor,
    scale_activation: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`decoder_fast.reference.softmax_library.forward` computes."""
    if weight is not None:
        logits = F.linear(logits, weight, bias)
    if logits.numel() == 0:
        return reference.forward(logits, library, scale_activation)
    logits, by_row = logits.contiguous(), _by_row(library, logits)
    scale, rate = torch.empty_like(logits), torch.empty_like(logits)
    _kernels()[0](
        _arguments(
            logits, scale_activation, logits=logits, library=by_row, scale=scale, rate=rate
        )
    )
    return scale, rate


def backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    logits_wanted: bool,
    library_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute what :func:`decoder_fast.reference.softmax_library.backward` computes."""
    if scale.numel() == 0 or (grad_scale is None and grad_rate is None):
        return reference.backward(
            grad_scale,
            grad_rate,
            scale,
            library,
            scale_activation,
            logits_wanted,
            library_wanted,
        )
    grad_scale, grad_rate = (
        None if g is None else g.to(scale.dtype).contiguous() for g in (grad_scale, grad_rate)
    )
    scale, by_row = scale.contiguous(), _by_row(library, scale)
    d_logits = torch.empty_like(scale) if logits_wanted else None
    d_library = torch.empty_like(by_row) if library_wanted else None
    _kernels()[1](
        _arguments(
            scale,
            scale_activation,
            library=by_row,
            scale=scale,
            grad_scale=grad_scale,
            grad_rate=grad_rate,
            d_logits=d_logits,
            d_library=d_library,
        )
    )
    if d_library is not None:
        d_library = d_library.sum_to_size(library.shape)
    return d_logits, d_library
