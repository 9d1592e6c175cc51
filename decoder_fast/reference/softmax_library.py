"""Logits, or hidden units, and library size to ``(px_scale, px_rate)``, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits of a tile of :func:`log_sum_exp`, on a CPU and elsewhere.
_TILE = {"cpu": 1 << 20}
_LARGE_TILE = 1 << 26


def forward(
    logits: Tensor,
    library: Tensor,
    scale_activation: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``px_scale`` and ``px_rate = exp(library) * px_scale``.

    Parameters
    ----------
    logits
        (..., G); with ``weight``, hidden units (..., H).
    library
        Log library size, (..., 1), of as many dimensions as ``logits``.
    scale_activation
        ``"softmax"`` or ``"softplus"``.
    weight, bias
        (G, H) and (G,): the head that makes logits of hidden units.
    """
    if weight is not None:
        logits = F.linear(logits, weight, bias)
    if scale_activation == "softmax":
        scale = torch.softmax(logits, -1)
    else:
        scale = F.softplus(logits)
    return scale, torch.exp(library) * scale


def backward(
    grad_scale: Tensor | None,
    grad_rate: Tensor | None,
    scale: Tensor,
    library: Tensor,
    scale_activation: str,
    logits_wanted: bool,
    library_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to logits and library, from those of either or both outputs."""
    size = torch.exp(library)
    d_library = d_logits = None
    if library_wanted:
        if grad_rate is None:
            d_library = torch.zeros_like(library)
        else:
            d_library = (grad_rate * scale).sum(-1, keepdim=True) * size
            d_library = d_library.sum_to_size(library.shape)
    if logits_wanted:
        grad = grad_scale
        if grad_rate is not None:
            grad = grad_rate * size if grad is None else torch.addcmul(grad, grad_rate, size)
        if grad is None:
            d_logits = torch.zeros_like(scale)
        elif scale_activation == "softmax":
            d_logits = torch._softmax_backward_data(grad, scale, -1, scale.dtype)
        else:
            d_logits = grad * -torch.expm1(-scale)  # sigmoid(a) = 1 - exp(-softplus(a))
    return d_logits, d_library


def log_sum_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``logsumexp(hidden @ weight.T + bias, -1)``, (N,), from tiles of rows."""
    out = hidden.new_empty(hidden.shape[0])
    rows = max(1, _TILE.get(hidden.device.type, _LARGE_TILE) // max(1, weight.shape[0]))
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        torch.logsumexp(F.linear(hidden[part], weight, bias), -1, out=out[part])
    return out
