"""A benchmark's problem: inputs, the ways to compute the same from them, and the truth."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shapes import Shape

#: torch's settings, by the names of the results.
PRECISIONS = {"fp32": "highest", "tf32": "high", "bf16": "medium"}
#: How far from float64 a result may be (norm of the error by norm of the truth), whatever stock's.
TOLERANCE = {
    "fp32": {"value": 1e-6, "gradient": 1e-5},
    "tf32": {"value": 1e-4, "gradient": 1e-3},
    "bf16": {"value": 1e-3, "gradient": 1e-2},
}
NONZERO = 0.05
#: Rows x genes above which a truth is computed by blocks of cells, and how large those are.
BLOCK = 1 << 24


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Take float32 products in ``"fp32"``, ``"tf32"`` or ``"bf16"``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Case:
    """One set of inputs of an operation, and the ways to compute it."""

    leaves: dict[str, Tensor]  # what is differentiated
    upstream: tuple[Tensor, ...] | None  # gradients of the outputs; of ones if None
    eager: Callable[[], tuple[Tensor, ...]]
    graph: Callable[[], tuple[Tensor, ...]]  # stock without what cannot be compiled
    ours: dict[str, Callable[[], tuple[Tensor, ...]]]
    truth: Callable[[], list[Tensor]]  # outputs and gradients, in the order of the leaves
    training: bool

    def forward(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.training):
            return function()

    def backward(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        upstream = self.upstream
        if upstream is None:
            upstream = tuple(torch.ones_like(out) for out in outputs)
        return list(torch.autograd.grad(outputs, list(self.leaves.values()), upstream))

    def both(self, function: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = self.forward(function)
        gradients = self.backward(outputs) if self.training else []
        return [*(out.detach() for out in outputs), *gradients]


class Random:
    """Random tensors on a device, from one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self.device, generator=self.generator).mul_(scale)

    def labels(self, n: int, n_cats: int) -> Tensor:
        return torch.randint(n_cats, (n, 1), device=self.device, generator=self.generator)

    def counts(self, n: int, genes: int) -> Tensor:
        """Counts of 1, 2, ... (geometric), of which 5 % are not zero."""
        x = torch.rand(n, genes, device=self.device, generator=self.generator)
        return x.div_(NONZERO).log_().div_(-0.9).ceil_().clamp_(0, 1e4)

    def latent(self, shape: Shape, width: int) -> Tensor:
        return self.normal(*((shape.samples,) if shape.samples > 1 else ()), shape.cells, width)

    def library(self, shape: Shape) -> Tensor:
        return self.normal(shape.cells, 1, scale=0.3) + 8


def csr_of(x: Tensor) -> Tensor:
    """The same counts in CSR, as AnnData hands them over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that CSR tensors are in beta
        csr = x.to_sparse_csr()
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(), csr.col_indices().int(), csr.values(), size=x.shape
        )


def layer_options(shape: Shape) -> dict[str, Any]:
    """Arguments of ``DecoderSCVI`` and ``FCLayers``."""
    return {
        "n_cat_list": [shape.batches],
        "n_layers": shape.layers,
        "n_hidden": shape.hidden,
        "inject_covariates": shape.inject_covariates,
        "use_batch_norm": shape.norm == "batch",
        "use_layer_norm": shape.norm == "layer",
        "activation_fn": nn.ReLU if shape.activation == "relu" else nn.LeakyReLU,
    }


def in_float64(module: Any) -> Any:
    """A copy in float64."""
    return copy.deepcopy(module).double()


def blocks(shape: Shape) -> Iterator[slice]:
    """Cells of which a truth is computed at a time."""
    step = max(1, min(shape.cells, BLOCK // (shape.samples * shape.genes)))
    for start in range(0, shape.cells, step):
        yield slice(start, min(start + step, shape.cells))


def errors(got: list[Tensor], truth: list[Tensor], n_outputs: int) -> dict[str, float]:
    """Largest error of an output, and of a gradient; as many as the truth has.

    Norm of the error by norm of the truth, but by no less than a thousandth of the largest norm of
    its kind: a bias before batch norm has no gradient but rounding.
    """
    found: dict[str, float] = {}
    kinds = {"value": slice(0, n_outputs), "gradient": slice(n_outputs, len(truth))}
    for kind, which in kinds.items():
        norms = [torch.linalg.vector_norm(t.double()).item() for t in truth[which]]
        for g, t, norm in zip(got[which], truth[which], norms, strict=True):
            off = torch.linalg.vector_norm(g.double() - t).item()
            error = off / (max(norm, 1e-3 * max(norms)) or 1.0)
            # NaN, which max may pass over, is the worst of all
            found[kind] = max(found.get(kind, 0.0), error, key=lambda e: (e != e, e))
    return found


def is_right(
    error: dict[str, float],
    stock_error: dict[str, float],
    precision: str = "fp32",
    *,
    slack: float = 2.0,
) -> bool:
    """Whether errors are within the tolerance, or no worse than ``slack`` times stock's; NaN never.

    Where rounding is amplified, whose error is larger is luck: hence twice by default.
    """
    return all(
        found <= max(TOLERANCE[precision][kind], slack * stock_error[kind])
        for kind, found in error.items()
    )
