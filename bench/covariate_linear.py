"""``covariate_linear`` (hidden layers with covariates) against scvi-tools' one-hot products."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder_fast import FCLayers

from . import stock
from .case import Case, Random, in_float64, layer_options
from .shapes import Shape


def case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """All hidden layers of one decoder."""
    torch.manual_seed(seed)
    layers = FCLayers(shape.latent, shape.hidden, dropout_rate=0.0, **layer_options(shape))
    layers.to(device).train(shape.training)
    random = Random(device, seed)
    z = random.latent(shape, shape.latent).requires_grad_(shape.training)
    batch = random.labels(shape.cells, shape.batches)
    upstream = (random.latent(shape, shape.hidden),)

    def truth() -> list[Tensor]:
        copied, z64 = in_float64(layers), z.detach().double().requires_grad_()
        out = stock.hidden_layers(copied, z64, batch)
        gradients: tuple[Tensor, ...] = ()
        if shape.training:
            gradients = torch.autograd.grad(out, [z64, *copied.parameters()], upstream[0].double())
        return [out.detach(), *gradients]

    def plain() -> tuple[Tensor, ...]:
        return (stock.hidden_layers(layers, z, batch),)

    return Case(
        leaves={"z": z, **dict(layers.named_parameters())},
        upstream=upstream,
        eager=plain,
        graph=plain,
        ours={"ours": lambda: (layers(z, batch),)},
        truth=truth,
        training=shape.training,
    )
