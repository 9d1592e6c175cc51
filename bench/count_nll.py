"""``count_nll`` against scvi-tools' heads and distributions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial

from decoder_fast.functional import count_nll

from .shapes import SHAPES, Shape
from .timing import interleaved

NONZERO = 0.05


def problem(shape: Shape) -> dict[str, torch.Tensor]:
    """Random heads and counts of which 5 % are not zero."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=g) * scale

    n, genes, hidden = shape.cells, shape.genes, shape.hidden
    rate = torch.rand(n, genes, generator=g) * 3
    kept = torch.rand(n, genes, generator=g) < NONZERO / 0.7
    return {
        "x": torch.poisson(rate, generator=g) * kept,
        "hidden": normal(n, hidden).relu().requires_grad_(),
        "library": normal(n, 1, scale=0.3) + 8,
        "scale_weight": normal(genes, hidden, scale=0.05).requires_grad_(),
        "scale_bias": normal(genes).requires_grad_(),
        "dropout_weight": normal(genes, hidden, scale=0.05).requires_grad_(),
        "dropout_bias": normal(genes).requires_grad_(),
        "px_r": normal(genes).requires_grad_(),
    }


def stock(p: dict[str, torch.Tensor], likelihood: str) -> torch.Tensor:
    """What scvi-tools computes."""
    linear = torch.nn.functional.linear
    scale = torch.softmax(linear(p["hidden"], p["scale_weight"], p["scale_bias"]), -1)
    dropout = linear(p["hidden"], p["dropout_weight"], p["dropout_bias"])
    rate = torch.exp(p["library"]) * scale
    theta = torch.exp(p["px_r"])
    if likelihood == "nb":
        px = NegativeBinomial(mu=rate, theta=theta, scale=scale)
    else:
        px = ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale)
    return -px.log_prob(p["x"]).sum(-1)


def ours(p: dict[str, torch.Tensor], likelihood: str, x: torch.Tensor) -> torch.Tensor:
    """The fused operation."""
    return count_nll(
        x,
        p["hidden"],
        p["library"],
        p["scale_weight"],
        p["scale_bias"],
        likelihood=likelihood,
        dropout_weight=p["dropout_weight"],
        dropout_bias=p["dropout_bias"],
        px_r=p["px_r"],
    )


def rows() -> Iterator[dict[str, object]]:
    """Time forward and backward; correctness first."""
    for name, cells in (("tutorial", 128), ("hlca", 1024), ("nsclc", 512), ("census", 512)):
        shape = SHAPES[name].scaled(cells)
        p = problem(shape)
        csr = p["x"].to_sparse_csr()
        compiled = torch.compile(stock)
        likelihood = shape.likelihood
        expected = stock({k: v.double() for k, v in p.items()}, likelihood)
        got = ours(p, likelihood, csr).double()
        error = ((got - expected).abs() / expected.abs()).max().item()
        if error > 1e-6:
            raise AssertionError(f"{shape}: the loss is off by {error:.1e}; nothing was timed")
        seconds = interleaved(
            {
                "stock eager": lambda: stock(p, likelihood).mean().backward(),
                "stock compiled": lambda: compiled(p, likelihood).mean().backward(),
                "ours, dense": lambda: ours(p, likelihood, p["x"]).mean().backward(),
                "ours, CSR": lambda: ours(p, likelihood, csr).mean().backward(),
            }
        )
        yield {"shape": str(shape), "what": "heads + likelihood, forward + backward", **seconds}
