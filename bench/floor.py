"""A floor under the time of the count likelihood, from what this machine is measured to do.

It is a model, not a bound: the time of three parts that no implementation can do without, as if
none overlapped another.

- Products: three a head that is used (the head itself, and the gradients of its weights and of the
  hidden units), all of them dense, at the best rate that any float32 product reaches here. Logits
  that are computed again rather than kept, and zeros that are skipped in the hidden units, are the
  implementation's own affair.
- Vector math: for each element one exponential and one logarithm (nb), or three and two (zinb), at
  the rate of ``torch.exp`` and ``torch.log`` on a tile that stays in the cache. Faster vector math
  than torch's lies below this floor.
- Memory: weights read and gradients written once, at the bandwidth of a large copy.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .shapes import Shape

HEADS = {"nb": 1, "zinb": 2}
EXPONENTIALS = {"nb": 1, "zinb": 3}
LOGARITHMS = {"nb": 1, "zinb": 2}
#: Rows, inner dimension and columns of the products that are tried.
PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 128, 8000))
#: Elements that exp and log are timed on, and elements that are copied.
TILE = 1 << 15
COPIED = 1 << 26


def _best(run: Callable[[], object], seconds: float = 0.4) -> float:
    """Shortest time of a call: a rate that the machine reaches is one it is capable of."""
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < until:
        run()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Rates:
    """What the machine reaches with the current number of threads."""

    flops_a_second: dict[str, float]  # of float32 products, by what computes them
    exp_seconds: float  # an element, all threads together
    log_seconds: float
    bytes_a_second: float


def _product_rates() -> dict[str, float]:
    rates: dict[str, float] = {}
    for m, k, n in PRODUCTS:
        a, b, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        runs = {"torch.mm": lambda: torch.mm(a, b.t(), out=out)}
        if torch.backends.mkldnn.is_available():
            # What torch.mm calls (MKL) can be half as fast on processors that are not Intel's.
            a_dnn, b_dnn = a.to_mkldnn(), b.to_mkldnn()
            runs["oneDNN"] = lambda: torch.nn.functional.linear(a_dnn, b_dnn)
        for name, run in runs.items():
            rates[name] = max(rates.get(name, 0.0), 2 * m * k * n / _best(run))
    return rates


@functools.cache
def rates(threads: int) -> Rates:
    """Measure the machine, once for a number of threads (the current one)."""
    assert threads == torch.get_num_threads()
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    flops = _product_rates()
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    # In its own cache every thread goes as fast as one alone.
    torch.set_num_threads(1)
    tile = torch.rand(TILE) + 0.5
    out = torch.empty_like(tile)
    exp_seconds = _best(lambda: torch.exp(tile, out=out)) / (TILE * threads)
    log_seconds = _best(lambda: torch.log(tile, out=out)) / (TILE * threads)
    torch.set_num_threads(threads)
    return Rates(flops, exp_seconds, log_seconds, bandwidth)


def product_flops(shape: Shape) -> int:
    """Floating-point operations of the products that are needed."""
    return HEADS[shape.likelihood] * 3 * 2 * shape.cells * shape.genes * shape.hidden


def floor(shape: Shape) -> dict[str, float]:
    """Seconds of each part of the floor of one shape; products also at the rate of torch.mm."""
    machine = rates(torch.get_num_threads())
    elements = shape.cells * shape.genes
    parameters = HEADS[shape.likelihood] * shape.genes * (shape.hidden + 1) + shape.genes
    flops = product_flops(shape)
    return {
        "products": flops / max(machine.flops_a_second.values()),
        "products at torch.mm's rate": flops / machine.flops_a_second["torch.mm"],
        "vector math": elements
        * (
            EXPONENTIALS[shape.likelihood] * machine.exp_seconds
            + LOGARITHMS[shape.likelihood] * machine.log_seconds
        ),
        "memory": 2 * 4 * parameters / machine.bytes_a_second,
    }
