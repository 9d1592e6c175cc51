"""What scvi-tools computes, in plain PyTorch: to compare with where scvi-tools is not installed.

In float64 it is also the truth that results are held against. Where scvi-tools is installed,
:func:`checked_loss` takes its distributions: their checks of values are part of what users wait
for.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder_fast import DecoderSCVI, FCLayers

_EPS = 1e-8


def installed() -> str | None:
    """Version of scvi-tools, or None."""
    try:
        return version("scvi-tools")
    except PackageNotFoundError:
        return None


def hidden_layers(layers: FCLayers, x: Tensor, batch: Tensor) -> Tensor:
    """Hidden layers, one module after another, with one-hot matrices of one covariate."""
    (n_batches,) = layers.n_cat_list
    one_hot = F.one_hot(batch.squeeze(-1), n_batches) if n_batches else None
    if one_hot is not None and x.dim() == 3:
        one_hot = one_hot.expand(x.shape[0], *one_hot.shape)
    for i, layer in enumerate(layers.fc_layers):
        for part in layer:  # type: ignore[attr-defined]
            if isinstance(part, nn.Linear) and one_hot is not None and layers.inject_into_layer(i):
                x = torch.cat((x, one_hot), -1)
            if isinstance(part, nn.BatchNorm1d) and x.dim() == 3:
                x = torch.stack([part(sample) for sample in x])
            elif part is not None:
                x = part(x)
    return x


def decode(
    decoder: DecoderSCVI, z: Tensor, library: Tensor, batch: Tensor
) -> tuple[Tensor, Tensor]:
    """Rate and dropout logits; the latter are computed whatever the likelihood."""
    hidden = hidden_layers(decoder.px_decoder, z, batch)
    rate = torch.exp(library) * decoder.px_scale_decoder(hidden)
    return rate, decoder.px_dropout_decoder(hidden)


def log_prob(
    likelihood: str, x: Tensor, rate: Tensor, theta: Tensor | None, dropout: Tensor | None
) -> Tensor:
    """Log-likelihood of each element, operation by operation as scvi-tools takes them."""
    if likelihood == "poisson":
        return x.xlogy(rate) - rate - torch.lgamma(x + 1)
    assert theta is not None
    log_theta = torch.log(theta + _EPS)
    log_total = torch.log(theta + rate + _EPS)
    gamma = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    of_count = x * (torch.log(rate + _EPS) - log_total) + gamma
    of_zero = theta * (log_theta - log_total)
    if likelihood == "nb":
        return of_zero + of_count
    assert dropout is not None
    normaliser = F.softplus(-dropout)
    shifted = of_zero - dropout
    at_zero = (x < _EPS) * (F.softplus(shifted) - normaliser)
    return at_zero + (x > _EPS) * (shifted - normaliser + of_count)


def loss(
    likelihood: str, x: Tensor, rate: Tensor, theta: Tensor | None, dropout: Tensor | None
) -> Tensor:
    """Negative log-likelihood of each cell, as one graph: without scvi-tools' checks."""
    return -log_prob(likelihood, x, rate, theta, dropout).sum(-1)


def checked_loss(
    likelihood: str, x: Tensor, rate: Tensor, theta: Tensor | None, dropout: Tensor | None
) -> Tensor:
    """The same by scvi-tools' distributions, where they are installed."""
    if installed() is None:
        return loss(likelihood, x, rate, theta, dropout)
    from scvi import distributions

    if likelihood == "poisson":
        px = distributions.Poisson(rate=rate)
    elif likelihood == "nb":
        px = distributions.NegativeBinomial(mu=rate, theta=theta)
    else:
        px = distributions.ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout)
    return -px.log_prob(x).sum(-1)
