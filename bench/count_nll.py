"""``count_nll`` against scvi-tools' heads and distributions: time, memory, share of a floor.

Every alternative computes the negative log-likelihood of each cell and the gradients of their mean,
which is what scvi-tools' models minimise, with respect to hidden units, heads and dispersion.
*Stock compiled* is the same arithmetic as one graph: scvi-tools' distributions check the counts,
which breaks the graph and would make it slower. *Head products* are three ``torch.mm`` a head that
is used, into tensors that are there already.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from decoder_fast.backends import choose, implementation
from decoder_fast.functional import count_nll

from . import stock
from .case import Case, Random, blocks, csr_of, errors, is_right, products
from .floor import floor, rates
from .fresh import fresh, peak_extra_bytes
from .shapes import COUNTS, Shape
from .timing import interleaved

CPU = torch.device("cpu")
#: Whose memory is measured.
MEASURED = ("stock eager", "stock compiled", "ours, CSR", "ours, dense")
#: By default glibc hands larger tensors back to the system when they are freed, and every page of
#: the next one has to be faulted in anew.
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}

Function = Callable[[], tuple[Tensor, ...]]


def plain(take: Callable[..., Tensor], shape: Shape, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Stock's heads (the dropout head among them whatever the likelihood) and likelihood."""
    scale = torch.softmax(nn.functional.linear(p["hidden"], p["scale"], p["scale bias"]), -1)
    rate = torch.exp(p["library"]) * scale
    dropout = nn.functional.linear(p["hidden"], p["dropout"], p["dropout bias"])
    return (take(shape.likelihood, p["x"], rate, torch.exp(p["px_r"]), dropout),)


@contextmanager
def other_route(shape: Shape) -> Iterator[None]:
    """Have the Triton kernels take the route that they would not take for a shape's size."""
    kernels = implementation("count_nll", "triton")
    before = kernels.FUSED_ELEMENTS
    kernels.FUSED_ELEMENTS = 0 if shape.rows * shape.genes <= before else 1 << 62
    try:
        yield
    finally:
        kernels.FUSED_ELEMENTS = before


def case(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """Heads and likelihood, from hidden units; dispersion by gene."""
    random, h, genes = Random(device, seed), shape.hidden, shape.genes
    rows = (shape.samples, shape.cells) if shape.samples > 1 else (shape.cells,)
    of_each = 1 / math.prod(rows)
    x = random.counts(shape.cells, genes)
    csr = csr_of(x)
    p = {
        "x": x,
        "library": random.library(shape),
        "hidden": random.latent(shape, h).relu_(),
        "scale": random.normal(genes, h, scale=0.05),
        "scale bias": random.normal(genes),
        "dropout": random.normal(genes, h, scale=0.05),
        "dropout bias": random.normal(genes),
        "px_r": random.normal(genes),
    }
    leaves = {
        name: tensor.requires_grad_(shape.training)
        for name, tensor in p.items()
        if name not in ("x", "library")
        and (shape.likelihood == "zinb" or not name.startswith("dropout"))
        and (shape.likelihood != "poisson" or name != "px_r")
    }

    def ours(counts: Tensor) -> tuple[Tensor, ...]:
        nll = count_nll(
            counts,
            p["hidden"],
            p["library"],
            p["scale"],
            p["scale bias"],
            likelihood=shape.likelihood,
            dropout_weight=p["dropout"],
            dropout_bias=p["dropout bias"],
            px_r=p["px_r"],
        )
        return (nll,)

    def truth() -> list[Tensor]:
        by_cell = ("x", "library", "hidden")
        wide = {name: tensor.detach().double() for name, tensor in p.items() if name != "x"}
        losses: list[Tensor] = []
        sums = {name: torch.zeros_like(wide[name]) for name in leaves}
        for cells in blocks(shape):
            block = {k: v[..., cells, :] if k in by_cell else v.clone() for k, v in wide.items()}
            block["x"] = x[cells].double()
            block = {k: v.requires_grad_() if k in leaves else v for k, v in block.items()}
            with torch.set_grad_enabled(shape.training):
                (nll,) = plain(stock.loss, shape, block)
            losses.append(nll.detach())
            if shape.training:
                wanted = [block[name] for name in leaves]
                parts = torch.autograd.grad(nll.sum() * of_each, wanted)
                for name, part in zip(leaves, parts, strict=True):
                    into = sums[name][..., cells, :] if name == "hidden" else sums[name]
                    into += part
        return [torch.cat(losses, -1), *(sums.values() if shape.training else ())]

    return Case(
        leaves=leaves,
        upstream=(torch.full(rows, of_each, device=device),),
        eager=lambda: plain(stock.checked_loss, shape, p),
        graph=lambda: plain(stock.loss, shape, p),
        ours={"ours": lambda: ours(x), "ours, CSR": lambda: ours(csr)},
        truth=truth,
        training=shape.training,
    )


def head_products(problem: Case) -> Callable[[], None]:
    """Three bare products a head that is used."""
    hidden, *weights = (
        problem.leaves[name].detach()
        for name in ("hidden", "scale", "dropout")
        if name in problem.leaves
    )
    logits = hidden.new_empty(hidden.shape[0], weights[0].shape[0])
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weights[0])

    def run() -> None:
        for weight in weights:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits.t(), hidden, out=d_weight)
            torch.mm(logits, weight, out=d_hidden)

    return run


def alternatives(problem: Case) -> dict[str, Function]:
    """Functions that compute the losses, by alternative."""
    torch._dynamo.reset()  # each shape is compiled for itself: no dynamic shapes
    functions: dict[str, Function] = {
        "stock eager": problem.eager,
        "stock compiled": torch.compile(problem.graph, fullgraph=True, dynamic=False),
        "ours, CSR": problem.ours["ours, CSR"],
        "ours, dense": problem.ours["ours"],
    }
    if choose("count_nll", device=CPU).backend == "cpp":
        for name in ("stock eager", "ours, CSR", "ours, dense"):
            functions[f"{name}, bf16"] = functions[name]
    return functions


def step(problem: Case, name: str, function: Function) -> list[Tensor]:
    """Losses and gradients."""
    if precision(name) == "fp32":  # the default
        return problem.both(function)
    with products(precision(name)):
        return problem.both(function)


def precision(name: str) -> str:
    """In which products of an alternative are taken."""
    return "bf16" if name.endswith("bf16") else "fp32"


def seconds(shape: Shape, threads: int, names: Iterable[str], repeats: int) -> dict[str, float]:
    """Median seconds of alternatives and of the bare head products, interleaved."""
    torch.set_num_threads(threads)
    problem = case(shape, CPU)
    functions = alternatives(problem)
    runs: dict[str, Callable[[], object]] = {
        name: lambda name=name: step(problem, name, functions[name]) for name in names
    }
    runs["head products"] = head_products(problem)
    return interleaved(runs, repeats=repeats)


def ratios(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """How many times as long as ours each other alternative takes."""
    return {
        name: {k: v / seconds[name] for k, v in seconds.items() if not k.startswith("ours")}
        for name in seconds
        if name.startswith("ours")
    }


def peak(shape: Shape, threads: int, name: str) -> int | None:
    """Peak extra bytes of one alternative, in a process that has computed nothing of that size.

    Code is paged in before: by a small problem, or, as compiled code is for one shape, by this one.
    """
    torch.set_num_threads(threads)

    def prepared(shape: Shape) -> Callable[[], object]:
        problem = case(shape, CPU)
        function = alternatives(problem)[name]
        return lambda: step(problem, name, function)

    if name == "stock compiled":
        run = prepared(shape)
        run()
    else:
        prepared(replace(shape, cells=8, genes=256))()
        run = prepared(shape)
    return peak_extra_bytes(run)


def cases(quick: bool) -> tuple[Shape, ...]:
    """The shapes; two small ones when in a hurry."""
    return COUNTS[:2] if quick else COUNTS


def measure(shape: Shape, repeats: int) -> dict[str, object]:
    """Check, then time, then measure memory."""
    threads = torch.get_num_threads()
    problem = case(shape, CPU)
    truth = problem.truth()
    functions = alternatives(problem)
    results = {
        name: step(problem, name, function)
        for name, function in functions.items()
        if name != "stock compiled"
    }
    # The setting allows bf16 products; where the kernel takes none, there is nothing to show.
    plainly, allowed = results["ours, CSR"], results.get("ours, CSR, bf16")
    if allowed is None or all(map(torch.equal, plainly, allowed)):
        functions = {k: v for k, v in functions.items() if not k.endswith("bf16")}
    found = {k: errors(v, truth, 1) for k, v in results.items() if k in functions}
    wrong = [
        name
        for name, error in found.items()
        if name.startswith("ours") and not is_right(error, found["stock eager"], precision(name))
    ]
    right = [name for name in functions if name not in wrong]
    gradients = sum(tensor.nbytes for tensor in problem.leaves.values())
    del problem, truth, functions, results, plainly, allowed

    timed = seconds(shape, threads, right, repeats)
    row: dict[str, object] = {
        "what": "heads + likelihood, forward + backward",
        "shape": shape.name,
        "backend": choose("count_nll", device=CPU).backend,
        "errors": found,
        "wrong": wrong,
        **timed,
        "ratios": ratios(timed),
        "floor": floor(shape),
        "rates": asdict(rates(threads)),
        "peak extra bytes": {
            name: fresh(peak, shape, threads, name) for name in MEASURED if name in right
        },
        "gradient bytes": gradients,
    }
    # Only there do tensors exceed the 32 MiB up to which glibc's own thresholds adapt.
    if shape.cells * shape.genes * 4 > 32 << 20 and platform.libc_ver()[0] == "glibc":
        raised = fresh(seconds, shape, threads, right, repeats, **RAISED)
        row["thresholds raised"] = raised | {"ratios": ratios(raised)}
    return row
