"""Distributions of lazy parameters: scvi-tools' own, their summed likelihood fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scvi import distributions as scvi_distributions
from torch import Tensor

from .decoder import Decoded, LazyOutput
from .lazy import LazyExp, LazyExpanded, LazyRows, LazyTensor, real, summed_dim, version


def _dispersion(theta: Tensor) -> dict[str, Any] | None:
    """Trace ``theta = exp(px_r)`` to the arguments of ``_hidden_loss``; None if it cannot be."""
    while isinstance(theta, LazyExpanded) and not theta.changed():
        theta = theta.source
    if isinstance(theta, LazyExp):
        px_r = theta.source
        if theta.changed() or px_r.changed():
            return None
        if isinstance(px_r, LazyRows) and px_r.labels.dim() == 1:
            return {"dispersion": "gene-batch", "px_r": px_r.table, "px_r_index": px_r.labels}
        if isinstance(px_r, LazyOutput) and px_r.output == "px_r":
            return {"dispersion": "gene-cell", "px_r": None, "px_r_index": None}
        return None
    if theta.dim() == 1 and not isinstance(theta, LazyTensor):
        return {"dispersion": "gene", "px_r": theta.log(), "px_r_index": None}
    return None


def _traced(
    likelihood: str, mean: Any, theta: Any, zi_logits: Any
) -> tuple[Decoded, dict[str, Any]] | None:
    """Trace lazy parameters to what the decoder computed, and to the arguments of ``_hidden_loss``.

    None if they cannot be traced back.
    """
    if not isinstance(mean, LazyOutput) or mean.output != "px_rate":
        return None
    if any(isinstance(t, LazyTensor) and t.changed() for t in (mean, theta, zi_logits)):
        return None
    decoded = mean.decoded
    if likelihood == "zinb" and not (
        isinstance(zi_logits, LazyOutput)
        and zi_logits.output == "px_dropout"
        and zi_logits.decoded.decoder is decoded.decoder
        and zi_logits.decoded.hidden.data_ptr() == decoded.hidden.data_ptr()
    ):
        return None
    if likelihood == "poisson":
        return decoded, {"dispersion": "gene", "px_r": None, "px_r_index": None}
    dispersion = _dispersion(theta)
    return None if dispersion is None else (decoded, dispersion)


def _counts(x: Tensor) -> Tensor | None:
    """Return the counts as CSR if it is at hand; None if ``_hidden_loss`` does not take them."""
    csr: Tensor | None = getattr(x, "csr", None)
    if isinstance(x, LazyTensor):
        unchanged = not x.changed()
    else:
        unchanged = csr is not None and version(x) == x.version and not x.requires_grad  # type: ignore[attr-defined]
    if csr is not None and unchanged:
        return csr
    x = real(x)
    return None if x.requires_grad or x.dtype == torch.bool else x


def reconstruction_loss(
    x: Tensor, likelihood: str, mean: Any, theta: Any, zi_logits: Any
) -> Tensor | None:
    """Compute the loss of each cell from lazy parameters; None if they cannot be traced back."""
    traced = _traced(likelihood, mean, theta, zi_logits)
    if traced is None or x.dim() != 2 or x.shape != mean.shape[-2:]:
        return None
    decoded, dispersion = traced
    counts = _counts(x)
    if counts is None or torch.promote_types(counts.dtype, mean.dtype) != mean.dtype:
        return None  # of float64 counts scvi-tools makes a loss in float64
    return decoded.decoder._hidden_loss(
        counts, decoded.hidden, decoded.library, likelihood=likelihood, **dispersion
    )


class CellsLikelihood:
    """Likelihood of one cell's counts given each of many decoded cells, scaled to its library size.

    For scvi-tools' ``get_importance_weights``, in the place of the (zero-inflated) negative
    binomial of all decoded cells: it sets ``mu = scale * library size`` for one cell of counts
    after the other, and sums ``log_prob`` over genes. Of decoded cells hidden units are kept alone.
    """

    scale = 1.0

    def __init__(
        self, likelihood: str, decoded: list[Decoded], dispersions: list[dict[str, Any]]
    ) -> None:
        self.likelihood = likelihood
        self.decoder = decoded[0].decoder
        self.dispersion = dispersions[0]
        self.mu = torch.ones(1)
        hidden = torch.cat([d.hidden for d in decoded], -2)
        self.shape = hidden.shape[:-1]  # (cells,) or (samples, cells)
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        if self.dispersion["px_r_index"] is None:
            self.parts = [(slice(None), rows, self.dispersion["px_r"])]
        else:
            labels = torch.cat([d["px_r_index"] for d in dispersions])
            labels = labels.expand(self.shape).reshape(-1)
            self.parts = [
                (labels == label, rows[labels == label], self.dispersion["px_r"][:, label])
                for label in labels.unique()
            ]

    @classmethod
    def of(cls, distributions: list[Any]) -> CellsLikelihood | None:
        """Make one from mini-batches' distributions; None if they cannot be traced back."""
        decoded, dispersions = [], []
        for px in distributions:
            traced = (
                _traced(px.likelihood, *px._parameters())
                if isinstance(px, _FusedDistribution)
                else None
            )
            if traced is None or px.likelihood not in ("nb", "zinb"):
                return None
            decoded.append(traced[0])
            dispersions.append(traced[1])
        return cls(distributions[0].likelihood, decoded, dispersions) if decoded else None

    def __deepcopy__(self, memo: Any) -> CellsLikelihood:
        return self  # scvi-tools copies it to the model's device, where it is already

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of counts (1, G) given each cell, (..., cells, 1): summed over genes."""
        out = self.parts[0][1].new_empty(self.shape.numel())
        dispersion = self.dispersion["dispersion"]
        for where, hidden, px_r in self.parts:
            out[where] = self.decoder._hidden_loss(
                getattr(x, "csr", x),
                hidden,
                self.mu.log().reshape(1, 1, 1),
                likelihood=self.likelihood,
                dispersion="gene-cell" if dispersion == "gene-cell" else "gene",
                px_r=px_r,
                px_r_index=None,
            ).squeeze(-1)
        return out.neg_().reshape(*self.shape, 1)


class LazyLogProb(LazyTensor):
    """Log-likelihood of each element; its sum over genes is one fused operation."""

    distribution: Any
    x: Tensor
    fused: Callable[[], Tensor]

    def compute(self) -> Tensor:
        """Compute the values."""
        return self.distribution.elementwise_log_prob(self.x)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Sum over genes by the fused operation."""
        if summed_dim(func, args, kwargs) != self.dim() - 1:
            return NotImplemented
        return -self.fused()


class _Parameter:
    """A parameter of a distribution that may be lazy, and that nobody outside sees lazy."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            return real(instance.__dict__[self.name])
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


class _FusedDistribution:
    """What the distributions of a fused module share."""

    likelihood: str
    _names: tuple[str, str | None, str | None]  # of mean, theta and dropout logits
    _normalized = "scale"

    def get_normalized(self, key: str) -> Tensor:
        """Expression, normalised or not; lazy, so that of the genes asked for alone is computed."""
        name = {"mu": self._names[0], "scale": self._normalized}.get(key)
        return super().get_normalized(key) if name is None else self.__dict__[name]  # type: ignore[misc]

    def _parameters(self) -> tuple[Any, Any, Any]:
        """Mean, theta and dropout logits as they are, lazy or not."""
        mean, theta, zi_logits = (None if n is None else vars(self).get(n) for n in self._names)
        return mean, theta, zi_logits

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of each element, computed only if more than its sum is asked for."""
        mean, theta, zi_logits = self._parameters()
        if not isinstance(mean, LazyOutput) or value.shape != mean.shape[-2:]:
            return self.elementwise_log_prob(value)

        def fused() -> Tensor:
            loss = reconstruction_loss(value, self.likelihood, mean, theta, zi_logits)
            return -self.elementwise_log_prob(value).sum(-1) if loss is None else loss

        return LazyLogProb(
            tuple(mean.shape), mean.dtype, mean.device, distribution=self, x=value, fused=fused
        )

    def elementwise_log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of each element as scvi-tools computes it."""
        if value.layout != torch.strided:
            value = value.to_dense()
        return super().log_prob(value)  # type: ignore[misc]


class FusedNegativeBinomial(_FusedDistribution, scvi_distributions.NegativeBinomial):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "nb"
    _names = ("mu", "theta", None)
    mu, theta, scale = _Parameter(), _Parameter(), _Parameter()


class FusedZeroInflatedNegativeBinomial(
    _FusedDistribution, scvi_distributions.ZeroInflatedNegativeBinomial
):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "zinb"
    _names = ("mu", "theta", "zi_logits")
    mu, theta, scale, zi_logits = _Parameter(), _Parameter(), _Parameter(), _Parameter()


class FusedPoisson(_FusedDistribution, scvi_distributions.Poisson):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "poisson"
    _names = ("rate", None, None)
    rate, scale = _Parameter(), _Parameter()


class FusedNormal(_FusedDistribution, scvi_distributions.Normal):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "normal"
    _names = ("loc", "scale", None)
    _normalized = "normal_mu"
    loc, scale, normal_mu = _Parameter(), _Parameter(), _Parameter()


_FUSED_DISTRIBUTIONS: dict[type, type] = {
    scvi_distributions.NegativeBinomial: FusedNegativeBinomial,
    scvi_distributions.ZeroInflatedNegativeBinomial: FusedZeroInflatedNegativeBinomial,
    scvi_distributions.Poisson: FusedPoisson,
    scvi_distributions.Normal: FusedNormal,
}


def fuse_distributions(outputs: Any) -> Any:
    """Give the distributions among a generative model's outputs their fused class, in place."""
    if isinstance(outputs, dict):
        for value in outputs.values():
            fused_class = _FUSED_DISTRIBUTIONS.get(type(value))
            if fused_class is not None and any(
                isinstance(v, LazyTensor) for v in value.__dict__.values()
            ):
                value.__class__ = fused_class
    return outputs
