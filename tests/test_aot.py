"""The Triton kernels, compiled for GPUs that are not here: what the committed table promises.

The table of the installed version of Triton is in ``bench/results``; ``make aot`` writes it. What
runs here compiles, and this process may interpret kernels: so it runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Bytes of shared memory that a program may take: CUDA's programming guide, compute capabilities.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
#: Minutes, as others may keep the machine busy.
TIME_LIMIT = 900


@pytest.fixture(scope="module")
def version() -> str:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'triton>=3.6,<3.10' (Linux)")
    import triton

    return triton.__version__


@pytest.fixture(scope="module")
def table(version) -> list[dict]:
    file = ROOT / "bench" / "results" / f"aot-triton-{version}.json"
    if not file.exists():
        pytest.skip(f"there is no table for Triton {version}: run `make aot` and commit it")
    return json.loads(file.read_text())["configurations"]


def _run(*args: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


def test_the_table_is_what_is_launched_and_what_the_compiler_says(table):
    """Every configuration is in it, as it is now; a sample of them compiles to the same numbers."""
    done = _run("-m", "bench.aot", "--check", "--sample", "32")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_no_kernel_spills_or_takes_more_than_a_gpu_has(table):
    assert {row["kernel"].split(".")[0] for row in table} == {
        "count_nll",
        "covariate_linear",
        "softmax_library",
    }
    for row in table:
        targets = {t for t in row["results"] if t.startswith("sm_")}
        assert targets == (set(SHARED) if row["backend"] == "cuda" else set())
        for target in targets:
            result, where = row["results"][target], f"{row['kernel']} on {target}: {row}"
            assert result["spills"] == result["stack"] == 0, where
            assert result["shared"] <= SHARED[target] << 10, where


def test_tensor_cores_take_the_products_where_promised(table):
    found = set()
    for row in table:
        precision = row["arguments"].get("PRECISION", "ieee")
        if precision != "ieee" and row["backend"] == "cuda":
            for target, result in row["results"].items():
                assert result["matrix"], f"{row['kernel']} in {precision} on {target}"
                found.add((precision, target))
    assert found == {(p, t) for p in ("tf32", "bf16") for t in SHARED}


def test_what_is_wrong_is_found(version):
    """A table that is out of date, and kernels that spill: in a process, on two configurations."""
    script = """
        import copy
        from bench import aot

        good = {"registers": 64, "stack": 0, "spills": 0, "matrix": "wgmma", "shared": 1024}
        row = {
            "kernel": "some.kernel", "backend": "cuda", "arguments": {"PRECISION": "tf32"},
            "constexprs": ["PRECISION"], "options": {}, "shapes": ["tutorial"],
        }
        one = {"id": "a", "source": "1", **row, "results": {"sm_90": good}}
        two = {"id": "b", "source": "1", **row, "results": {"sm_90": good}}
        assert aot.faults(one, "sm_90", good) == []
        for change in (
            {"spills": 2}, {"stack": 8}, {"matrix": ""}, {"shared": 1 << 20}, {"error": "no"}
        ):
            assert len(aot.faults(one, "sm_90", good | change)) == 1, change

        launched = [one, two]
        aot._recorded = lambda: copy.deepcopy(launched)

        def found(table):
            aot.load = lambda file: copy.deepcopy(table)
            return aot.check(1, 0, ["sm_90"])

        assert found([one, two]) == []
        assert "not in the table" in found([one])[0]
        assert "not launched" in found([one, two, {**two, "id": "c"}])[0]
        assert "has changed" in found([one, {**two, "source": "2"}])[0]
        assert "other shapes" in found([one, {**two, "shapes": []}])[0]
        spilled = {"sm_90": good | {"spills": 3}}
        assert "spills" in found([one, {**two, "results": spilled}])[0]
        assert "no table" in found([])[0]

        aot.compile_all = lambda jobs, processes: ((c, t, good | {"registers": 9}) for c, t in jobs)
        aot.load = lambda file: [one, two]
        assert "the table says" in aot.check(1, 1, ["sm_90"])[0]
    """
    done = _run("-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


def test_factors_in_tf32_are_rounded(version, tmp_path):
    """As cuBLAS rounds them; tensor cores by themselves drop bits, and every product shrinks."""
    script = """
        import sys

        import triton
        import triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from decoder_fast.triton_kernels.common import dot


        @triton.jit
        def product(a, b, out, PRECISION: tl.constexpr):
            i = tl.arange(0, 32)
            square = i[:, None] * 32 + i[None, :]
            zeros = tl.zeros((32, 32), tl.float32)
            tl.store(out + square, dot(tl.load(a + square), tl.load(b + square), zeros, PRECISION))


        for architecture in (80, 90, 120):
            for precision in ("ieee", "tf32", "bf16"):
                source = ASTSource(
                    product,
                    {"a": "*fp32", "b": "*fp32", "out": "*fp32", "PRECISION": "constexpr"},
                    {(3,): precision},
                )
                done = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
                assert ("cvt.rna.tf32" in done.asm["ptx"]) == (precision == "tf32"), precision
    """
    file = tmp_path / "product.py"  # Triton reads a kernel's source from its file
    file.write_text(textwrap.dedent(script))
    done = _run(str(file))
    assert done.returncode == 0, done.stderr
