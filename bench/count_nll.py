"""``count_nll`` against scvi-tools' heads and distributions: time, memory, share of a floor.

Every alternative computes the mean over cells of the negative log-likelihood and its gradients with
respect to hidden units, heads and dispersion. *Stock compiled* is the same arithmetic as one graph:
scvi-tools' distributions check the counts, which breaks the graph and would make it slower. *Head
products* are three ``torch.mm`` a head that is used, into tensors that are there already.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from decoder_fast.backends import choose
from decoder_fast.functional import count_nll

from .floor import floor, rates
from .fresh import fresh, peak_extra_bytes
from .shapes import COUNTS, Counts
from .timing import interleaved

NONZERO = 0.05
PER_CELL = ("x", "hidden", "library")
#: Largest relative errors of the losses, and of a gradient by its largest element.
TOLERANCE = {"loss": 1e-6, "gradient": 1e-5}
#: The same for bf16 products: a bf16 number has 8 bits, and gradients sum thousands of them.
TOLERANCE_BF16 = {"loss": 1e-4, "gradient": 1e-2}
#: Whose memory is measured.
MEASURED = ("stock eager", "stock compiled", "ours, CSR", "ours, dense")
#: By default glibc hands larger tensors back to the system when they are freed, and every page of
#: the next one has to be faulted in anew.
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}

Problem = dict[str, Tensor]


def problem(shape: Counts) -> Problem:
    """Random heads and counts of which 5 % are not zero, dense and as AnnData's CSR hands them."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g) * scale

    n, genes, hidden = shape.cells, shape.genes, shape.hidden
    rate = torch.rand(n, genes, generator=g) * 3
    kept = torch.rand(n, genes, generator=g) < NONZERO / 0.7
    x = torch.poisson(rate, generator=g) * kept
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = x.to_sparse_csr()
        csr = torch.sparse_csr_tensor(
            csr.crow_indices().int(),
            csr.col_indices().int(),
            csr.values(),
            size=x.shape,
            check_invariants=True,
        )
    return {
        "x": x,
        "csr": csr,
        "hidden": normal(n, hidden).relu().requires_grad_(),
        "library": normal(n, 1, scale=0.3) + 8,
        "scale_weight": normal(genes, hidden, scale=0.05).requires_grad_(),
        "scale_bias": normal(genes).requires_grad_(),
        "dropout_weight": normal(genes, hidden, scale=0.05).requires_grad_(),
        "dropout_bias": normal(genes).requires_grad_(),
        "px_r": normal(genes).requires_grad_(),
    }


def differentiated(p: Problem, likelihood: str) -> Problem:
    """What gets a gradient."""
    return {
        name: tensor
        for name, tensor in p.items()
        if tensor.requires_grad and (likelihood == "zinb" or not name.startswith("dropout"))
    }


def heads(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``DecoderSCVI``'s heads, the dropout head among them whatever the likelihood: px_scale,
    px_rate, theta, px_dropout.
    """
    linear = torch.nn.functional.linear
    scale = torch.softmax(linear(p["hidden"], p["scale_weight"], p["scale_bias"]), -1)
    dropout = linear(p["hidden"], p["dropout_weight"], p["dropout_bias"])
    return scale, torch.exp(p["library"]) * scale, torch.exp(p["px_r"]), dropout


def stock(p: Problem, likelihood: str) -> Tensor:
    """What scvi-tools computes."""
    from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial

    scale, rate, theta, dropout = heads(p)
    if likelihood == "nb":
        px = NegativeBinomial(mu=rate, theta=theta, scale=scale)
    else:
        px = ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale)
    return -px.log_prob(p["x"]).sum(-1)


def stock_graph(p: Problem, likelihood: str) -> Tensor:
    """The same without its distributions' checks."""
    from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive

    _, rate, theta, dropout = heads(p)
    if likelihood == "nb":
        return -log_nb_positive(p["x"], rate, theta).sum(-1)
    return -log_zinb_positive(p["x"], rate, theta, dropout).sum(-1)


def ours(p: Problem, likelihood: str, counts: str) -> Tensor:
    """The fused operation on dense (``"x"``) or sparse (``"csr"``) counts."""
    return count_nll(
        p[counts],
        p["hidden"],
        p["library"],
        p["scale_weight"],
        p["scale_bias"],
        likelihood=likelihood,
        dropout_weight=p["dropout_weight"],
        dropout_bias=p["dropout_bias"],
        px_r=p["px_r"],
    )


def head_products(p: Problem, likelihood: str) -> Callable[[], None]:
    """Three bare products a head that is used."""
    hidden = p["hidden"].detach()
    weights = [p["scale_weight"].detach()]
    if likelihood == "zinb":
        weights.append(p["dropout_weight"].detach())
    logits = hidden.new_empty(hidden.shape[0], weights[0].shape[0])
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weights[0])

    def run() -> None:
        for weight in weights:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits.t(), hidden, out=d_weight)
            torch.mm(logits, weight, out=d_hidden)

    return run


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Take float32 products in this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def losses(p: Problem, likelihood: str) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute the losses, by alternative."""
    torch._dynamo.reset()  # each shape is compiled for itself: no dynamic shapes
    compiled = torch.compile(stock_graph, fullgraph=True, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        "stock eager": lambda: stock(p, likelihood),
        "stock compiled": lambda: compiled(p, likelihood),
        "ours, CSR": lambda: ours(p, likelihood, "csr"),
        "ours, dense": lambda: ours(p, likelihood, "x"),
    }
    if choose("count_nll", device=p["x"].device).backend == "cpp":
        for name in ("stock eager", "ours, CSR", "ours, dense"):
            functions[f"{name}, bf16"] = functions[name]
    return functions


def step(p: Problem, likelihood: str, name: str, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Losses and gradients, the gradients in the order of :func:`differentiated`."""
    wanted = list(differentiated(p, likelihood).values())
    with products("medium" if name.endswith("bf16") else "highest"):
        nll = loss()
        return [nll.detach(), *torch.autograd.grad(nll.mean(), wanted)]


def truth(p: Problem, likelihood: str) -> list[Tensor]:
    """What :func:`step` should return: stock in float64, by blocks of cells."""
    n_cells = p["x"].shape[0]
    wide = {k: v.detach().double() for k, v in p.items() if k != "csr"}
    names = list(differentiated(p, likelihood))
    parts: list[list[Tensor]] = []
    for cells in torch.arange(n_cells).split(64):
        block = {k: v[cells] if k in PER_CELL else v for k, v in wide.items()}
        wanted = [block[name].requires_grad_() for name in names]
        nll = stock_graph(block, likelihood)
        parts.append([nll.detach(), *torch.autograd.grad(nll.sum() / n_cells, wanted)])
    return [
        torch.cat(part) if name in ("loss", *PER_CELL) else torch.stack(part).sum(0)
        for name, part in zip(["loss", *names], zip(*parts, strict=True), strict=True)
    ]


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Largest relative error of the losses; of the gradients, relative to the largest element."""

    def largest(values: Tensor) -> float:
        return values.max().item()  # not Python's max, which may pass over what is not a number

    loss = largest((got[0] - expected[0]).abs() / expected[0].abs())
    pairs = zip(got[1:], expected[1:], strict=True)
    gradients = torch.stack([(g - e).abs().max() / e.abs().max() for g, e in pairs])
    return {"loss": loss, "gradient": largest(gradients)}


def is_right(name: str, error: dict[str, float]) -> bool:
    """Whether errors are within the tolerance; one that is not a number is not."""
    tolerance = TOLERANCE_BF16 if name.endswith("bf16") else TOLERANCE
    return all(error[key] <= tolerance[key] for key in tolerance)


def seconds(shape: Counts, threads: int, names: Iterable[str], repeats: int) -> dict[str, float]:
    """Median seconds of alternatives and of the bare head products, interleaved."""
    torch.set_num_threads(threads)
    p, likelihood = problem(shape), shape.likelihood
    functions = losses(p, likelihood)
    runs: dict[str, Callable[[], object]] = {
        name: lambda name=name: step(p, likelihood, name, functions[name]) for name in names
    }
    runs["head products"] = head_products(p, likelihood)
    return interleaved(runs, repeats=repeats)


def ratios(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """How many times as long as ours each other alternative takes."""
    return {
        name: {k: v / seconds[name] for k, v in seconds.items() if not k.startswith("ours")}
        for name in seconds
        if name.startswith("ours")
    }


def peak(shape: Counts, threads: int, name: str) -> int | None:
    """Peak extra bytes of one alternative, in a process that has computed nothing of that size.

    Code is paged in before: by a small problem, or, as compiled code is for one shape, by this one.
    """
    torch.set_num_threads(threads)

    def prepared(shape: Counts) -> Callable[[], object]:
        p, likelihood = problem(shape), shape.likelihood
        function = losses(p, likelihood)[name]
        return lambda: step(p, likelihood, name, function)

    if name == "stock compiled":
        run = prepared(shape)
        run()
    else:
        prepared(Counts(8, 256, shape.likelihood))()
        run = prepared(shape)
    return peak_extra_bytes(run)


def cases(quick: bool) -> tuple[Counts, ...]:
    """The shapes; two small ones when in a hurry."""
    return COUNTS[:2] if quick else COUNTS


def measure(shape: Counts, repeats: int) -> dict[str, object]:
    """Check, then time, then measure memory."""
    threads, likelihood = torch.get_num_threads(), shape.likelihood
    p = problem(shape)
    expected = truth(p, likelihood)
    functions = losses(p, likelihood)
    results = {
        name: step(p, likelihood, name, function)
        for name, function in functions.items()
        if not name.startswith("stock")
    }
    # The setting allows bf16 products; where the kernel takes none, there is nothing to show.
    plain, allowed = results["ours, CSR"], results.get("ours, CSR, bf16")
    if allowed is None or all(map(torch.equal, plain, allowed)):
        functions = {k: v for k, v in functions.items() if not k.endswith("bf16")}
    found = {k: errors(v, expected) for k, v in results.items() if k in functions}
    wrong = [name for name, error in found.items() if not is_right(name, error)]
    right = [name for name in functions if name not in wrong]
    gradients = sum(tensor.nbytes for tensor in differentiated(p, likelihood).values())
    del p, expected, functions, results, plain, allowed

    timed = seconds(shape, threads, right, repeats)
    row: dict[str, object] = {
        "what": "heads + likelihood, forward + backward",
        "shape": str(shape),
        "backend": choose("count_nll", device=torch.device("cpu")).backend,
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
