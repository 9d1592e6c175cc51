"""Count log-likelihoods of one element, and their derivatives, in forms that float32 can bear.

Two halves, because counts are sparse. :func:`at_zero` is what an element costs where ``x = 0``: it
is evaluated densely, in the dtype of its inputs. :func:`at_nonzero` holds the terms that need
``x``: gamma functions and ``log(mu)``; it is evaluated at the non-zeros only, in float64 where
the device has it.

Symbols as in the project's notes: ``mu`` mean, ``theta`` inverse dispersion, ``d`` dropout logits,
``t = theta + mu + eps``, ``v = mu / (theta + eps)``, ``q = v / (1 + v) = mu / t``. Negative
binomial and zero-inflated negative binomial as in Lopez et al. 2018, Nat Methods 15:1053, with the
epsilon of scvi-tools' ``log_nb_positive`` and ``log_zinb_positive``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Terms(NamedTuple):
    """Log-likelihood of each element and its derivatives; None where not asked for or absent."""

    log_prob: Tensor | None
    d_log_mu: Tensor | None  # with respect to log(mu)
    d_log_theta: Tensor | None  # with respect to log(theta); of sigma for the normal distribution
    d_dropout: Tensor | None  # with respect to the dropout logits


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _saturation_minus_log1p(v: Tensor, q: Tensor, log1p_v: Tensor) -> Tensor:
    """``q - log1p(v)`` with ``q = v / (1 + v)``, without its cancellation for small ``v``.

    With ``y = v / (2 + v)`` it is ``-2 y^2 (1 / (1 + y) + y (1/3 + y^2/5 + y^4/7 + ...))``: terms
    of one sign. In place where it can be: over cells x genes, passes over memory are the cost.
    """
    y = v / (v + 2)
    y2 = y * y
    n_terms = 9 if v.dtype == torch.float64 else 3  # y2 < 0.0083 where they are used
    tail = y2 * (1 / (2 * n_terms + 1))
    for k in range(n_terms - 1, 0, -1):
        tail.add_(1 / (2 * k + 1))
        if k > 1:
            tail.mul_(y2)
    series = (y + 1).reciprocal_().addcmul_(y, tail).mul_(y2).mul_(-2)
    small = torch.lt(v, 0.2, out=tail)  # as 0 and 1: lerp is vectorised, where is not
    return torch.lerp(q - log1p_v, series, small)


def _stirling(v: Tensor) -> Tensor:
    """``lgamma(v) - ((v - 1/2) log(v) - v + log(2 pi)/2)``, to 1e-15 for ``v > 30``."""
    w = 1 / (v * v)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w / 1188)))) / v


def _digamma_tail(v: Tensor) -> Tensor:
    """``digamma(v) - log(v)``, to 1e-15 for ``v > 30``."""
    w = 1 / (v * v)
    return -0.5 / v - w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w * (1 / 240 - w / 132))))


_LARGE = 30.0  # from here on differences of gamma functions come from their asymptotic series
_SMALL = 8  # up to here integer counts take finite sums: nearly all counts, and cheaper


def _general_log_gamma(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    large = theta > _LARGE
    small_theta = theta.clamp(max=_LARGE)
    exact = torch.lgamma(x + small_theta) - torch.lgamma(small_theta) - x * torch.log(t)
    big_theta = theta.clamp(min=_LARGE)
    n = x + big_theta
    series = (
        (big_theta - 0.5) * torch.log1p(x / big_theta)
        - x
        + x * torch.log1p((x + (theta - t)) / t)
        + (_stirling(n) - _stirling(big_theta))
    )
    return torch.where(large, series, exact) - torch.lgamma(x + 1)


def _general_digamma(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    small_theta = theta.clamp(max=_LARGE)
    exact = torch.digamma(x + small_theta) - torch.digamma(small_theta)
    big_theta = theta.clamp(min=_LARGE)
    series = torch.log1p(x / big_theta) + (_digamma_tail(x + big_theta) - _digamma_tail(big_theta))
    return torch.where(theta > _LARGE, series, exact) - x / t


def _small_log_gamma(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """Logarithm of the product of ``(theta + k) / ((k + 1) t)`` over ``k < x``."""
    product = theta / t
    for k in range(1, _SMALL):
        product = torch.where(x > k, product * (theta + k) / (t * (k + 1)), product)
    return torch.log(product)


def _small_digamma(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """Sum of ``1 / (theta + k)`` over ``k < x``, less ``x / t``."""
    total = 1 / theta
    for k in range(1, _SMALL):
        total = torch.where(x > k, total + 1 / (theta + k), total)
    return total - x / t


def _by_count(
    x: Tensor,
    theta: Tensor,
    t: Tensor,
    small: Callable[[Tensor, Tensor, Tensor], Tensor],
    general: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply ``small`` to positive integer counts up to ``_SMALL``, ``general`` to all others.

    The products of ``small`` need the range of float64: with another dtype all are ``general``.
    """
    if x.dtype != torch.float64:
        return general(x, theta, t)
    theta = theta.expand_as(t)
    out = small(x, theta, t)
    (others,) = torch.nonzero((x > _SMALL) | (x != torch.floor(x)), as_tuple=True)
    if others.numel():
        out[..., others] = general(x[others], theta[..., others], t[..., others])
    return out


def _log_gamma_terms(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """``lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - x log(t)``, without its large parts."""
    return _by_count(x, theta, t, _small_log_gamma, _general_log_gamma)


def _digamma_terms(x: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """``digamma(x + theta) - digamma(theta) - x / t``."""
    return _by_count(x, theta, t, _small_digamma, _general_digamma)


def at_zero(
    likelihood: str,
    mu: Tensor,
    theta: Tensor | None,
    d: Tensor | None,
    *,
    eps: float = EPS,
    log_prob: bool = True,
    gradients: bool = True,
) -> Terms:
    """Evaluate elements whose count is zero.

    Parameters
    ----------
    likelihood
        One of :data:`LIKELIHOODS`.
    mu, theta, d
        Mean, inverse dispersion (standard deviation if ``likelihood`` is ``"normal"``) and dropout
        logits, broadcastable; those that the likelihood lacks are None.
    eps
        Numerical constant of scvi-tools.
    log_prob, gradients
        Which of the terms to compute. Without ``gradients``, ``d_log_mu`` is computed all the same.
    """
    if likelihood == "poisson":
        return Terms(-mu if log_prob else None, -mu, None, None)
    assert theta is not None
    if likelihood == "normal":
        z2 = (mu / theta).square()
        value = -0.5 * z2 - torch.log(theta) - _HALF_LOG_2PI if log_prob else None
        return Terms(value, -z2, z2 - 1 if gradients else None, None)
    theta_eps = theta + eps
    v = mu / theta_eps
    log1p_v = torch.log1p(v)
    q = v / (v + 1)
    a = log1p_v * theta
    d_log_theta = None
    if gradients:
        d_log_theta = _saturation_minus_log1p(v, q, log1p_v)
        d_log_theta.addcmul_(q, eps / theta_eps, value=-1).mul_(theta)
    d_log_mu = q.mul_(-theta)
    if likelihood == "nb":
        return Terms(a.neg_() if log_prob else None, d_log_mu, d_log_theta, None)
    assert d is not None
    s = (-a).sub_(d)
    value = d_dropout = None
    if log_prob:
        # softplus(s) - softplus(-d), its linear parts subtracted before they are rounded
        value = s.abs().neg_().exp_().log1p_().sub_(d.abs().neg_().exp_().log1p_())
        value.sub_(torch.minimum(a, (-d).relu_()))
    sig_s = torch.sigmoid(s)
    if gradients:
        # sigmoid(-d) - sigmoid(s), as a product
        d_dropout = a.neg_().expm1_().mul_(s.neg_().sigmoid_()).mul_(torch.sigmoid(-d)).neg_()
        assert d_log_theta is not None
        d_log_theta.mul_(sig_s)
    return Terms(value, d_log_mu.mul_(sig_s), d_log_theta, d_dropout)


def at_nonzero(
    likelihood: str,
    x: Tensor,
    log_mu: Tensor,
    theta: Tensor | None,
    d: Tensor | None,
    *,
    eps: float = EPS,
    log_prob: bool = True,
    gradients: bool = True,
) -> Terms:
    """Evaluate elements whose count is positive (any value for ``"normal"``).

    Parameters as in :func:`at_zero`, with the counts ``x`` (n,) and the logarithm of the mean (n,)
    or (S, n), which can be exact where the mean itself underflows.
    """
    mu = torch.exp(log_mu)
    if likelihood == "poisson":
        value = x * log_mu - mu - torch.lgamma(x + 1) if log_prob else None
        return Terms(value, x - mu, None, None)
    assert theta is not None
    if likelihood == "normal":
        z = (x - mu) / theta
        value = -0.5 * z * z - torch.log(theta) - _HALF_LOG_2PI if log_prob else None
        return Terms(value, mu * z / theta, z * z - 1 if gradients else None, None)
    theta_eps = theta + eps
    t = theta_eps + mu
    v = mu / theta_eps
    log1p_v = torch.log1p(v)
    value = d_log_theta = d_dropout = None
    if log_prob:
        value = x * torch.log(mu + eps) - theta * log1p_v + _log_gamma_terms(x, theta, t)
        if d is not None:
            value = value - F.softplus(d)
    d_log_mu = mu / (mu + eps) * (theta / t) * (x - mu - eps)
    if gradients:
        d_log_theta = theta * (
            (_saturation_minus_log1p(v, mu / t, log1p_v) - (eps / theta_eps) * (mu / t))
            + _digamma_terms(x, theta, t)
        )
        if d is not None:
            d_dropout = -torch.sigmoid(d)
    return Terms(value, d_log_mu, d_log_theta, d_dropout)
