"""``csr_linear``: a linear map of sparse rows, such as the first of an encoder of counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from ._common import (
    canonical_csr,
    cast,
    check_floating,
    check_shape,
    check_tensors,
    check_together,
    compute_dtype,
    no_autocast,
    once_differentiable,
)

__all__ = ["csr_linear"]


class _CsrLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(crow, col, values, weight)
        ctx.backend = backend
        with no_autocast(weight.device):
            run = implementation("csr_linear", backend).forward
            out: Tensor = run(crow, col, values, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        crow, col, values, weight = ctx.saved_tensors
        d_weight = d_bias = None
        if ctx.needs_input_grad[3]:
            with no_autocast(weight.device):
                run = implementation("csr_linear", ctx.backend).backward
                d_weight = run(grad, crow, col, values, weight.shape[1])
        if ctx.needs_input_grad[4]:
            d_bias = grad.sum(0)
        return None, None, None, d_weight, d_bias, None


def csr_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Linear map of a sparse matrix: ``x @ weight.T + bias``, reading only the non-zeros of ``x``.

    What ``torch.nn.functional.linear(x.to_dense(), weight, bias)`` computes: the first layer of an
    encoder of counts, forward and backward, without a dense mini-batch. It multiplies no zeros, so
    an infinite weight meets none.

    Parameters
    ----------
    x
        (N, K), layout ``torch.sparse_csr``, any real dtype. Columns that are out of order are
        sorted, duplicates are summed. Not differentiated.
    weight
        (H, K), floating point.
    bias
        (H,), floating point, or None.
    backend
        ``"auto"``, or the one implementation to take: ``"cpp"`` or ``"torch"``, which makes ``x``
        dense. On a GPU that is what pays, so there is no Triton kernel.

    Returns
    -------
    Tensor
        (N, H), float32 (float64 if ``weight``, ``bias`` or the values are). Differentiable once, in
        ``weight`` and ``bias``.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, indices of ``x`` do not fit its shape, ``x`` requires grad,
        or ``backend`` is unknown.
    TypeError
        If ``x`` is not in CSR, or a dtype is not as above.
    RuntimeError
        If ``backend`` names one that cannot run here; the message says why.
    MemoryError
        If a kernel for CPUs gets no memory to work in.
    """
    check_tensors(x=x, weight=weight, bias=bias)
    if x.layout != torch.sparse_csr:
        raise TypeError(
            f"x has layout {x.layout}, expected torch.sparse_csr: use "
            "torch.nn.functional.linear for dense matrices, or x.to_sparse_csr()"
        )
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"x has dtype {x.dtype}, expected a real dtype")
    if x.requires_grad:
        raise ValueError("x requires grad, but is not differentiable here: pass x.detach()")
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (cells, "
            "genes) and (hidden units, genes)"
        )
    check_floating(weight=weight, bias=bias)
    check_together("x", x, weight=weight, bias=bias)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "(hidden units, columns of x)")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "one number a hidden unit")
    dtype = compute_dtype(weight, bias, x if x.is_floating_point() else None)
    chosen = choose("csr_linear", backend, device=weight.device, dtype=dtype).backend
    crow, col, values = canonical_csr(x, chosen)
    args = (crow, col, *(cast(t, dtype) for t in (values, weight, bias)), chosen)
    out: Tensor = _CsrLinear.apply(*args)
    return out
