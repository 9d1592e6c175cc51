"""Everything that wants a GPU: is it right there, how fast, in how much memory.

``make gpu``, or ``python -m bench.gpu`` where the packages are already: under ten minutes on one
GPU. First the tests of the Triton kernels run on the device; then each operation and the whole
decoder with its likelihood are held against float64, and timed against stock (scvi-tools, or the
same formulas in plain PyTorch where it is not installed): eager, eager with tf32, compiled with
tf32. What is wrong is not timed. Results are written as they come, to
``bench/results/<device>-<date>.json``, or into the folder that ``OUT`` names in the environment;
table and plots are made from it.

Times are medians between CUDA events, of calls that take turns through several copies of their
inputs, so that none is in the cache (compiled stock has one copy, to its advantage where that is
small). What takes less than five milliseconds is timed again as a CUDA graph, without the cost of
its launches. Without a GPU the exit status is 2; ``--device cpu --quick`` rehearses the script
there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from decoder_fast import DecoderSCVI
from decoder_fast.backends import choose

from . import costs, count_nll, covariate_linear, report, softmax_library, stock
from .case import (
    PRECISIONS,
    Case,
    Random,
    blocks,
    csr_of,
    errors,
    in_float64,
    is_right,
    layer_options,
    products,
)
from .model import Models, quiet
from .shapes import SHAPES, Shape
from .timing import environment, first_line

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
#: Seconds after which nothing new is begun, and the share of them that the tests may take. What
#: has begun by then, and the plots, still end within ten minutes.
BUDGET, TESTS_SHARE = 480.0, 0.34
#: Seconds that tests which are stopped have to tell what failed: their workers take ten to end.
GRACE = 20.0
#: Should time run out: a small mini-batch, the targets, long rows, Monte-Carlo samples, the rest.
ORDER = ("tutorial", "allgenes", "tahoe", "peaks", "montecarlo")
#: Below this a call is timed as a CUDA graph too: launching may take a large part of it.
GRAPH_BELOW = 5e-3
#: Seconds after which a timing stops, and its calls at least and at most.
SECONDS_A_TIMING, CALLS = 0.12, (5, 60)
Run = Callable[[], object]
Row = dict[str, Any]


# The machine
# -----------


class _HostEvent:
    """A point in time, on a machine without CUDA events."""

    seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


@dataclass(frozen=True)
class Machine:
    """What differs between a GPU and the CPU on which this script is rehearsed."""

    device: torch.device
    name: str
    cache_bytes: int
    compiler: str
    event: Callable[[], Any]
    synchronize: Callable[[], None]
    allocated: Callable[[], int]
    reset_peak: Callable[[], None]
    peak: Callable[[], int]
    free: Callable[[], None]  # what the allocator holds
    capture: Callable[[Run], Run]  # of a graph; returns what replays it
    calls: tuple[int, int]  # of a timing, at least and at most


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _capture(run: Run) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def machine(device: str) -> Machine:
    """Describe the machine."""
    if device == "cpu":
        return Machine(
            device=torch.device("cpu"),
            name="rehearsal-cpu",
            cache_bytes=1 << 13,
            compiler="eager",  # compiles nothing, in no time
            event=_HostEvent,
            synchronize=lambda: None,
            allocated=lambda: 0,
            reset_peak=lambda: None,
            peak=lambda: 0,
            free=lambda: None,
            capture=lambda run: run,
            calls=(2, 2),
        )
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        device=torch.device("cuda", 0),
        name=properties.name,
        cache_bytes=properties.L2_cache_size,
        compiler="inductor",
        event=lambda: torch.cuda.Event(enable_timing=True),
        synchronize=torch.cuda.synchronize,
        allocated=torch.cuda.memory_allocated,
        reset_peak=torch.cuda.reset_peak_memory_stats,
        peak=torch.cuda.max_memory_allocated,
        free=_free,
        capture=_capture,
        calls=CALLS,
    )


def seconds(machine: Machine, runs: list[Run]) -> float:
    """Median seconds of a call; the runs are the same on other inputs, and take turns."""
    for run in runs:
        run()
    machine.synchronize()
    times: list[float] = []
    least, most = machine.calls
    until = time.perf_counter() + SECONDS_A_TIMING
    while len(times) < least or (len(times) < most and time.perf_counter() < until):
        begin, end = machine.event(), machine.event()
        begin.record()
        runs[len(times) % len(runs)]()
        end.record()
        machine.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graph_seconds(machine: Machine, runs: list[Run]) -> float | str:
    """Seconds of a call in a CUDA graph of all the runs, or why there is none."""

    def every() -> None:
        for run in runs:
            run()

    try:
        replay = machine.capture(every)
    except RuntimeError as error:
        machine.synchronize()
        return f"cannot be captured: {first_line(error)}"
    return seconds(machine, [replay]) / len(runs)


def peak_bytes(machine: Machine, run: Run) -> int:
    """Bytes by which memory grows at most while ``run()`` runs, its results included."""
    machine.synchronize()
    before = machine.allocated()
    machine.reset_peak()
    result = run()
    machine.synchronize()
    del result
    return machine.peak() - before


def peaks(machine: Machine, quick: bool) -> dict[str, float]:
    """What the device reaches: bytes a second of a copy, operations a second of products."""
    n, size = (1 << 16, 128) if quick else (1 << 30, 8192)
    source = torch.rand(n, device=machine.device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes
    found = {"copy": copied / seconds(machine, [lambda: target.copy_(source)])}
    a, b = (torch.randn(size, size, device=machine.device) for _ in range(2))
    out = torch.empty_like(a)
    for name in ("fp32", "tf32"):
        with products(name):
            found[name] = 2 * size**3 / seconds(machine, [lambda: torch.mm(a, b, out=out)])
    a, b = a.bfloat16(), b.bfloat16()
    found["bf16"] = 2 * size**3 / seconds(machine, [lambda: a @ b])
    return found


# The decoder
# -----------


def decoder(shape: Shape, device: torch.device, seed: int) -> Case:
    """The decoder and its likelihood, from latent space to losses."""

    torch.manual_seed(seed)
    module = DecoderSCVI(shape.latent, shape.genes, **layer_options(shape))
    module.to(device).train(shape.training)
    random = Random(device, seed)
    z = random.latent(shape, shape.latent).requires_grad_(shape.training)
    batch, library = random.labels(shape.cells, shape.batches), random.library(shape)
    px_r = random.normal(shape.genes).requires_grad_(shape.training)
    x = random.counts(shape.cells, shape.genes)
    csr = csr_of(x)
    unused = {"px_r_decoder"} | ({"px_dropout_decoder"} if shape.likelihood != "zinb" else set())
    leaves = {"z": z} | {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.split(".")[0] not in unused
    }
    if shape.likelihood != "poisson":
        leaves["px_r"] = px_r

    def plain(take: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        rate, dropout = stock.decode(module, z, library, batch)
        return (take(shape.likelihood, x, rate, torch.exp(px_r), dropout),)

    def ours(counts: Tensor) -> tuple[Tensor, ...]:
        poisson = shape.likelihood == "poisson"
        nll = module.reconstruction_loss(
            counts,
            z,
            library,
            batch,
            likelihood=shape.likelihood,
            px_r=None if poisson else px_r,
        )
        return (nll,)

    def truth() -> list[Tensor]:
        """The losses alone: gradients are checked of the operations one by one."""
        wide, losses = in_float64(module), []
        with torch.no_grad():
            hidden = stock.hidden_layers(wide.px_decoder, z.double(), batch)
            for cells in blocks(shape):
                h, size = hidden[..., cells, :], library[cells].double()
                rate = torch.exp(size) * wide.px_scale_decoder(h)
                dropout, theta = wide.px_dropout_decoder(h), torch.exp(px_r.double())
                counts = x[cells].double()
                losses.append(stock.loss(shape.likelihood, counts, rate, theta, dropout))
        return [torch.cat(losses, -1)]

    return Case(
        leaves=leaves,
        upstream=None,
        eager=lambda: plain(stock.checked_loss),
        graph=lambda: plain(stock.loss),
        ours={"ours": lambda: ours(x), "ours, CSR": lambda: ours(csr)},
        truth=truth,
        training=shape.training,
    )


#: What is measured at each shape, and the operations that it consists of.
PARTS: dict[str, tuple[Callable[[Shape, torch.device, int], Case], tuple[str, ...]]] = {
    "count_nll": (count_nll.case, ("count_nll",)),
    "decoder and likelihood": (decoder, ("covariate_linear", "count_nll")),
    "covariate_linear": (covariate_linear.case, ("covariate_linear",)),
    "softmax_library": (softmax_library.case, ("softmax_library",)),
}


# Measuring
# ---------


def _time(
    machine: Machine, cases: list[Case], pick: Callable[[Case], Callable[[], tuple[Tensor, ...]]]
) -> dict[str, Any]:
    """Seconds forward, and forward + backward; as a graph where they are few; peak memory."""
    found: dict[str, Any] = {}
    directions: dict[str, list[Run]] = {
        "forward": [lambda case=case: case.forward(pick(case)) for case in cases]
    }
    if cases[0].training:
        directions["both"] = [lambda case=case: case.both(pick(case)) for case in cases]
    for direction, runs in directions.items():
        found[direction] = seconds(machine, runs)
        if found[direction] < GRAPH_BELOW:
            found[f"{direction}, graph"] = graph_seconds(machine, runs)
    if "both" in found:
        found["backward"] = max(0.0, found["both"] - found["forward"])
    found["peak bytes"] = peak_bytes(machine, runs[0])
    return found


def measure(part: str, shape: Shape, machine: Machine) -> Row:
    """Check, then time, one part at one shape."""
    make, operations = PARTS[part]
    cases = [make(shape, machine.device, 0)]
    inputs = sum(t.nbytes for t in cases[0].leaves.values()) + shape.cells * shape.genes * 4
    copies = min(4, 1 + 3 * machine.cache_bytes // inputs)
    cases += [make(shape, machine.device, seed) for seed in range(1, copies)]
    case = cases[0]
    truth = case.truth()
    n_outputs = len(case.forward(case.eager))
    row: Row = {"part": part, "shape": shape.name, "copies": copies, "errors": {}, "wrong": []}
    needed = sum((costs.NEEDED[name](shape) for name in operations), costs.Needed(0))
    row["needed bytes"], row["needed flops"] = needed.bytes, needed.flops
    row["gradient bytes"] = sum(t.nbytes for t in case.leaves.values()) * case.training
    times: dict[str, Any] = {}
    row["times"] = times
    for precision in PRECISIONS:
        with products(precision):
            stock_error = errors(case.both(case.eager), truth, n_outputs)
            row["errors"][f"stock eager, {precision}"] = stock_error
            if precision != "bf16":
                times[f"stock eager, {precision}"] = _time(machine, cases, lambda c: c.eager)
            if precision == "tf32":
                times[f"stock compiled, {precision}"] = _compiled(machine, case)
            for name in case.ours:
                _try(machine, row, cases, name, precision, (truth, stock_error, n_outputs))
            if part == "count_nll" and precision != "fp32" and machine.device.type == "cuda":
                with count_nll.other_route(shape):
                    _try(
                        *(machine, row, cases, "ours, CSR", precision),
                        (truth, stock_error, n_outputs),
                        by=", other route",
                    )
    return row


def _try(
    machine: Machine,
    row: Row,
    cases: list[Case],
    name: str,
    precision: str,
    expected: tuple[list[Tensor], dict[str, float], int],
    by: str = "",
) -> None:
    """Check one of our ways, and time it if it is right."""
    truth, stock_error, n_outputs = expected
    alternative = f"{name}{by}, {precision}"
    try:
        error = errors(cases[0].both(cases[0].ours[name]), truth, n_outputs)
        row["errors"][alternative] = error
        if is_right(error, stock_error, precision, slack=3):
            row["times"][alternative] = _time(machine, cases, lambda case: case.ours[name])
        else:
            row["wrong"].append(alternative)
    except Exception as error:
        row["times"][alternative] = _failure(machine, error)


def _failure(machine: Machine, error: Exception) -> dict[str, str]:
    """Keep one way's failure from costing the others; but not that of the device."""
    machine.synchronize()
    return {"failed": first_line(error)}


def _compiled(machine: Machine, case: Case) -> dict[str, Any]:
    torch._dynamo.reset()  # each shape for itself: no dynamic shapes
    function = torch.compile(
        case.graph, fullgraph=True, dynamic=False, backend=machine.compiler
    )
    try:
        return _time(machine, [case], lambda _: function)
    except Exception as error:
        return _failure(machine, error)


def training_step(shape: Shape, machine: Machine) -> Row:
    """Loss, gradients and Adam's step of the decoder and its dispersions, in tf32."""
    times: dict[str, Any] = {}
    with products("tf32"):
        for name in ("stock eager", "ours", "ours, CSR"):
            case = decoder(shape, machine.device, 0)
            parameters = [t for k, t in case.leaves.items() if k != "z"]
            adam = torch.optim.Adam(parameters, capturable=machine.device.type == "cuda")
            function = case.graph if name == "stock eager" else case.ours[name]

            def step(function: Any = function, adam: Any = adam) -> None:
                adam.zero_grad()
                function()[0].mean().backward()
                adam.step()

            try:
                times[f"{name}, tf32"] = {
                    "both": seconds(machine, [step]),
                    "both, graph": graph_seconds(machine, [step]),
                    "peak bytes": peak_bytes(machine, step),
                }
            except Exception as error:
                times[f"{name}, tf32"] = _failure(machine, error)
    return {"part": "training step", "shape": shape.name, "times": times, "wrong": []}


def epoch(machine: Machine, quick: bool) -> Row:
    """One epoch of ``SCVI.train``, stock and fused, data loading (and recording) included."""
    shape = _quick(SHAPES["tutorial"]) if quick else SHAPES["tutorial"]
    cells = 256 if quick else 20_000
    models = Models(shape, cells, machine.device)
    times = {}
    ways: dict[str, tuple[str, dict[str, Any]]] = {"stock eager": ("stock eager", {})}
    ways["ours"] = ("ours", {})
    if machine.device.type == "cuda":
        ways["ours, CUDA graph"] = ("ours", {"cuda_graph": True})
    for way, (name, options) in ways.items():
        with quiet():
            models.train(name, **options)
            machine.synchronize()
            began = time.perf_counter()
            models.train(name, **options)
            machine.synchronize()
        times[f"{way}, fp32"] = {"both": time.perf_counter() - began}
    where = f"{cells:,} cells x {shape.genes:,} genes, mini-batches of {shape.cells}"
    return {"part": "SCVI.train, an epoch", "shape": where, "times": times, "wrong": []}


def run_tests(budget: float, quick: bool) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Run the tests that use the device; return verdicts, and the ends of logs that matter."""
    files = sorted((ROOT / "tests").glob("test_*_triton.py"))
    if _found("scvi"):
        files.append(ROOT / "tests" / "test_cuda_graph.py")
    # What only a GPU can run (graphs, streams, autocast) comes first, lest the time end before it;
    # then all files at once.
    alone = {"on a GPU alone": ["-m", "skipif", *map(str, files), *_workers(8)]}
    others = {
        # what is compiled is most of the time, and most is compiled for this operation
        file.name: ["-m", "not skipif", str(file), *_workers(8 if "count_nll" in file.name else 3)]
        for file in files
    }
    missing = [name for name in ("pytest", "hypothesis", "mpmath") if not _found(name)]
    if missing:
        return dict.fromkeys(alone | others, f"not run: no {', '.join(missing)} here"), {}
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    command += ["--collect-only"] * quick
    began = time.perf_counter()
    verdicts: dict[str, str] = {}
    logs: dict[str, list[str]] = {}
    for together, share in ((alone, 0.6), (others, 1.0)):
        for name, found in _pytest(command, together, began + share * budget).items():
            verdicts[name], lines = found
            if verdicts[name].startswith(("failed", "not finished")):
                logs[name] = lines[-40:]
                print("\n".join(logs[name]))
    return verdicts, logs


def _workers(n: int) -> list[str]:
    return ["-n", str(n)] if _found("xdist") else []


def _pytest(
    command: list[str], selections: dict[str, list[str]], until: float
) -> dict[str, tuple[str, list[str]]]:
    """Run pytest on all selections at once: verdicts, and lines of the logs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"  # a log that ends early has all until then
    running, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, selection in selections.items():
            log = open(Path(folder) / name, "w+")
            running[name] = log, subprocess.Popen(
                [*command, *selection],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                # A shell has what runs in the background ignore it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                start_new_session=True,  # with its workers
            )
        late = {
            name
            for name, (_, process) in running.items()
            if not _ends(process, max(1.0, until - time.perf_counter()))
        }
        for name in late:
            running[name][1].send_signal(signal.SIGINT)  # on which pytest tells what failed so far
        for name, (log, process) in running.items():
            _ends(process, GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with log:
                log.seek(0)
                lines = log.read().strip().splitlines() or [""]
            verdict = "failed: " * (process.returncode != 0)
            if name in late:
                failed = any(re.search(r"^[.sxF]*F[.sxF]*( |$)|^FAILED", line) for line in lines)
                verdict = "not finished in time: " + "failed: " * failed
            found[name] = verdict + lines[-1], lines
    return found


def _ends(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Everything
# ----------


class Results:
    """What was found so far, in a file that is written anew after every row."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file = file
        self.content: dict[str, Any] = {**about, "rows": [], "skipped": [], "failed": []}

    def add(self, row: Row) -> None:
        """Add a row."""
        self.content["rows"].append(row)
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Say what was not measured, and why."""
        tqdm.write(f"not measured: {what}: {why}")
        self.content["skipped"].append({"what": what, "why": why})
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, indent=1) + "\n"
        self.file.write_text(text)


def _about(machine: Machine) -> dict[str, Any]:
    about = environment()
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    backends = {
        operation: choose(operation, device=machine.device)
        for operation in ("covariate_linear", "softmax_library", "count_nll")
    }
    return {
        "environment": {**about, "device": machine.name, "triton": triton or "not installed"},
        "stock": "scvi-tools " + v if (v := stock.installed()) else "its formulas in plain PyTorch",
        "backends": {name: choice.backend for name, choice in backends.items()},
        "passed over": {name: choice.reasons for name, choice in backends.items()},
    }


def _quick(shape: Shape) -> Shape:
    """The same model, tiny."""
    return replace(
        shape,
        cells=24,
        genes=40,
        batches=min(3, shape.batches),
        hidden=16,
        latent=5,
        samples=min(2, shape.samples),
    )


def run(
    machine: Machine,
    results: Results,
    began: float,
    budget: float,
    quick: bool,
    wanted: list[str] | None = None,
    tests: bool = True,
) -> None:
    """Measure everything that there is time for."""

    def left(share: float = 1.0) -> float:
        return share * budget - (time.perf_counter() - began)

    # A test that fails keeps nothing from being measured: what is wrong there is not timed.
    results.content["tests"], results.content["test logs"] = (
        run_tests(left(TESTS_SHARE), quick) if tests else ({"all": "not run: --no-tests"}, {})
    )
    for name, verdict in results.content["tests"].items():
        print(f"{name}: {verdict}")
    results.write()
    results.content["peaks"] = peaks(machine, quick)
    lost = ""  # why the device can no longer be used

    def attempt(what: str, make: Callable[[], Row]) -> None:
        nonlocal lost
        if lost or left() <= 0:
            return results.skip(what, lost or "out of time")
        try:
            row = make()
            for name in row["wrong"]:
                tqdm.write(f"WRONG, and not timed: {what}: {name}: {row['errors'][name]}")
            for name, times in row["times"].items():
                if "failed" in times:
                    tqdm.write(f"FAILED: {what}: {name}: {times['failed']}")
                    if name.startswith("ours"):
                        results.content["failed"].append(f"{what}: {name}")
            results.add(row)
        except Exception as error:  # one failure must not cost the other measurements
            results.content["failed"].append(what)
            results.skip(what, first_line(error))
        try:
            machine.synchronize()
            machine.free()
        except RuntimeError as error:  # an assertion or a bad address, of which no GPU recovers
            lost = f"the device failed at {what}: {first_line(error)}"
            results.content["failed"].append(lost)

    names = wanted or [*ORDER, *(name for name in SHAPES if name not in ORDER)]
    shapes = [SHAPES[name] for name in names]
    if quick:
        names = wanted or ["tutorial", "hlca", "peaks", "montecarlo"]
        shapes = [_quick(SHAPES[name]) for name in names]
    attempt("training step", lambda: training_step(shapes[0], machine))
    if _found("scvi"):
        attempt("SCVI.train", lambda: epoch(machine, quick))
    else:
        results.skip("SCVI.train through fuse(model)", "scvi-tools is not installed here")
    # Should time run out, every part has its first shapes.
    jobs = [(part, shape) for shape in shapes for part in PARTS]
    for part, shape in (bar := tqdm(jobs)):
        bar.set_description(f"{part}, {shape.name}")
        attempt(f"{part} at {shape.name}", lambda: measure(part, shape, machine))
    print(f"{budget - left():.0f} s")


def _new_file(folder: Path, stem: str) -> Path:
    """Name a file of results that is not there yet: of several runs a day each has its own."""
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    return next(file for name in names if not (file := folder / f"{name}.json").exists())


def main() -> None:
    """Run what the command line asks for."""
    # Nearly when the process did: imports take the time of a processor.
    began = time.perf_counter() - time.process_time()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a rehearsal")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="NAME",
        help=f"of {', '.join(SHAPES)}; default: all, as long as there is time",
    )
    where = "folder; default: $OUT, else bench/results, if on a GPU"
    parser.add_argument("--out", type=Path, help=where, default=os.environ.get("OUT") or None)
    args = parser.parse_args()
    if args.out is None:
        args.out = RESULTS if args.device == "cuda" else Path(tempfile.mkdtemp())
    if args.device == "cuda" and not torch.cuda.is_available():
        build = "a CPU build of torch" if torch.version.cuda is None else "no GPU or driver"
        print(
            f"There is no GPU to measure: torch {torch.__version__} sees none ({build}). Run this "
            "on a machine with an NVIDIA GPU, its driver and a CUDA build of torch; or rehearse "
            "it with: python -m bench.gpu --device cpu --quick",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.device == "cuda":  # nothing of this is for the CPU's kernels, which take half a minute
        os.environ.setdefault("DECODER_FAST_BUILD", "0")
    here = machine(args.device)
    about = _about(here)
    stem = re.sub(r"[^a-z0-9]+", "-", here.name.lower()).strip("-")
    file = _new_file(args.out, f"{stem}-{about['environment']['date']}")
    results = Results(file, about)
    run(here, results, began, args.budget, args.quick, args.shapes, not args.no_tests)
    file.with_suffix(".md").write_text(text := report.gpu(results.content))
    print(text)
    written = [file, file.with_suffix(".md"), *report.gpu_plots(results.content, file)]
    print("written: " + ", ".join(map(str, written)))
    wrong = [name for row in results.content["rows"] for name in row["wrong"]]
    failed = [v for v in results.content["tests"].values() if re.search(r"\bfailed", v)]
    if bad := [*wrong, *failed, *results.content["failed"]]:
        sys.exit(f"{len(bad)} wrong or failed: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
