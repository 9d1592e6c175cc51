"""The benchmark that users run, ``decoder-fast bench``: stock, stock compiled and ours.

Each shape is that of a real model (:mod:`bench.shapes`), with a mini-batch scaled to the machine.
First results are held against float64 (an epoch's losses against stock's), and what exceeds both a
tolerance and twice stock's error is not timed. Then the alternatives take turns, and medians are
compared.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from decoder_fast.datasets import InputError

from . import count_nll, covariate_linear, csr_linear, softmax_library, suite_report
from .case import Case, errors, is_right
from .fresh import peak_extra_bytes
from .model import EPOCH_TOLERANCE, Models, quiet, step_errors
from .shapes import SHAPES, Shape
from .suite_report import ALTERNATIVES
from .timing import environment, first_line, interleaved

#: Few genes and many, few batches and many; compiling stock takes most of a minute a shape.
DEFAULT_SHAPES = ("tutorial", "hlca", "census", "allgenes")
QUICK_SHAPES = ("tutorial", "census")
PARTS = ("operations", "step", "epoch")
#: What is timed of each operation; of ``count_nll`` with counts in CSR, as ``fuse`` hands them.
OPERATIONS: dict[str, tuple[str, Callable[[Shape, torch.device], Case], str]] = {
    "csr_linear": ("encoder's first layer", csr_linear.case, "ours"),
    "covariate_linear": ("hidden layers", covariate_linear.case, "ours"),
    "softmax_library": ("px_scale and px_rate", softmax_library.case, "ours"),
    "count_nll": ("heads + likelihood", count_nll.case, "ours, CSR"),
}
#: Cells x samples x genes of a mini-batch, for each thread of a CPU.
ELEMENTS_A_THREAD = 1_250_000
#: A mini-batch is not made smaller than this, nor genes fewer.
LEAST_CELLS, LEAST_GENES = 32, 1_000
#: Share of the memory that a benchmark may be estimated to take.
MEMORY_SHARE = 0.5

Run = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    shapes: tuple[str, ...]
    parts: tuple[str, ...] = PARTS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    compiled: bool = True

    @property
    def repeats(self) -> int:
        """Turns that each alternative gets at least."""
        return 3 if self.quick else 7


@dataclass
class Row:
    """What was found of one thing at one shape, by alternative."""

    what: str
    shape: Shape
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # why an alternative was not timed
    wrong: bool = False

    def times_faster(self, than: str) -> float | None:
        """How many times as long as ours another takes."""
        if than in self.seconds and "ours" in self.seconds:
            return self.seconds[than] / self.seconds["ours"]
        return None

    @property
    def failed(self) -> bool:
        """Whether ours is wrong, or could not be run."""
        return self.wrong or "ours" in self.missing


# The machine
# -----------


def about(device: torch.device) -> dict[str, str | int | float]:
    """What the results have to be read with."""
    found = environment()
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **found}
    threads = torch.get_num_threads()
    return {"device": f"{found['processor']}, {threads} thread{'s' * (threads > 1)}", **found}


def memory(device: torch.device) -> int:
    """Bytes of memory: of the device, or of the machine or the container that limits it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        found = 8 << 30  # this system does not say
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found = min(found, int((Path("/sys/fs/cgroup") / limit).read_text()))
        except (OSError, ValueError):
            continue
    return found


def estimated_bytes(shape: Shape) -> int:
    """What a stock training step and its float64 truth take, roughly."""
    elements = 40 * shape.rows * shape.genes
    one_hots = 10 * shape.layers * shape.rows * (shape.batches if shape.batches > 1 else 0)
    parameters = 16 * 4 * shape.hidden * (shape.genes + shape.batches)  # two models, Adam, truth
    return 4 * (elements + one_hots + parameters)


def scale(shape: Shape, options: Options, available: int) -> tuple[Shape, str]:
    """Make a mini-batch smaller until it suits the machine; returns how it was done."""
    reasons = []
    scaled = shape
    if options.device.type == "cpu":
        threads = torch.get_num_threads()
        limit = threads * ELEMENTS_A_THREAD // (8 if options.quick else 1)
        while scaled.rows * scaled.genes > limit and scaled.cells > LEAST_CELLS:
            scaled = replace(scaled, cells=scaled.cells // 2)
        if scaled is not shape:
            reasons.append(f"{threads} thread{'s' * (threads > 1)}")
    before = scaled
    while estimated_bytes(scaled) > MEMORY_SHARE * available:
        if scaled.cells > LEAST_CELLS:
            scaled = replace(scaled, cells=scaled.cells // 2)
        elif scaled.genes > LEAST_GENES:
            scaled = replace(scaled, genes=scaled.genes // 2)
        else:
            break
    if scaled is not before:
        reasons.append(f"{available / 2**30:.0f} GiB of memory")
    if not reasons:
        return shape, "as it is"
    changes = [f"{scaled.cells:,} cells a mini-batch instead of {shape.cells:,}"]
    if scaled.genes != shape.genes:
        changes.append(f"{scaled.genes:,} genes instead of {shape.genes:,}")
    return scaled, f"{', '.join(changes)}, for {' and '.join(reasons)}"


def no_compiler(device: torch.device) -> str | None:
    """Why ``torch.compile`` does nothing here, or None."""
    factor = random.random()  # a graph that no cache holds
    try:
        torch.compile(lambda x: x * factor, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        return f"torch.compile fails here: {first_line(error)}"
    return None


def _peak_bytes(run: Run, device: torch.device) -> int | None:
    if device.type != "cuda":
        return peak_extra_bytes(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# Measuring
# ---------


def _time(row: Row, runs: dict[str, Run], options: Options, at_most: float) -> None:
    """Time what can be run, then measure its memory."""
    if row.wrong:
        runs = {name: run for name, run in runs.items() if name != "ours"}

    def synchronised(run: Run) -> Run:
        def wait() -> None:
            run()
            torch.cuda.synchronize()

        return wait if options.device.type == "cuda" else run

    working: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # one alternative's failure must not cost the others
            row.missing[name] = first_line(error)
        else:
            working[name] = synchronised(run)
    if working:
        least = 0.0 if options.quick else 1.0
        row.seconds = interleaved(working, repeats=options.repeats, at_least=least, at_most=at_most)
    for name, run in working.items():
        if (peak := _peak_bytes(run, options.device)) is not None:
            row.peak_bytes[name] = peak


def operation(name: str, shape: Shape, options: Options) -> Row:
    """Check and time one operation, forward and backward (forward alone in evaluation)."""
    what, make, ours = OPERATIONS[name]
    row = Row(what, shape)
    case = make(shape, options.device)
    truth = case.truth()
    n_outputs = len(case.forward(case.eager))
    functions: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "stock eager": case.eager,
        "ours": case.ours[ours],
    }
    if options.compiled:
        torch._dynamo.reset()  # each shape for itself: no dynamic shapes
        functions["stock compiled"] = torch.compile(case.graph, fullgraph=True, dynamic=False)
    for alternative, function in functions.items():
        try:
            row.errors[alternative] = errors(case.both(function), truth, n_outputs)
        except Exception as error:
            row.missing[alternative] = first_line(error)
    del truth
    if "ours" in row.errors:
        row.wrong = not is_right(row.errors["ours"], row.errors["stock eager"])
    runs: dict[str, Run] = {
        alternative: lambda function=function: case.both(function)
        for alternative, function in functions.items()
        if alternative in row.errors
    }
    _time(row, runs, options, at_most=5)
    return row


def _names(options: Options) -> list[str]:
    return [name for name in ALTERNATIVES if options.compiled or name != "stock compiled"]


def step(models: Models, options: Options) -> Row:
    """Check and time a training step: encoder, decoder, loss, backward, optimizer."""
    row = Row("training step", models.shape)
    steps = {name: models.step(name) for name in _names(options)}
    row.errors = step_errors(steps)
    row.wrong = not is_right(row.errors["ours"], row.errors["stock eager"])
    _time(row, dict(steps), options, at_most=5)
    return row


def epoch(models: Models, options: Options) -> Row:
    """Check and time an epoch of ``SCVI.train``, data loading included."""
    row = Row("SCVI.train, one epoch", models.shape)
    losses = {name: models.epoch_losses(name) for name in ("stock eager", "ours")}
    difference = abs(losses["ours"] / losses["stock eager"] - 1).max()
    row.errors["ours"] = {"value": float(difference)}
    row.wrong = not difference <= EPOCH_TOLERANCE  # true of NaN too
    runs: dict[str, Run] = {name: lambda name=name: models.train(name) for name in _names(options)}
    _time(row, runs, options, at_most=8)
    return row


def n_steps(shape: Shape, options: Options) -> int:
    """Mini-batches in an epoch: more of the small ones."""
    if options.quick:
        return 4
    return max(4, min(16, 8 * ELEMENTS_A_THREAD // (shape.rows * shape.genes)))


def _jobs(options: Options, shape: Shape) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What is measured at one shape, by name; the model is built when it is first needed."""
    if "operations" in options.parts:
        for name, (what, _, _) in OPERATIONS.items():
            yield what, lambda name=name: operation(name, shape, options)
    if not shape.training or not {"step", "epoch"} & set(options.parts):
        return
    built: list[Models] = []

    def models() -> Models:
        if not built:
            torch._dynamo.reset()
            built.append(Models(shape, n_steps(shape, options) * shape.cells, options.device))
        return built[0]

    def quietly(function: Callable[[Models, Options], Row]) -> Row:
        # scvi-tools sets suppress_errors for good. One function of it wraps many, which dynamo
        # compiles anew for each of them: with its own limit it gives up on some.
        with quiet(), torch._dynamo.config.patch(recompile_limit=64, suppress_errors=False):
            return function(models(), options)

    for part, function in (("step", step), ("epoch", epoch)):
        if part in options.parts:
            yield f"training, {part}", lambda function=function: quietly(function)


def run(options: Options, out: Path, say: Callable[[str], Any]) -> bool:
    """Measure, print a line for each result as it comes, and write table, CSV and plots.

    Parameters
    ----------
    options
        What to measure, and where.
    out
        A folder to write into.
    say
        What prints a line.

    Returns
    -------
    bool
        Whether ours was right in everything that was measured, and could be run.

    Raises
    ------
    InputError
        If nothing of what was asked for can be measured here.
    """
    left_out = []
    if importlib.util.find_spec("scvi") is None and {"step", "epoch"} & set(options.parts):
        options = replace(options, parts=tuple(p for p in options.parts if p == "operations"))
        left_out.append(
            "training step and epoch: scvi-tools is not installed (pip install "
            "scvi-tools); the operations are compared with its formulas in plain PyTorch"
        )
    if not options.compiled:
        left_out.append("stock compiled: --no-compile")
    elif reason := no_compiler(options.device):
        options = replace(options, compiled=False)
        left_out.append(f"stock compiled: {reason}")
    available = memory(options.device)
    scaled = {name: scale(SHAPES[name], options, available) for name in options.shapes}
    jobs = [
        (name, what, job)
        for name, (shape, _) in scaled.items()
        for what, job in _jobs(options, shape)
    ]
    if not jobs:
        why = left_out or ["shapes for evaluation have no training step and no epoch"]
        raise InputError(f"nothing is left to measure: {'; '.join(why)}")
    report = suite_report.Report(about(options.device), scaled, left_out)
    say(report.preamble())
    say(report.header())
    with tqdm(jobs, leave=False) as bar:
        while jobs:
            name, what, job = jobs.pop(0)  # which lets go of models that are done with
            bar.set_description(f"{name}: {what}")
            report.rows.append(_attempt(job, what, scaled[name][0], options.device))
            del job
            bar.write(report.line(report.rows[-1]))
            bar.update()
    say(report.conclusion())
    report.write(out, say)
    return not any(row.failed for row in report.rows)


def _attempt(job: Callable[[], Row], what: str, shape: Shape, device: torch.device) -> Row:
    try:
        return job()
    except Exception as error:  # one failure must not cost the other measurements
        return Row(what, shape, missing=dict.fromkeys(ALTERNATIVES, first_line(error)))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
