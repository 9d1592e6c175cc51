"""The benchmarks: that they compare with what scvi-tools computes, and time nothing wrong."""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import decoder_fast.nn as fast_nn
from decoder_fast import DecoderSCVI, backends, cli
from decoder_fast.bench import count_nll, readme, suite, suite_report, timing
from decoder_fast.bench import stock as plain
from decoder_fast.bench.shapes import SHAPES, Shape

ROOT = Path(__file__).parent.parent
OPERATIONS = {what for what, *_ in suite.OPERATIONS.values()}
TRAINING = {"training step", "SCVI.train, one epoch"}
OUTPUTS = {"benchmark.csv", "benchmark.md", "speed-up.png", "memory.png"}
TINY = {
    "tutorial": Shape("tutorial", 16, 40, 3, 16, 1, 5, "zinb", "batch"),
    "montecarlo": Shape("montecarlo", 8, 40, 3, 16, 1, 5, "nb", "batch", 2, False),
}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run ``decoder-fast bench`` on tiny shapes; return status, lines of the CSV, and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "SHAPES", TINY)

    def run(*arguments, shapes=("tutorial",)):
        status = cli.main(["bench", "--quick", "--shapes", *shapes, "--out", "out", *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        file = tmp_path / "out" / "benchmark.csv"
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        return status, rows, said.out + said.err

    return run


def of(rows, alternative):
    return {(row["shape"], row["what"]): row for row in rows if row["alternative"] == alternative}


def test_users_benchmark(bench, tmp_path, monkeypatch):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    # the same way through the code as inductor, without its minutes
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    status, rows, printed = bench(shapes=list(TINY))
    assert status == 0, printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no logs of the trainer
    for name in ("speed-up.png", "memory.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    everything = set(itertools.product(TINY, OPERATIONS | TRAINING))
    everything -= set(itertools.product(["montecarlo"], TRAINING))  # it is for evaluation
    for alternative in ("stock eager", "stock compiled", "ours"):
        found = of(rows, alternative)
        assert set(found) == everything
        for key, row in found.items():
            assert row["status"] == "ok", (key, row)
            assert float(row["seconds"]) > 0
            if sys.platform == "linux":
                assert int(row["peak_bytes"]) >= 0
            assert float(row["times_faster"]) == pytest.approx(
                float(row["seconds"]) / float(of(rows, "ours")[key]["seconds"])
            )
    table = (tmp_path / "out" / "benchmark.md").read_text()
    for what in OPERATIONS | TRAINING:
        assert f"| {what} | tutorial |" in table
        assert f"\n{what} " in printed
    assert "16 cells x 40 genes, 3 batches, 1 layer of 16, zinb; as it is" in printed
    assert "2 samples of 8 cells" in printed and "evaluation: forward alone" in printed
    assert "Where ours is slower, wrong or failed" in printed


def test_every_operation_is_measured():
    assert set(suite.OPERATIONS) == set(backends.OPERATIONS)


def too_large(function):
    @functools.wraps(function)
    def wrong(*args, **kwargs):
        return function(*args, **kwargs) * 1.001

    return wrong


@pytest.mark.parametrize("broken", ["an operation", "the model", "not a number", "raises"])
def test_what_is_wrong_is_not_timed(bench, monkeypatch, broken):
    parts = ["operations"]
    if broken == "the model":
        pytest.importorskip("scvi", reason="scvi-tools is not installed")
        bad, parts = TRAINING, ["step", "epoch"]
        monkeypatch.setattr(fast_nn, "count_nll", too_large(fast_nn.count_nll))
    else:
        bad = {"heads + likelihood"}
        change = {
            "an operation": too_large,
            "not a number": lambda f: lambda *a, **k: f(*a, **k) * torch.nan,
            "raises": lambda f: lambda *a, **k: torch.tensor([[1.0]]).view(7),
        }[broken]
        monkeypatch.setattr(count_nll, "count_nll", change(count_nll.count_nll))
    status, rows, printed = bench("--no-compile", "--parts", *parts)
    assert status == 1
    assert {what for _, what in of(rows, "ours")} >= bad
    for (_, what), row in of(rows, "ours").items():
        if what not in bad:
            assert row["status"] == "ok"
            continue
        assert row["seconds"] == row["times_faster"] == row["peak_bytes"] == ""
        if broken == "raises":
            assert "RuntimeError" in row["status"]
            assert f"failed: {what}, tutorial, ours: RuntimeError" in printed
        else:
            assert row["status"] == "wrong"
            assert f"WRONG, and not timed: {what}, tutorial" in printed
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{what} ")]
        assert "failed" in line if broken == "raises" else "wrong" in line
    for row in of(rows, "stock eager").values():
        assert float(row["seconds"]) > 0
        assert (row["times_faster"] == "") == (row["what"] in bad)


def test_without_a_compiler_or_scvi_tools(bench, monkeypatch):
    """What cannot be measured is left out, and the reason is in the output."""
    find = importlib.util.find_spec
    gone = {"scvi", "matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a)
    )

    def compile(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", compile)
    status, rows, printed = bench()
    assert status == 0
    assert {what for _, what in of(rows, "ours")} == OPERATIONS
    assert {row["status"] for row in of(rows, "stock compiled").values()} == {"not run"}
    assert "torch.compile fails here: RuntimeError: No working C++ compiler found" in printed
    assert "training step and epoch: scvi-tools is not installed" in printed
    assert "no plots: matplotlib is not installed" in printed
    status, _, printed = bench("--overwrite", "--parts", "step", "epoch")
    assert status == 2
    assert "nothing is left to measure: training step and epoch: scvi-tools is" in printed


def test_arguments_of_the_benchmark(bench, tmp_path):
    def fails(message, *arguments, **options):
        status, _, printed = bench(*arguments, **options)
        assert status == 2
        assert message in printed

    fails("invalid choice: 'nonsense'", shapes=["nonsense"])
    fails("invalid choice: 'kernels'", "--parts", "kernels")
    fails("0 is less than 1", "--threads", "0")
    if not torch.cuda.is_available():
        fails("--device cuda: torch sees no GPU here", "--device", "cuda")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")  # of a training
    fails("exists already")
    fails("was not written by decoder-fast", "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]

    (tmp_path / "out" / "summary.json").rename(tmp_path / "out" / "benchmark.csv")
    threads = torch.get_num_threads()
    arguments = ("--overwrite", "--parts", "operations", "--no-compile", "--threads", "1")
    status, rows, printed = bench(*arguments)
    assert status == 0
    assert {what for _, what in of(rows, "ours")} == OPERATIONS
    assert rows[0]["device"].endswith(", 1 thread")
    assert "stock compiled: --no-compile" in printed
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_scaled_to_the_machine(monkeypatch, name, threads):
    shape = SHAPES[name]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options = suite.Options(shapes=(name,))
    scaled, how = suite.scale(shape, options, 1 << 40)
    limit = threads * suite.ELEMENTS_A_THREAD
    assert scaled.genes == shape.genes
    assert scaled.cells == suite.LEAST_CELLS or scaled.rows * scaled.genes <= limit
    assert (scaled == shape) == (how == "as it is")
    if scaled != shape:
        assert scaled.rows * scaled.genes * 2 > limit or scaled.cells == suite.LEAST_CELLS
        assert f"{scaled.cells:,} cells a mini-batch instead of {shape.cells:,}" in how
        assert f"{threads} thread" in how and "memory" not in how

    small, how = suite.scale(shape, options, 1 << 30)
    smallest = small.cells == suite.LEAST_CELLS and small.genes < 2 * suite.LEAST_GENES
    assert smallest or suite.estimated_bytes(small) <= suite.MEMORY_SHARE * 2**30
    if suite.estimated_bytes(scaled) > suite.MEMORY_SHARE * 2**30:
        assert "1 GiB of memory" in how
        assert small.genes == shape.genes or f"{small.genes:,} genes" in how
    assert replace(small, cells=shape.cells, genes=shape.genes) == shape


def test_a_gpu_is_limited_by_memory_alone():
    options = suite.Options(shapes=(), device=torch.device("cuda"))
    assert suite.scale(SHAPES["allgenes"], options, 100 << 30) == (SHAPES["allgenes"], "as it is")
    assert suite.scale(SHAPES["tahoe"], options, 16 << 30)[0].cells < SHAPES["tahoe"].cells


def test_turns_end_in_time():
    calls = dict.fromkeys("ab", 0)

    def call(name):
        calls[name] += 1

    runs = {name: functools.partial(call, name) for name in calls}
    timing.interleaved(runs, repeats=100, at_least=0, at_most=0)
    assert set(calls.values()) == {1 + 3}
    timing.interleaved(runs, repeats=5, at_least=0)
    assert set(calls.values()) == {1 + 3 + 1 + 5}


def test_the_readme_shows_the_newest_results(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run: python -m bench.readme"

    folder = tmp_path / "bench" / "results" / "device"
    folder.mkdir(parents=True)
    table = "| what | ours |\n| --- | --- |\n| epoch | 1 |"
    (folder / suite_report.TABLE).write_text(f"A device; a date\n\n{table}\n\nmore\n")
    (folder / "speed-up.png").touch()
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    once = readme.updated(text)
    assert table in once and "](bench/results/device/speed-up.png)" in once
    assert "memory.png" not in once.partition(readme.BEGIN)[2]
    assert "**A device; a date**" in once and "Not yet measured." not in once
    assert readme.updated(once) == once


def test_the_operations_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    chosen = "tutorial and softmax_library and (eager or ours)"
    options = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", chosen, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout and "softmax_library, tutorial" in done.stdout


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr and "--device cpu --quick" in done.stderr


def test_the_rehearsal_measures_everything(tmp_path, monkeypatch):
    """Every line of the GPU script but those that CUDA itself runs, on tiny shapes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    parts = {row["part"] for row in result["rows"]}
    measured = {"count_nll", "softmax_library", "covariate_linear", "decoder and likelihood"}
    assert measured | {"training step"} <= parts
    assert set(result["peaks"]) == {"copy", "fp32", "tf32", "bf16"}
    for row in result["rows"]:
        assert row["wrong"] == []
        for times in row["times"].values():
            assert times["both" if "both" in times else "forward"] > 0
    text = file.with_suffix(".md").read_text()
    assert all(f"## {part}" in text for part in parts)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """``bench.gpu``, whose measurements cost nothing; each is noted, and may be made to fail."""
    monkeypatch.syspath_prepend(ROOT)
    gpu = importlib.import_module("bench.gpu")
    noted = []

    def measure(part, shape, machine):
        noted.append((part, shape.name))
        return {"part": part, "shape": shape.name, "times": {}, "wrong": []}

    def run(measure=measure, tests=None, **of_machine):
        machine = replace(gpu.machine("cpu"), **of_machine)
        monkeypatch.setattr(gpu, "machine", lambda device: machine)
        monkeypatch.setattr(gpu, "run_tests", lambda *_: (tests or {}, {}))
        monkeypatch.setattr(gpu, "measure", measure)
        monkeypatch.setattr(gpu, "training_step", lambda shape, _: measure("step", shape, _))
        monkeypatch.setattr(gpu, "_found", lambda package: False)
        monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cpu", "--quick"])
        monkeypatch.setenv("OUT", str(tmp_path))
        with pytest.raises(SystemExit, match="wrong or failed"):
            gpu.main()
        (file,) = tmp_path.glob("*.json")
        assert file.with_suffix(".md").read_text()
        return json.loads(file.read_text())

    run.noted, run.measure = noted, measure
    return run


def test_tests_that_fail_keep_nothing_from_being_measured(gpu):
    result = gpu(tests={"test_count_nll_triton.py": "failed: 1 failed, 2 passed"})
    parts = ["count_nll", "decoder and likelihood", "covariate_linear", "softmax_library"]
    assert [part for part, _ in gpu.noted][:6] == ["step", *parts, parts[0]]  # shape by shape
    assert len(result["rows"]) == len(gpu.noted) == 1 + 4 * len(parts)


def test_an_error_without_a_message(gpu):
    def fails(part, shape, machine):
        if part == "count_nll":
            raise RuntimeError
        return gpu.measure(part, shape, machine)

    result = gpu(fails)
    assert len(result["failed"]) == 4 and len(result["rows"]) == 1 + 4 * 3


def test_a_device_that_is_lost_ends_the_measurements_but_not_the_report(gpu):
    def synchronize():
        if len(gpu.noted) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = gpu(synchronize=synchronize, free=synchronize)
    assert len(result["rows"]) == len(gpu.noted) == 3
    assert "illegal memory access" in result["skipped"][-1]["why"]


def test_one_way_that_fails_costs_no_other(gpu):
    def measure(part, shape, machine):
        row = gpu.measure(part, shape, machine)
        if part == "count_nll":
            row["times"] = {
                "stock eager, tf32": {"both": 2.0},
                "ours, tf32": {"both": 1.0},
                "ours, CSR, tf32": {"failed": "RuntimeError: Message length"},
            }
            row |= {"needed bytes": 1.0, "needed flops": 1.0, "gradient bytes": 0.0}
        return row

    result = gpu(measure)
    assert result["failed"] == [
        f"count_nll at {name}: ours, CSR, tf32"
        for name in ("tutorial", "hlca", "peaks", "montecarlo")
    ]
    assert sum("both" in row["times"].get("ours, tf32", {}) for row in result["rows"]) == 4


def test_a_way_that_raises_is_noted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    gpu = importlib.import_module("bench.gpu")

    def fails():
        raise RuntimeError("Message length must be smaller than 255\nand more")

    row = {"times": {}, "errors": {}, "wrong": []}
    case = SimpleNamespace(both=lambda run: run(), ours={"ours": fails})
    gpu._try(gpu.machine("cpu"), row, [case], "ours", "tf32", ([], {}, 1))
    failed = {"failed": "RuntimeError: Message length must be smaller than 255"}
    assert row == {"times": {"ours, tf32": failed}, "errors": {}, "wrong": []}


def test_results_of_a_day_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    gpu = importlib.import_module("bench.gpu")
    names = []
    for _ in range(3):
        names.append(gpu._new_file(tmp_path, "h200"))
        names[-1].write_text("{}")
    assert [file.name for file in names] == ["h200.json", "h200-2.json", "h200-3.json"]


@pytest.mark.parametrize("late", [False, True])
def test_what_failed_is_told(tmp_path, monkeypatch, late):
    """Also where the time ends before the tests do."""
    monkeypatch.syspath_prepend(ROOT)
    gpu = importlib.import_module("bench.gpu")
    (tmp_path / "test_it.py").write_text(
        "import time\n"
        "def test_a():\n    assert 'this' == 'seen'\n"
        f"def test_b():\n    time.sleep({60 * late})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    until = time.perf_counter() + (4 if late else 60)
    ((verdict, lines),) = gpu._pytest(command, {"it": [str(tmp_path)]}, until).values()
    expected = "not finished in time: failed: 1 failed" if late else "failed: 1 failed"
    assert verdict.startswith(expected)
    assert any("assert 'this' == 'seen'" in line for line in lines)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_the_plain_formulas_are_those_of_scvi_tools(likelihood):
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    torch.manual_seed(0)
    x = torch.poisson(torch.rand(20, 30) * 3)
    rate, theta, dropout = torch.rand(20, 30) * 5 + 0.01, torch.rand(30) + 0.1, torch.randn(20, 30)
    args = (likelihood, x, rate, theta, dropout)
    torch.testing.assert_close(plain.loss(*args), plain.checked_loss(*args))


@pytest.mark.parametrize("samples", [(), (2,)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("inject_covariates", [True, False])
def test_the_plain_decoder_is_that_of_scvi_tools(samples, norm, inject_covariates):
    nn = pytest.importorskip("scvi.nn", reason="scvi-tools is not installed")
    options = {
        "n_cat_list": [3],
        "n_layers": 2,
        "n_hidden": 16,
        "inject_covariates": inject_covariates,
        "use_batch_norm": norm == "batch",
        "use_layer_norm": norm == "layer",
    }
    stock, ours = nn.DecoderSCVI(5, 30, **options), DecoderSCVI(5, 30, **options)
    ours.load_state_dict(stock.state_dict())
    z, library = torch.randn(*samples, 12, 5), torch.randn(12, 1)
    batch = torch.randint(3, (12, 1))
    _, _, rate, dropout = stock("gene", z, library, batch)
    torch.testing.assert_close(plain.decode(ours, z, library, batch), (rate, dropout))
