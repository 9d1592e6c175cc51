"""``softmax_library`` against softmax and a product, as scvi-tools' decoder takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder_fast.functional import softmax_library

from .case import Case, Random, blocks
from .shapes import Shape


def case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """Logits and library to px_scale and px_rate."""
    random = Random(device, seed)
    logits = random.latent(shape, shape.genes).requires_grad_()
    library = random.library(shape)
    upstream = (random.latent(shape, shape.genes), random.latent(shape, shape.genes))

    def plain(logits: Tensor = logits, library: Tensor = library) -> tuple[Tensor, Tensor]:
        scale = torch.softmax(logits, -1)
        return scale, torch.exp(library) * scale

    def truth() -> list[Tensor]:
        parts: list[list[Tensor]] = []
        for cells in blocks(shape):
            a = logits.detach()[..., cells, :].double().requires_grad_()
            outputs = plain(a, library[cells].double())
            gradients = ()
            if shape.training:
                up = [u[..., cells, :].double() for u in upstream]
                gradients = torch.autograd.grad(outputs, [a], up)
            # in float32, whose rounding is far below any tolerance here: float64 would not fit
            parts.append([t.detach().float() for t in (*outputs, *gradients)])
        return [torch.cat(part, -2) for part in zip(*parts, strict=True)]

    return Case(
        leaves={"logits": logits},
        upstream=upstream,
        eager=plain,
        graph=plain,
        ours={"ours": lambda: softmax_library(logits, library)},
        truth=truth,
        training=shape.training,
    )
