"""``csr_linear`` (the encoder's first layer on CSR counts) against a product of dense ones."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder_fast.functional import csr_linear

from .case import Case, Random, csr_of
from .shapes import Shape


def case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """``log1p`` of the counts to hidden units; each begins with counts as its loader has them."""
    random = Random(device, seed)
    x = random.counts(shape.cells, shape.genes)
    csr = csr_of(x)
    weight = random.normal(shape.hidden, shape.genes, scale=0.05).requires_grad_(shape.training)
    bias = random.normal(shape.hidden).requires_grad_(shape.training)
    upstream = (random.normal(shape.cells, shape.hidden),)

    def plain() -> tuple[Tensor, ...]:
        return (torch.nn.functional.linear(torch.log1p(x), weight, bias),)

    def ours() -> tuple[Tensor, ...]:
        parts = csr.crow_indices(), csr.col_indices(), csr.values().log1p()
        return (csr_linear(torch.sparse_csr_tensor(*parts, size=csr.shape), weight, bias),)

    def truth() -> list[Tensor]:
        wide = torch.log1p(x.double())
        out = wide @ weight.detach().double().t() + bias.detach().double()
        grad = upstream[0].double()
        return [out, *([grad.t() @ wide, grad.sum(0)] if shape.training else [])]

    return Case(
        leaves={"weight": weight, "bias": bias},
        upstream=upstream,
        eager=plain,
        graph=plain,
        ours={"ours": ours},
        truth=truth,
        training=shape.training,
    )
