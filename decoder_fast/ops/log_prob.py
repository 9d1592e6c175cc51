"""Elementwise count log-likelihoods, for models that have their own means.

What scvi-tools' ``log_nb_positive`` and ``log_zinb_positive`` and torch's Poisson compute, accurate
also where those are not: float32 at large inverse dispersions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.counts import Counts
from ..reference.log_prob import EPS, at_nonzero, at_zero, wide_dtype
from ._common import (
    check_floating,
    check_tensors,
    check_together,
    no_autocast,
    once_differentiable,
)

__all__ = ["nb_log_prob", "poisson_log_prob", "zinb_log_prob"]


def _nonzeros(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of the non-zeros of ``x`` (cells x genes), checked."""
    counts = Counts(x, None, None, None, x.shape[1], signed=False)
    return counts.block(0, x.shape[0], 0, x.shape[1])


def _d_mu(
    likelihood: str, x: Tensor, mu: Tensor, theta: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """Differentiate with respect to the mean itself: finite at ``mu = 0`` where the limit is."""
    if likelihood == "poisson":
        return torch.where(x > 0, (x - mu) / mu, -1)
    assert theta is not None
    # x / (mu + eps) - (x + theta) / t, whose parts cancel where x is close to mu
    d = theta / (theta + eps + mu) * ((x - mu - eps) / (mu + eps))
    return d if weight is None else d * torch.where(x > EPS, 1, weight)


class _LogProb(torch.autograd.Function):
    """Log-likelihood of (cells, genes) elements; all inputs already of one shape and dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        likelihood: str,
        eps: float,
        x: Tensor,
        mu: Tensor,
        theta: Tensor | None,
        d: Tensor | None,
    ) -> Tensor:
        ctx.options = (likelihood, eps)
        ctx.save_for_backward(x, mu, theta, d)
        with no_autocast(mu.device):
            out = at_zero(likelihood, mu, theta, d, eps=eps, gradients=False).log_prob
            assert out is not None
            row, col, counts = _nonzeros(x)
            wide = wide_dtype(x.device)

            def pick(t: Tensor | None) -> Tensor | None:
                return None if t is None else t[row, col].to(wide)

            log_mu = torch.log(mu[row, col].to(wide))
            terms = at_nonzero(
                likelihood,
                counts.to(wide),
                log_mu,
                pick(theta),
                pick(d),
                eps=eps,
                gradients=False,
            )
            assert terms.log_prob is not None
            out[row, col] = terms.log_prob.to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        likelihood, eps = ctx.options
        x, mu, theta, d = ctx.saved_tensors
        _, _, _, mu_wanted, theta_wanted, d_wanted = ctx.needs_input_grad
        d_mu = d_theta = d_dropout = None
        with no_autocast(mu.device):
            zero = at_zero(likelihood, mu, theta, d, eps=eps, log_prob=False)
            if mu_wanted:
                sig_s = None
                if likelihood == "zinb":
                    assert theta is not None and d is not None
                    sig_s = torch.sigmoid(-d - theta * torch.log1p(mu / (theta + eps)))
                d_mu = grad * _d_mu(likelihood, x.to(mu.dtype), mu, theta, sig_s, eps)
            if theta_wanted or d_wanted:
                assert theta is not None
                row, col, counts = _nonzeros(x)
                wide = wide_dtype(x.device)
                terms = at_nonzero(
                    likelihood,
                    counts.to(wide),
                    torch.log(mu[row, col].to(wide)),
                    theta[row, col].to(wide),
                    None if d is None else d[row, col].to(wide),
                    eps=eps,
                    log_prob=False,
                )
                assert zero.d_log_theta is not None and terms.d_log_theta is not None
                zero.d_log_theta[row, col] = terms.d_log_theta.to(mu.dtype)
                d_theta = grad * zero.d_log_theta / theta
                if d is not None:
                    assert zero.d_dropout is not None and terms.d_dropout is not None
                    zero.d_dropout[row, col] = terms.d_dropout.to(mu.dtype)
                    d_dropout = grad * zero.d_dropout
        return None, None, None, d_mu, d_theta, d_dropout


def _log_prob(
    likelihood: str,
    eps: float,
    x: Tensor,
    mu: Tensor,
    theta: Tensor | None = None,
    zi_logits: Tensor | None = None,
) -> Tensor:
    check_tensors(x=x, mu=mu, theta=theta, zi_logits=zi_logits)
    check_floating(mu=mu, theta=theta, zi_logits=zi_logits)
    check_together("mu", mu, x=x, theta=theta, zi_logits=zi_logits)
    if x.dtype == torch.bool or x.dtype.is_complex or x.layout != torch.strided:
        raise TypeError(
            f"x has dtype {x.dtype} and layout {x.layout}, expected dense counts of a real dtype"
        )
    given = [t for t in (mu, theta, zi_logits) if t is not None]
    dtype = torch.promote_types(torch.float32, given[0].dtype)
    for t in given[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    try:
        shape = torch.broadcast_shapes(x.shape, *(t.shape for t in given))
    except RuntimeError:
        raise ValueError(
            "x, mu, theta and zi_logits do not broadcast: their shapes are "
            + ", ".join(str(tuple(t.shape)) for t in (x, *given))
        ) from None
    flat = (-1, shape[-1]) if shape and shape[-1] else (1, -1)

    def prepare(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype).expand(shape).reshape(flat)

    out = _LogProb.apply(
        likelihood,
        eps,
        x.detach().expand(shape).reshape(flat),
        prepare(mu),
        prepare(theta),
        prepare(zi_logits),
    )
    return out.reshape(shape)


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor, eps: float = EPS) -> Tensor:
    """Log-likelihood of counts under a negative binomial, element by element.

    The value of scvi-tools' ``log_nb_positive(x, mu, theta, eps)``, without its float32 errors at
    large ``theta``. The parametrisation by mean and inverse dispersion is that of Lopez et al. 2018
    (Nat Methods 15:1053).

    Parameters
    ----------
    x
        Counts, dense, of any real dtype; non-negative, fractions allowed. Not differentiated.
    mu
        Mean, positive.
    theta
        Inverse dispersion, positive. All three broadcast together.
    eps
        Numerical constant, as in scvi-tools.

    Returns
    -------
    Tensor
        Log-likelihood in nats, of the broadcast shape; float32, or float64 if an input is.
        Differentiable once with respect to ``mu`` and ``theta``.

    Raises
    ------
    ValueError
        If shapes or devices do not fit, or a count is negative or not a number.
    TypeError
        If an input has a dtype or layout that does not fit.
    """
    return _log_prob("nb", eps, x, mu, theta)


def zinb_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, zi_logits: Tensor, eps: float = EPS
) -> Tensor:
    """Log-likelihood of counts under a zero-inflated negative binomial, element by element.

    The value of scvi-tools' ``log_zinb_positive(x, mu, theta, zi_logits, eps)``, without its
    float32 errors at large ``theta``.

    Parameters
    ----------
    x, mu, theta, eps
        As in :func:`nb_log_prob`.
    zi_logits
        Logits of the zero inflation (dropout logits), real.

    Returns
    -------
    Tensor
        As :func:`nb_log_prob`; differentiable with respect to ``zi_logits`` too.

    Raises
    ------
    ValueError, TypeError
        As :func:`nb_log_prob`.
    """
    return _log_prob("zinb", eps, x, mu, theta, zi_logits)


def poisson_log_prob(x: Tensor, mu: Tensor) -> Tensor:
    """Log-likelihood of counts under a Poisson distribution, element by element.

    ``x log(mu) - mu - lgamma(x + 1)``: that of ``torch.distributions.Poisson``, which PoissonVI
    takes, for fractions too.

    Parameters
    ----------
    x, mu
        As in :func:`nb_log_prob`.

    Returns
    -------
    Tensor
        Log-likelihood in nats, as in :func:`nb_log_prob`.

    Raises
    ------
    ValueError, TypeError
        As :func:`nb_log_prob`.
    """
    return _log_prob("poisson", EPS, x, mu)
