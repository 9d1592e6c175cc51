"""The truth that the operations are tested against: the formulas of the papers, in float64.

Nothing here is clever, tiled or fused, and nothing is taken from the package. Gradients come from
autograd. Where float64 is not enough (:func:`exact_log_prob`), mpmath computes with 80 digits and
differentiates numerically.

With it come the measures that the tests share: :func:`error`, :func:`assert_accurate` and
:class:`Recorder`.
"""

from __future__ import annotations

import functools

import mpmath
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 1e-8  # scvi-tools' constant


def softplus(v: Tensor) -> Tensor:
    return torch.logaddexp(v, torch.zeros_like(v))


def log_prob(
    likelihood: str, x: Tensor, mu: Tensor, theta: Tensor | None, d: Tensor | None
) -> Tensor:
    """Log-likelihood of each element; ``theta`` is the standard deviation of a normal one."""
    if likelihood == "poisson":
        # xlogy has no derivative at mu = 0
        log_mu = torch.log(torch.where(x > 0, mu, 1))
        return x * log_mu - mu - torch.lgamma(x + 1)
    if likelihood == "normal":
        return (
            -0.5 * ((x - mu) / theta) ** 2
            - torch.log(theta)
            - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        )
    log_t = torch.log(theta + mu + EPS)
    of_zero = theta * (torch.log(theta + EPS) - log_t)
    nb = (
        of_zero
        + x * (torch.log(mu + EPS) - log_t)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    if likelihood == "nb":
        return nb
    at_zero = softplus(-d + of_zero) - softplus(-d)
    return torch.where(x < EPS, at_zero, -softplus(-d) - d + nb)


def scale_and_rate(logits: Tensor, library: Tensor, scale_activation: str) -> tuple[Tensor, Tensor]:
    if scale_activation == "softmax":
        e = torch.exp(logits - logits.amax(-1, keepdim=True))
        scale = e / e.sum(-1, keepdim=True)
    else:
        scale = softplus(logits)
    return scale, torch.exp(library) * scale


def _head(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    out = hidden @ weight.t()
    return out if bias is None else out + bias


def count_nll(
    x: Tensor,
    hidden: Tensor,
    library: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor | None = None,
    *,
    likelihood: str,
    scale_activation: str = "softmax",
    dropout_weight: Tensor | None = None,
    dropout_bias: Tensor | None = None,
    px_r: Tensor | None = None,
    px_r_index: Tensor | None = None,
    r_weight: Tensor | None = None,
    r_bias: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of each cell, from dense counts."""
    logits = _head(hidden, scale_weight, scale_bias)
    assert logits is not None
    _, mu = scale_and_rate(logits, library, scale_activation)
    if px_r is not None and px_r_index is not None:
        r = px_r.t()[px_r_index.flatten().long()]
    else:
        r = _head(hidden, r_weight, r_bias) if px_r is None else px_r
    theta = None if r is None else torch.exp(r)
    d = _head(hidden, dropout_weight, dropout_bias)
    return -log_prob(likelihood, x, mu, theta, d).sum(-1)


def hidden_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    categories: list[Tensor],
    n_cats: list[int],
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    batch_norm_weight: Tensor | None = None,
    batch_norm_bias: Tensor | None = None,
    use_layer_norm: bool = False,
    activation: str = "relu",
    activation_parameter: float = 0.0,
) -> Tensor:
    """One hidden layer by one-hot matrices; ``norm`` are batch norm's mean and variance."""
    columns = [x]
    for category, n_cat in zip(categories, n_cats, strict=True):
        if not (category.dim() == 2 and category.shape[1] == n_cat > 1):
            category = torch.eye(n_cat, dtype=x.dtype)[category.flatten().long()]
        columns.append(category.to(x.dtype).expand(*x.shape[:-1], n_cat))
    v = torch.cat(columns, -1) @ weight.t()
    if bias is not None:
        v = v + bias
    if norm is not None:
        mean, var = norm
        v = (v - mean) / torch.sqrt(var + 1e-3)
        if batch_norm_weight is not None:
            v = v * batch_norm_weight
        if batch_norm_bias is not None:
            v = v + batch_norm_bias
    if use_layer_norm:
        centred = v - v.mean(-1, keepdim=True)
        v = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    if activation == "relu":
        return v.clamp(min=0)
    if activation == "leaky_relu":
        return torch.where(v > 0, v, activation_parameter * v)
    if activation == "elu":
        return torch.where(v > 0, v, activation_parameter * torch.expm1(v.clamp(max=0)))
    if activation == "gelu":
        return 0.5 * v * (1 + torch.erf(v / 2**0.5))
    if activation == "silu":
        return v / (1 + torch.exp(-v))
    assert activation == "identity"
    return v


@functools.cache
def exact_log_prob(
    likelihood: str,
    x: float,
    mu: float,
    theta: float = 0.0,
    d: float = 0.0,
    *,
    gradients: bool = True,
) -> tuple[float, ...]:
    """Log-likelihood of one element and its derivatives by ``mu``, ``theta`` and ``d``, exact."""
    eps = mpmath.mpf(EPS)

    def value(mu: mpmath.mpf, theta: mpmath.mpf, d: mpmath.mpf) -> mpmath.mpf:
        if likelihood == "poisson":
            return (x * mpmath.log(mu) if x else 0) - mu - mpmath.loggamma(x + 1)
        log_t = mpmath.log(theta + mu + eps)
        of_zero = theta * (mpmath.log(theta + eps) - log_t)
        nb = of_zero
        if x:
            nb += x * (mpmath.log(mu + eps) - log_t) + mpmath.loggamma(x + theta)
            nb -= mpmath.loggamma(theta) + mpmath.loggamma(x + 1)
        if likelihood == "nb":
            return nb
        none = mpmath.log1p(mpmath.exp(-d))
        if x:
            return -none - d + nb
        return mpmath.log1p(mpmath.exp(-d + of_zero)) - none

    with mpmath.workdps(80):
        x = mpmath.mpf(x)
        point = [mpmath.mpf(v) for v in (mu, theta, d)]
        results = [value(*point)]
        if gradients:
            n = {"poisson": 1, "nb": 2, "zinb": 3}[likelihood]
            for k in range(n):
                # Central difference: at 80 digits a relative step of 1e-25 leaves 50 of them right.
                step = mpmath.mpf(10) ** -25 * (abs(point[k]) or 1)
                ends = [
                    value(*[p + sign * step * (j == k) for j, p in enumerate(point)])
                    for sign in (1, -1)
                ]
                results.append((ends[0] - ends[1]) / (2 * step))
        return tuple(float(r) for r in results)


def error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error, relative to the norm of the truth."""
    norm = torch.linalg.vector_norm
    size = norm(truth).item()
    return norm(value.double() - truth).item() / (size if size > 0 else 1.0)


#: One rounding to float32, relative: what no float32 result can be expected to beat.
FLOAT32_FLOOR = 2.0**-23


def assert_accurate(
    name: str, value: Tensor, truth: Tensor, stock: Tensor | None, limit: float
) -> None:
    """Error within ``limit``, and within twice that of stock in the same precision."""
    ours = error(value, truth)
    assert ours <= limit, f"{name}: relative error {ours:.1e}, allowed {limit:.1e}"
    if stock is not None:
        theirs = error(stock, truth)
        assert ours <= 2 * theirs + FLOAT32_FLOOR, f"{name}: error {ours:.1e}, stock {theirs:.1e}"


class Recorder(TorchDispatchMode):
    """Counts matrix products, and remembers the largest tensor that any operation made."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__.strip("_") in ("mm", "addmm", "bmm")
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                if t.untyped_storage().data_ptr() not in self.inputs:
                    self.largest = max(self.largest, t.numel())
        return out
