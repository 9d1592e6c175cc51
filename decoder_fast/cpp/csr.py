"""Checks of CSR on CPUs, by the native library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

from torch import Tensor

from .. import native


@functools.cache
def _csr_form() -> Callable[..., int]:
    function = native.load().decoder_fast_csr_form
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int64]
    return function  # type: ignore[no-any-return]


def canonical_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Take a ``torch.sparse_csr`` matrix (N, G) apart, if it is in canonical order.

    Returns
    -------
    tuple of Tensor or None
        Row pointers, columns and values; None where :func:`canonical_csr` has to sort, or to
        refuse, the matrix.
    """
    # Detached: torch.compile does not bear a view of a sparse tensor.
    crow, col, values = x.crow_indices(), x.col_indices(), x.values().detach()
    if crow.numel() != x.shape[0] + 1 or values.shape != col.shape:
        return None
    crow, col = crow.contiguous(), col.contiguous()
    form = _csr_form()(
        crow.data_ptr(), col.data_ptr(), crow.element_size(), *x.shape, col.numel()
    )
    return None if form else (crow, col, values)
