"""The native CPU kernel of count_nll: values, memory, threads and instruction sets.

What every backend must do is tested in test_count_nll.py; here is what only this one can get wrong:
blocks, chunks and tiles with remainders, its own vector mathematics, threads, raw memory.
``tests/sanitize.sh`` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference64
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import rerun
from reference64 import FLOAT32_FLOOR, Recorder, assert_accurate
from test_count_nll import Problem, assert_identical, stock_nll, to_csr

from decoder_fast import native
from decoder_fast.backends import choose
from decoder_fast.cpp import count_nll as cpp
from decoder_fast.functional import count_nll

try:
    choose("count_nll", "cpp", device=torch.device("cpu"))
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
#: Likelihood and dispersion; a Poisson distribution has none.
MODELS = [
    *itertools.product(("nb", "zinb"), ("gene", "table", "head")),
    ("poisson", None),
]
ACTIVATIONS = ("softmax", "softplus")
INTEGERS = (
    "int8 uint8 int16 uint16 int32 uint32 int64 uint64"  # torch cannot compute with some of them
).split()
DTYPES = ["float32", "float64", "bfloat16", "float16", *INTEGERS]
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

every_model = pytest.mark.parametrize(("likelihood", "dispersion"), MODELS)
every_activation = pytest.mark.parametrize("scale_activation", ACTIVATIONS)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not CSRC.is_dir(),
    reason="compiles a test program: needs g++ and the folder csrc",
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and mmap")


@pytest.fixture(autouse=True)
def threads():
    """One thread, unless a test sets more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison():
    """New tensors hold NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(likelihood="zinb", dispersion="gene", scale_activation="softmax", **shape):
    """Build a float32 problem whose logits have the same spread however many units are hidden."""
    problem = Problem(likelihood, dispersion, scale_activation, dtype=torch.float32, **shape)
    n_hidden = problem.tensors["hidden"].shape[-1]
    for name, tensor in problem.tensors.items():
        if name.endswith("weight"):
            tensor *= min(1.0, (13 / n_hidden) ** 0.5)
    return problem


def run(problem, **options):
    return problem.evaluate(dtype=torch.float32, backend="cpp", **options)


def assert_right(got, truth, stock=(None, {})):
    """To 1e-6 for the loss and 1e-5 for gradients; a gradient that was not asked for is None."""
    assert got[0].dtype == torch.float32
    assert_accurate("nll", got[0], truth[0], stock[0], 1e-6)
    for name, value in truth[1].items():
        if value is None:
            assert got[1][name] is None, name
        else:
            assert got[1][name].shape == value.shape
            assert_accurate(name, got[1][name], value, stock[1].get(name), 1e-5)


# ---------------------------------------------------------------------------------------------
# Shapes


def count_tensor(x, layout, dtype):
    """Counts in a layout and dtype, and what they are in float64."""
    dtype = getattr(torch, dtype)
    if not dtype.is_floating_point:
        x = x.floor().clamp(max=100)  # of int8
    stored = x.to(dtype) if layout == "dense" else to_csr(x, index=layout, dtype=dtype)
    return stored, x.double()


@settings(max_examples=300)
@given(
    model=st.sampled_from(MODELS),
    scale_activation=st.sampled_from(ACTIVATIONS),
    samples=st.sampled_from([None, 1, 2, 3]),
    # Blocks have 256 rows at most, and chunks 96 to 192 genes; 16 and 6 are the kernel's own steps.
    n=st.one_of(st.integers(1, 40), st.integers(1, 400), st.sampled_from([16, 255, 256, 257])),
    genes=st.one_of(
        st.integers(1, 40), st.integers(1, 700), st.sampled_from([95, 96, 97, 192, 193, 576])
    ),
    hidden=st.one_of(st.integers(1, 20), st.integers(1, 200), st.sampled_from([16, 64, 128])),
    biases=st.booleans(),
    layout=st.sampled_from(["dense", torch.int32, torch.int64]),
    dtype=st.sampled_from(DTYPES),
    upstream=st.sampled_from(["one", "two", "expanded", "varying"]),
    wanted=st.integers(1, (1 << 9) - 1),
    seed=st.integers(0, 99),
)
def test_fuzz(model, scale_activation, layout, dtype, upstream, wanted, **shape):
    """Any shape, model, kind of counts, set of gradients and upstream gradient."""
    if (shape["samples"] or 1) * shape["n"] * shape["genes"] > 100_000:
        shape["n"] = 100_000 // ((shape["samples"] or 1) * shape["genes"])
    problem = make(*model, scale_activation, **shape)
    x, problem.x = count_tensor(problem.x, layout, dtype)
    if upstream == "expanded":
        problem.upstream = torch.tensor(-0.5).expand(problem.upstream.shape)
    elif upstream != "varying":
        problem.upstream = torch.full_like(problem.upstream, {"one": 1.0, "two": 2.0}[upstream])
    names = [name for k, name in enumerate(problem.tensors) if wanted >> k & 1]
    names = names or ["hidden"]
    truth = problem.evaluate(reference64.count_nll, wanted=names)
    assert_right(run(problem, x=x, wanted=names), truth)


@every_activation
@every_model
@pytest.mark.parametrize(
    ("samples", "n", "genes"),
    # Chunks are 1/32 of the genes, and have a second tile from 6145 genes on; of 6200, the last
    # chunk has none.
    [(None, 300, 1703), (3, 101, 700), (None, 20, 6500), (2, 9, 6200)],
)
def test_many_blocks_and_chunks(likelihood, dispersion, scale_activation, samples, n, genes, stock):
    """Several blocks, chunks and tiles, each with a remainder; no worse than stock."""
    problem = make(
        likelihood, dispersion, scale_activation, samples=samples, n=n, genes=genes, hidden=35
    )
    problem.x *= torch.rand(problem.x.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    theirs = problem.evaluate(stock_nll(stock), torch.float32)
    truth = problem.truth()
    assert_right(run(problem), truth, theirs)
    assert_right(run(problem, x=problem.x.to_sparse_csr()), truth, theirs)


def test_more_genes_than_a_block_of_256_cells_has_memory_for(stock):
    problem = make("poisson", None, n=70, genes=70_000, hidden=2)
    theirs = problem.evaluate(stock_nll(stock), torch.float32)
    assert_right(run(problem), problem.truth(), theirs)


@every_activation
@every_model
def test_no_zero_among_the_counts(likelihood, dispersion, scale_activation):
    """The lists of non-zeros are full."""
    problem = make(likelihood, dispersion, scale_activation, n=260, genes=200, hidden=5)
    problem.x += 1
    truth = problem.truth()
    for x in (problem.x, problem.x.to_sparse_csr()):
        assert_right(run(problem, x=x), truth)


def grid():
    """Few, small problems that together pass through all of the kernel."""
    shapes = [(1, 1, 1), (17, 7, 5), (40, 97, 16), (270, 205, 33)]
    for k, (model, activation) in enumerate(itertools.product(MODELS, ACTIVATIONS)):
        n, genes, hidden = shapes[k % len(shapes)]
        yield make(*model, activation, n=n, genes=genes, hidden=hidden, seed=k)


def test_grid():
    """Also run in a process of its own for every instruction set."""
    asked = os.environ.get("DECODER_FAST_INSTRUCTION_SET")
    assert asked is None or native.describe()["instruction set"] == asked
    for problem in grid():
        truth = problem.truth()
        for dtype, layout in (("float32", "dense"), ("int32", torch.int32)):
            x, problem.x = count_tensor(problem.x, layout, dtype)
            truth = problem.truth()
            assert_right(run(problem, x=x), truth)
        for dtype in ("float64", *INTEGERS):
            expected = run(problem)
            assert_identical(run(problem, x=problem.x.to(getattr(torch, dtype))), expected)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set):
    if instruction_set == native.describe()["instruction set"]:
        pytest.skip(f"{instruction_set} is what every other test runs on here")
    rerun(instruction_set, __file__, "test_grid or test_elements")


@every_model
@pytest.mark.parametrize(("n", "genes"), [(1, 50), (50, 1), (1, 1), (0, 9)])
def test_one_or_none(likelihood, dispersion, n, genes):
    problem = make(likelihood, dispersion, n=n, genes=genes, hidden=3)
    for x in (problem.x, problem.x.to_sparse_csr()):
        assert_right(run(problem, x=x), problem.truth())


@pytest.mark.parametrize("dispersion", ["gene", "table", "head"])
def test_many_rows(dispersion, stock):
    """Sums over 20,000 cells, all of one category and weighted alike, are no worse than stock's."""
    problem = make("nb", dispersion, n=20_000, genes=9, hidden=2)
    if dispersion == "table":
        problem.options["px_r_index"].zero_()
    problem.upstream.fill_(1.0)
    theirs = problem.evaluate(stock_nll(stock), torch.float32)
    assert_right(run(problem), problem.truth(), theirs)


# ---------------------------------------------------------------------------------------------
# Values


def extreme_elements(likelihood):
    """Count, log mean, log theta and dropout logit of the elements to test; float32."""
    generator = torch.Generator().manual_seed(3)

    def uniform(n, low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    n = 250
    ten = torch.tensor(10.0).log()
    x = (10 ** uniform(n, 0, 6)).floor()
    x[::2] = 0
    x[1::4] = (10 ** uniform(len(x[1::4]), 0, 1.3)).floor()
    x[3::8] += 0.37
    x[7::16] *= 1e-6
    random = [x, ten * uniform(n, -12, 7), ten * uniform(n, -6, 6), uniform(n, -50, 50)]
    # Counts at their means, where the likelihood is smallest.
    near = torch.arange(1.0, 21.0)
    near = torch.stack([near, near.log(), ten * uniform(20, 0, 6), uniform(20, -9, 0)])
    # Zeros that neither dropout nor the counts explain: both have vanished in float32.
    vanished = [
        torch.zeros(n),
        ten * uniform(n, 1, 7),
        ten * uniform(n, 0, 3),
        uniform(n, -200, -50),
    ]
    if likelihood == "zinb":
        random = [torch.cat(pair) for pair in zip(random, vanished, strict=True)]
    random = torch.cat([torch.stack(random), near], 1)
    if likelihood == "poisson":
        random[2:] = 0
        corners = itertools.product([0, 1, 2.5, 8, 9, 1e6], [-12, -3, 0, 7], [0], [0])
    else:
        d = [-200, -50, 0, 50, 200] if likelihood == "zinb" else [0]
        corners = itertools.product([0, 1, 2.5, 8, 1e6], [-12, 0, 7], [-6, 0, 6], d)
    corners = torch.tensor(list(corners), dtype=torch.float32).t() * torch.tensor(
        [[1], [ten], [ten], [1]]
    )
    return torch.cat([random, corners], 1)


# mu and theta are float32 numbers in the kernel, which an exponential and a product have rounded.
ROUNDING = 2 * FLOAT32_FLOOR


def exact_elements(likelihood, x, mu, theta, d):
    """Negative log-likelihood and its derivatives by log(mu), log(theta) and d; and the yardstick.

    A result is held to its own size, but where it crosses zero or hangs on mu by a power, nothing
    that starts from a rounded mu can be as good. The yardstick is how far the exact result moves
    where mu and theta move by ROUNDING; where results are well-conditioned that is less than what
    is allowed anyway. Two limits of the number formats come to it, far below what matters.
    """

    def exact(likelihood, mu, theta):
        results = reference64.exact_log_prob(likelihood, x, mu, theta, d)
        scale = (1, mu, theta, 1)
        return torch.tensor(
            [-r * s for r, s in zip(results, scale, strict=False)], dtype=torch.float64
        )

    truth = exact(likelihood, mu, theta)
    moved = (exact(likelihood, mu * (1 + ROUNDING), theta) - truth).abs()
    if likelihood != "poisson":
        moved += (exact(likelihood, mu, theta * (1 + ROUNDING)) - truth).abs()
        # At counts, terms of size x are summed in float64; by log(theta) they may nearly cancel.
        moved[2] += 2**-50 * x
    if likelihood == "zinb" and x == 0:
        # The probabilities of dropout and of no count without it are float32 numbers: 1e-38, or
        # nothing. (With p0, their sum, below 1e-30 the kernel computes in logarithms.)
        p0 = truth[0].neg().exp().clamp(min=1e-30)
        moved[:3] += 1.2e-38 / p0 * exact("nb", mu, theta).abs()
        moved[3] += 1.2e-38 / p0
    return truth, moved


def assert_elements(got, truth, moved, rtol, what):
    # Below 1e-37 float32 has no full precision.
    allowed = torch.maximum(rtol * truth.abs(), moved).clamp(min=1e-37)
    wrong = (got.double() - truth).abs() / allowed
    worst = int(wrong.nan_to_num(torch.inf).argmax())
    assert wrong[worst] <= 1, f"{what}: element {worst} is {got[worst]}, expected {truth[worst]}"


@pytest.mark.parametrize("dispersion", ["table", "head"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_elements(likelihood, dispersion):
    """Element by element, by problems of one gene: the loss to 1e-6, each derivative to 1e-5.

    The library dials the mean, as the only logit is 0; a row of the table is an element's theta.
    """
    if likelihood == "poisson" and dispersion == "head":
        pytest.skip("a Poisson distribution has no dispersion: there is one case only")
    x, log_mu, log_theta, d = extreme_elements(likelihood)
    n = len(x)
    log_2 = torch.tensor(2.0, dtype=torch.float64).log()
    tensors = {"library": (log_mu[:, None] - log_2.log()).float()}
    # Two hidden units: one for each head that has to vary by cell.
    tensors["hidden"] = torch.stack([d, log_theta], 1)
    tensors["scale_weight"] = torch.zeros(1, 2)
    options = dict(likelihood=likelihood, scale_activation="softplus", backend="cpp")
    if likelihood == "zinb":
        tensors["dropout_weight"] = torch.tensor([[1.0, 0.0]])
    if likelihood != "poisson" and dispersion == "table":
        tensors["px_r"] = log_theta[None]
        options["px_r_index"] = torch.arange(n)
    elif likelihood != "poisson":
        tensors["r_weight"] = torch.tensor([[0.0, 1.0]])
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    nll = count_nll(x[:, None], **leaves, **options)
    nll.sum().backward()
    with torch.no_grad():  # another instance of the kernel's template
        assert torch.equal(count_nll(x[:, None], **tensors, **options), nll)

    mu = tensors["library"][:, 0].double().exp() * log_2
    rows = zip(x.tolist(), mu.tolist(), log_theta.double().exp().tolist(), d.tolist(), strict=True)
    truth, moved = map(
        torch.stack, zip(*(exact_elements(likelihood, *row) for row in rows), strict=True)
    )
    assert_elements(nll.detach(), truth[:, 0], moved[:, 0], 1e-6, "nll")
    assert_elements(leaves["library"].grad[:, 0], truth[:, 1], moved[:, 1], 1e-5, "library")
    if likelihood != "poisson":
        grad = leaves["px_r"].grad[0] if dispersion == "table" else leaves["hidden"].grad[:, 1]
        assert_elements(grad, truth[:, 2], moved[:, 2], 1e-5, "log theta")
    if likelihood == "zinb":
        assert_elements(leaves["hidden"].grad[:, 0], truth[:, 3], moved[:, 3], 1e-5, "dropout")


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_elements_of_genes(likelihood):
    """The same with theta by gene: one cell, whose biases dial everything; gradients by gene."""
    x, log_mu, log_theta, d = extreme_elements(likelihood)
    # softplus(a) = mu, in float64 rounded once
    mu = log_mu.double().exp()
    bias = torch.where(mu > 30, mu, torch.log(torch.expm1(mu))).float()
    tensors = {
        "hidden": torch.ones(1, 1),
        "library": torch.zeros(1, 1),
        "scale_weight": torch.zeros(len(x), 1),
        "scale_bias": bias,
    }
    if likelihood == "zinb":
        tensors |= {"dropout_weight": torch.zeros(len(x), 1), "dropout_bias": d}
    if likelihood != "poisson":
        tensors["px_r"] = log_theta
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    nll = count_nll(
        x[None], **leaves, likelihood=likelihood, scale_activation="softplus", backend="cpp"
    )
    nll.sum().backward()

    a = bias.double()
    mu = torch.where(a > 30, a, torch.log1p(torch.exp(a)))
    by_logit = torch.sigmoid(a) / mu
    rows = zip(x.tolist(), mu.tolist(), log_theta.double().exp().tolist(), d.tolist(), strict=True)
    truth, moved = map(
        torch.stack, zip(*(exact_elements(likelihood, *row) for row in rows), strict=True)
    )
    assert (nll.item() - truth[:, 0].sum()).abs() <= 1e-6 * truth[:, 0].abs().sum()
    assert_elements(
        leaves["scale_bias"].grad, truth[:, 1] * by_logit, moved[:, 1] * by_logit, 1e-5, "scale"
    )
    if likelihood != "poisson":
        assert_elements(leaves["px_r"].grad, truth[:, 2], moved[:, 2], 1e-5, "log theta")
    if likelihood == "zinb":
        assert_elements(leaves["dropout_bias"].grad, truth[:, 3], moved[:, 3], 1e-5, "dropout")


@every_activation
def test_poisson_mean_that_underflows(scale_activation):
    """Where float32 has no mean any more, its logarithm is what library and logit say."""
    library = torch.tensor([[-75.0], [-75.0], [-20.0], [-100.0]])
    hidden = torch.tensor([[1.0], [-3.0], [-70.0], [-200.0]])
    x = torch.tensor([[1.0, 3.0], [2.0, 0.5], [1.0, 1.0], [1e3, 7.0]])
    weight = torch.tensor([[1.0], [0.9]])
    leaf = hidden.clone().requires_grad_()
    nll = count_nll(
        x,
        leaf,
        library,
        weight,
        likelihood="poisson",
        scale_activation=scale_activation,
        backend="cpp",
    )
    nll.sum().backward()

    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().t()
    if scale_activation == "softmax":
        log_mu = library + logits.log_softmax(-1)
    else:
        log_softplus = torch.log(torch.log1p(logits.clamp(min=-30).exp()))
        log_mu = library + torch.where(logits < -30, logits, log_softplus)
    truth = -(x * log_mu - log_mu.exp() - torch.lgamma(x.double() + 1)).sum(1)
    truth.sum().backward()
    torch.testing.assert_close(nll.detach().double(), truth.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=0)


@every_activation
@every_model
def test_nan_hidden_units_are_not_lost(likelihood, dispersion, scale_activation):
    """A network that has diverged must be seen to have: its cells are NaN, and no other cell is."""
    problem = make(likelihood, dispersion, scale_activation, n=40, genes=110, hidden=5)
    whole, _ = run(problem)
    problem.tensors["hidden"][3, 2] = torch.nan
    problem.upstream.fill_(1.0)
    nll, grads = run(problem)
    assert nll[3].isnan()
    others = torch.arange(40) != 3
    assert torch.equal(nll[others], whole[others])
    assert grads["hidden"][3].isnan().all() and grads["hidden"][others].isfinite().all()
    assert grads["scale_weight"].isnan().all()


@every_activation
@every_model
def test_cells_without_counts_or_library(likelihood, dispersion, scale_activation):
    problem = make(likelihood, dispersion, scale_activation, n=40, genes=110, hidden=5)
    problem.x[::3] = 0
    problem.tensors["library"][3::6] = -torch.inf
    assert torch.equal(problem.x[3::6], torch.zeros(7, 110))
    for x in (problem.x, problem.x.to_sparse_csr()):
        nll, grads = run(problem, x=x)
        assert_right((nll, grads), problem.truth())
        assert not nll[3::6].any()


# ---------------------------------------------------------------------------------------------
# Threads


@every_activation
@every_model
@pytest.mark.parametrize(
    ("n", "genes", "csr"), [(300, 700, False), (300, 700, True), (9, 6200, True)]
)
def test_same_bits_for_any_number_of_threads(
    likelihood, dispersion, scale_activation, n, genes, csr
):
    """And at every repetition, whatever an earlier call has left in the workspace."""
    problem = make(likelihood, dispersion, scale_activation, n=n, genes=genes, hidden=20)
    x = problem.x.to_sparse_csr() if csr else problem.x
    expected = run(problem, x=x)
    other = make("zinb", "head", n=n + 3, genes=genes + 10, hidden=21)
    other.tensors["hidden"].fill_(torch.nan)
    run(other)
    for threads in (1, 2, 3, 5, 8, 1):
        torch.set_num_threads(threads)
        assert_identical(run(problem, x=x), expected)


PARALLEL = r"""
#include <atomic>
#include <cstdio>
#include <vector>
#include "parallel.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
int main() {
    for (int threads : {1, 2, 3, 8, 300}) {
        for (int items : {0, 1, 2, 3, 7, 64, 257, 1000}) {
            std::vector<std::atomic<int>> done(items);
            std::atomic<bool> bad_worker{false};
            auto body = [&](std::int64_t item, int worker) {
                ++done[item];
                if (worker < 0 || worker >= threads) bad_worker = true;
#if defined(_OPENMP)
                if (items > 1 && threads > 1 && !omp_in_parallel()) bad_worker = true;
#endif
            };
            decoder_fast::parallel_for(items, threads, body);
            for (const auto& n : done) {
                if (n != 1 || bad_worker) {
                    std::printf("%d items, %d threads\n", items, threads);
                    return 1;
                }
            }
        }
    }
}
"""


def compile_and_run(folder, source, *more, **variables):
    """Compile a program against the headers in csrc; return what it prints."""
    (folder / "program.cpp").write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | variables
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{CSRC}"]
    for command in (["g++", *flags, "-o", "program", "program.cpp", *more], ["./program"]):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.parametrize("threads", ["its own", "OpenMP's", "fewer of OpenMP's than asked for"])
def test_every_item_is_worked_on_once(threads, tmp_path):
    """On threads of an OpenMP runtime where the process has one, else on threads of its own."""
    library = [] if threads == "its own" else ["-fopenmp"]
    limit = {"OMP_THREAD_LIMIT": "2"} if threads.startswith("fewer") else {}
    compile_and_run(tmp_path, PARALLEL, str(CSRC / "parallel.cpp"), *library, "-ldl", **limit)


# ---------------------------------------------------------------------------------------------
# bfloat16 products


@pytest.fixture
def medium():
    if native.describe()["instruction set"] != "avx512_bf16":
        pytest.skip("this processor has no bfloat16 products: float32 is taken")
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("medium")
@every_activation
@every_model
@pytest.mark.parametrize(
    ("samples", "n", "genes", "hidden"), [(None, 300, 1703, 35), (3, 7, 97, 1), (None, 33, 64, 64)]
)
def test_bfloat16_products(likelihood, dispersion, scale_activation, samples, n, genes, hidden):
    """As exact as products of numbers that are rounded to bfloat16 can be.

    Each is off by up to 2^-9, relative; a logit of size 3 by 2^-8, and so is the mean. Gradients
    meet a second rounding, and partly cancel.
    """
    problem = make(
        likelihood,
        dispersion,
        scale_activation,
        samples=samples,
        n=n,
        genes=genes,
        hidden=hidden,
    )
    got, truth = run(problem), problem.truth()
    assert_accurate("nll", got[0], truth[0], None, 2**-8)
    for name, value in truth[1].items():
        assert_accurate(name, got[1][name], value, None, 2**-6)
    # And bfloat16 was what was taken.
    assert reference64.error(got[0], truth[0]) > 1e-6
    expected = got
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert_identical(run(problem), expected)
    wanted = ["hidden", "scale_weight"]
    nll, grads = run(problem, wanted=wanted)
    assert_identical((nll, {k: grads[k] for k in wanted}), (nll, {k: got[1][k] for k in wanted}))


def test_products_after_torchs_newer_setting():
    """After it, torch refuses to answer in the words of the older one."""
    problem = make("nb", "gene", "softmax", n=20, genes=33, hidden=16)
    expected = run(problem)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert_identical(run(problem), expected)
    finally:
        matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------
# Autograd


@pytest.fixture
def calls(monkeypatch):
    """Every call of the kernel: whether each cell had its own weight, and which gradients."""
    made = []
    kernel = cpp._run

    def spy(inputs, upstream, values, gradients):
        made.append((isinstance(upstream, torch.Tensor), sorted(gradients)))
        kernel(inputs, upstream, values, gradients)

    monkeypatch.setattr(cpp, "_run", spy)
    return made


def leaves_of(problem, *names):
    return {
        name: t.clone().requires_grad_(not names or name in names)
        for name, t in problem.tensors.items()
    }


@pytest.mark.parametrize("reduction", ["sum", "mean", "sum of 3", "expanded", "full", "zero"])
def test_constant_upstream_gradient_takes_what_forward_computed(reduction, calls):
    problem = make(n=20, genes=50)
    leaves = leaves_of(problem)
    nll = count_nll(problem.x, **leaves, **problem.options, backend="cpp")
    factors = {"sum": 1.0, "mean": 1 / 20, "sum of 3": 3.0, "expanded": -2.0, "full": 0.5}
    factor = factors.get(reduction, 0.0)
    if reduction in ("sum", "mean"):
        getattr(nll, reduction)().backward()
    elif reduction == "sum of 3":
        (3 * nll.sum()).backward()
    elif reduction == "expanded":
        nll.backward(torch.tensor(factor).expand(20))
    else:
        nll.backward(torch.full((20,), factor))
    names = sorted(set(leaves) - {"library"})
    assert calls == [(False, names)]
    problem.upstream = torch.full((20,), factor)
    truth = problem.truth()
    assert_right((nll.detach(), {name: t.grad for name, t in leaves.items()}), truth)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_upstream_gradient_that_is_no_number(upstream, reduction):
    """A loss that has diverged must not look as if it had gradients."""
    problem = make(n=20, genes=50)
    leaves = leaves_of(problem)
    nll = count_nll(problem.x, **leaves, **problem.options, backend="cpp")
    (getattr(nll, reduction)() * upstream).backward()
    assert not any(t.grad.isfinite().all() for t in leaves.values())


@pytest.mark.parametrize("which", ["random", "the last", "the first", "by sample", "by cell"])
def test_varying_upstream_gradient_recomputes(which, calls):
    problem = make(n=20, genes=50, **({"samples": 2} if which.startswith("by") else {}))
    if which == "by sample":
        problem.upstream = torch.tensor([[1.0], [2.0]]).expand(2, 20)
    elif which == "by cell":
        problem.upstream = torch.arange(20.0).expand(2, 20)
    elif which != "random":
        problem.upstream = torch.ones(20)
        problem.upstream[-1 if which == "the last" else 0] = 2.0
    got = run(problem)
    names = sorted(set(problem.tensors) - {"library"})
    assert calls == [(False, names), (True, names)]
    assert_right(got, problem.truth())


@pytest.mark.parametrize("wanted", [("library",), ("hidden",), ("px_r", "library")])
def test_frozen_inputs_cost_nothing(wanted, calls):
    problem = make(n=20, genes=50)
    leaves = leaves_of(problem, *wanted)
    count_nll(problem.x, **leaves, **problem.options, backend="cpp").sum().backward()
    assert calls == [(False, sorted(set(wanted) - {"library"}))]
    assert {name for name, t in leaves.items() if t.grad is not None} == set(wanted)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_none_are_computed(how, calls):
    problem = make(n=20, genes=50)
    leaves = problem.tensors if how == "frozen" else leaves_of(problem)
    mode = torch.enable_grad if how == "frozen" else getattr(torch, how)
    with mode():
        nll = count_nll(problem.x, **leaves, **problem.options, backend="cpp")
    assert calls == [(False, [])]
    assert_accurate("nll", nll, problem.truth()[0], None, 1e-6)


def test_second_backward_pass():
    """Also after somebody has changed the first gradients in place."""
    problem = make(n=20, genes=50)
    leaves = leaves_of(problem)
    nll = count_nll(problem.x, **leaves, **problem.options, backend="cpp")
    inputs = list(leaves.values())

    def gradients(upstream):
        return torch.autograd.grad(nll, inputs, upstream, retain_graph=True)

    ones, twos = torch.ones(20), torch.full((20,), 2.0)
    for upstream in (ones, ones, problem.upstream, twos):
        problem.upstream = upstream
        got = gradients(upstream)
        assert_right((nll.detach(), dict(zip(leaves, got, strict=True))), problem.truth())
        memory = [t.untyped_storage().data_ptr() for t in (*got, *inputs, nll)]
        assert len(set(memory)) == len(memory)
        for gradient in got:
            gradient.fill_(torch.nan)


def test_gradients_accumulate():
    """Two losses of one graph: the second must not scale what the first has handed out."""
    problem = make(n=20, genes=50)
    leaves = leaves_of(problem)
    for factor in (1.0, -3.0):
        nll = count_nll(problem.x, **leaves, **problem.options, backend="cpp")
        (factor * nll.sum()).backward()
    problem.upstream = torch.full((20,), -2.0)
    assert_right((nll.detach(), {name: t.grad for name, t in leaves.items()}), problem.truth())


# ---------------------------------------------------------------------------------------------
# Counts that are refused


BAD = {"negative": -3.0, "NaN": torch.nan, "infinite": torch.inf, "minus infinite": -torch.inf}
BAD_CASES = [
    (dtype, value)
    for dtype in ("float32", "float64", "bfloat16", "float16", "int8", "int16", "int32", "int64")
    for value in BAD
    if value == "negative" or not dtype.startswith("int")
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["dense", torch.int32, torch.int64])
@pytest.mark.parametrize(("dtype", "value"), BAD_CASES)
def test_bad_counts(dtype, value, layout, threads):
    """Wherever it stands; with the words of the backend ``torch``."""
    torch.set_num_threads(threads)
    problem = make("nb", n=270, genes=205, hidden=3)
    dtype = getattr(torch, dtype)
    for cell, gene in ((0, 0), (269, 204), (131, 96)):
        x = problem.x.floor().clamp(max=100)
        x[cell, gene] = 1  # so that CSR has a place for it
        x = x.to(dtype) if layout == "dense" else to_csr(x, index=layout, dtype=dtype)
        if layout == "dense":
            x[cell, gene] = BAD[value]
        else:
            crow, col = x.crow_indices(), x.col_indices()
            place = crow[cell] + (col[crow[cell] : crow[cell + 1]] == gene).nonzero().item()
            x.values()[place] = BAD[value]
        messages = []
        for backend in ("cpp", "torch"):
            with pytest.raises(ValueError, match="x holds") as raised:
                count_nll(x, **problem.tensors, **problem.options, backend=backend)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_worst_of_bad_counts_is_reported(threads):
    torch.set_num_threads(threads)
    problem = make("nb", n=20, genes=205, hidden=3)
    problem.x[3, 7], problem.x[4, 150], problem.x[5, 8] = -2, -5, torch.inf
    with pytest.raises(ValueError, match=r"found -5\)"):
        run(problem)
    # One block of cells after another: the first bad one is enough.
    problem.x[:] = 0
    problem.x[3, 7], problem.x[4, 7], problem.x[5, 200] = torch.nan, -2, -5
    with pytest.raises(ValueError, match=r"found nan\)"):
        run(problem)


def test_what_counts_as_zero():
    """-0 and what is below 1e-8 are zeros, as in scvi-tools; 1e-7 is a count."""
    problem = make("zinb", n=20, genes=50, hidden=3)
    problem.x[:] = 0
    expected = run(problem)
    for value in (-0.0, 1e-9, 1e-8):
        problem.x[::2, ::3] = value
        for x in (problem.x, to_csr(problem.x, how="zeros")):
            assert_identical(run(problem, x=x), expected)
    problem.x[::2, ::3] = 1e-7
    assert_right(run(problem), problem.truth())


# ---------------------------------------------------------------------------------------------
# Memory


PEAK = r"""
import json, sys, torch
from decoder_fast.functional import count_nll

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

n, genes, hidden = 1024, 8000, 128
torch.set_num_threads(int(sys.argv[1]))
per_cell = genes // 20
crow = torch.arange(n + 1) * per_cell
col = (torch.arange(n)[:, None] * 7 + torch.arange(per_cell) * 20).remainder(genes).sort().values
x = torch.sparse_csr_tensor(
    crow, col.flatten(), torch.ones(n * per_cell), size=(n, genes), check_invariants=False
)
leaves = [
    (0.1 * torch.randn(shape)).requires_grad_()
    for shape in [(n, hidden), (n, 1), (genes, hidden), (genes, hidden), (genes,)]
]

def step(x, hidden, library, scale_weight, dropout_weight, px_r):
    nll = count_nll(
        x, hidden, library, scale_weight, dropout_weight=dropout_weight, px_r=px_r, backend="cpp"
    )
    nll.backward(upstream)

# What is loaded and started on first use is not this call's.
upstream = torch.rand(2)
small = [t.detach()[:2].clone().requires_grad_() for t in leaves]
step(torch.ones(2, 2), *small)
upstream = torch.ones(n) if sys.argv[2] == "constant" else torch.rand(n)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = memory("VmRSS")
step(x, *leaves)
print(json.dumps(memory("VmHWM") - before - sum(4 * t.numel() for t in leaves)))
"""


@needs_linux
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer needs memory of its own")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("upstream", ["constant", "varying"])
def test_peak_memory(upstream, threads):
    """Forward and backward, 1,024 x 8,000, zinb: below 3 % of stock's, beside the gradients.

    scvi-tools' heads and its distribution take 1,122 MB more than their inputs there.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(threads), upstream],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parent,
    )
    assert json.loads(done.stdout) < 0.03 * 1122e6


@pytest.mark.parametrize("csr", [False, True])
@every_activation
@every_model
def test_torch_allocates_gradients_only(likelihood, dispersion, scale_activation, csr):
    problem = make(likelihood, dispersion, scale_activation, n=300, genes=500, hidden=4)
    sparse = problem.x * (torch.rand(300, 500, generator=torch.Generator().manual_seed(1)) < 0.01)
    x = sparse.to_sparse_csr() if csr else sparse
    leaves = leaves_of(problem)
    parts = [x.values(), x.crow_indices(), x.col_indices()] if csr else [x]
    with Recorder(*leaves.values(), *parts) as recorder:
        nll = count_nll(x, **leaves, **problem.options, backend="cpp")
        nll.backward(problem.upstream)
    assert recorder.products == 0
    nnz = int((sparse != 0).sum())
    assert recorder.largest <= max(500 * 5, 300 * 4, csr * nnz)  # the table has 5 categories
    assert 300 * 500 > 40 * recorder.largest


LIBC = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
kept = []


def guarded(tensor, end):
    """Copy a tensor to where the next byte after it (or the one before it) cannot be read."""
    page = mmap.PAGESIZE
    n_bytes = tensor.numel() * tensor.element_size()
    size = -(-n_bytes // page) * page
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = LIBC.mmap(None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert start != ctypes.c_void_p(-1).value
    for forbidden in (start, start + page + size):
        assert LIBC.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    at = start + page + (size - n_bytes if end else 0)
    buffer = (ctypes.c_char * n_bytes).from_address(at)
    kept.append(buffer)
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def run_guarded():
    """Evaluate problems whose every input ends, or starts, at memory that cannot be read."""
    for k, problem in enumerate(grid()):
        for end in (True, False):
            torch.set_num_threads(1 + k % 2)
            tensors = {
                name: guarded(t, end).requires_grad_() for name, t in problem.tensors.items()
            }
            options = dict(problem.options, backend="cpp")
            if "px_r_index" in options:
                options["px_r_index"] = guarded(options["px_r_index"], end)
            for dtype in (torch.float32, torch.float64, torch.uint8, torch.uint16, torch.int32):
                counts = problem.x.floor().clamp(max=100).to(dtype)
                index = (torch.int32, torch.int64)[k % 2]
                csr = to_csr(problem.x.floor().clamp(max=100), index=index, dtype=dtype)
                if csr.values().numel() == 0:
                    continue
                csr = torch.sparse_csr_tensor(
                    guarded(csr.crow_indices(), end),
                    guarded(csr.col_indices(), end),
                    guarded(csr.values(), end),
                    size=csr.shape,
                    check_invariants=False,
                )
                for x in (guarded(counts, end), csr):
                    nll = count_nll(x, **tensors, **options)
                    nll.backward(guarded(problem.upstream, end))


@needs_linux
def test_nothing_outside_a_buffer_is_read():
    """Pages that cannot be read stand on both sides of every input; reading one ends a process."""
    program = "import test_count_nll_native as t; t.run_guarded()"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "broken",
    [
        "column",
        "negative column",
        "negative first column",
        "long row",
        "short",
        "descending",
        "start",
        "few values",
        "few rows",
    ],
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_csr_that_lies_about_its_shape(broken, index):
    crow, col, n_values = [0, 2, 2, 3, 5], [0, 2, 5, 1, 3], 5  # else each row ascends
    if broken == "negative first column":
        col[0] = -1
    elif broken.endswith("column"):
        col[1] = -1 if broken == "negative column" else 6
    elif broken == "few values":
        n_values = 4
    else:
        crow = {
            "long row": [0, 2, 2, 3, 900],
            "short": [0, 2, 2, 3, 4],
            "descending": [0, 3, 2, 3, 5],
            "start": [1, 2, 2, 3, 5],
            "few rows": [0, 2, 5],
        }[broken]
    x = torch.sparse_csr_tensor(
        torch.tensor(crow, dtype=index),
        torch.tensor(col, dtype=index),
        torch.ones(n_values),
        size=(4, 6),
        check_invariants=False,
    )
    problem = make("nb", n=4, genes=6, hidden=3)
    with pytest.raises(ValueError, match="4 cells x 6 genes"):
        run(problem, x=x)


# ---------------------------------------------------------------------------------------------
# Vector mathematics


#: Prints, for each function, the largest error in units of the result's last place.
ACCURACY = r"""
#include <cstdio>
#include "includes.h"
#include "HEADER"
#include "vector_math.h"
#include "count_nll_nonzero.h"

double largest[6];
const char* names[6] = {"exp", "exp of pair", "expm1", "log1p", "log", "reciprocal"};

void measure(int what, float got, double exact) {
    double error;
    if (!(std::fabs(got) <= 3.4028235e38) || !(std::fabs(exact) <= 3.4028235e38)) {
        // Out of float32's range, or not a number: in the same way.
        const bool same = exact != exact ? got != got : got == static_cast<float>(exact);
        error = same ? 0.0 : 1e9;
    } else {
        int power;
        std::frexp(exact, &power);
        const double unit = std::ldexp(1.0, power - 24 > -149 ? power - 24 : -149);
        error = std::fabs(got - exact) / unit;
    }
    if (!(error <= largest[what])) {
        largest[what] = error;
        if (error > 2.0) std::printf("# %s: %.9g, exactly %.17g\n", names[what], got, exact);
    }
}

// Calls body with every step-th float between two of the same sign, and both ends.
template <class Body>
void each(float low, float high, std::uint32_t step, Body body) {
    std::uint32_t a, b;
    std::memcpy(&a, &low, 4);
    std::memcpy(&b, &high, 4);
    if (a > b) { const std::uint32_t c = a; a = b; b = c; }
    float x[lanes];
    int n = 0;
    for (std::uint64_t bits = a;; bits += step) {
        const std::uint32_t now = static_cast<std::uint32_t>(bits < b ? bits : b);
        std::memcpy(&x[n++], &now, 4);
        if (n == lanes || bits >= b) {
            for (; n < lanes; ++n) x[n] = x[0];
            body(x);
            n = 0;
        }
        if (bits >= b) break;
    }
}

int main() {
    auto of_exp = [](const float* x) {
        float y[lanes];
        store(y, exp(load(x)));
        for (int i = 0; i < lanes; ++i) measure(0, y[i], std::exp(static_cast<double>(x[i])));
    };
    auto of_pair = [](const float* x) {
        V a, b;
        exp_and_expm1(load(x), a, b);
        float e[lanes], em1[lanes];
        store(e, a);
        store(em1, b);
        for (int i = 0; i < lanes; ++i) {
            measure(1, e[i], std::exp(static_cast<double>(x[i])));
            measure(2, em1[i], std::expm1(static_cast<double>(x[i])));
        }
    };
    auto of_log1p = [](const float* x) {
        float y[lanes];
        store(y, log1p(load(x)));
        for (int i = 0; i < lanes; ++i) measure(3, y[i], std::log1p(static_cast<double>(x[i])));
    };
    auto of_log = [](const float* x) {
        // As the kernel uses it: t below 1, and t - 1 as exact as t below 0.5, more exact above.
        float y[lanes];
        store(y, log_of(load(x), sub(load(x), set1(1.0f))).value);
        for (int i = 0; i < lanes; ++i) measure(4, y[i], std::log(static_cast<double>(x[i])));
    };
    auto of_reciprocal = [](const float* x) {
        float y[lanes];
        store(y, reciprocal(load(x)));
        for (int i = 0; i < lanes; ++i) measure(5, y[i], 1.0 / x[i]);
    };
    const float inf = HUGE_VALF;
    each(0.0f, 89.5f, 997, of_exp);
    each(-0.0f, -120.0f, 997, of_exp);
    each(0.03f, 89.0f, 61, of_exp);
    each(-0.03f, -104.0f, 61, of_exp);
    each(89.5f, inf, 50021, of_exp);
    each(-120.0f, -inf, 50021, of_exp);
    each(-0.0f, -110.0f, 997, of_pair);
    each(-0.03f, -104.0f, 61, of_pair);
    each(0.0f, 3e38f, 997, of_log1p);
    each(0.01f, 10.0f, 31, of_log1p);
    each(-0.0f, -0.25f, 997, of_log1p);
    each(1e-30f, 1.0f, 997, of_log);
    each(1e-37f, 1e37f, 997, of_reciprocal);
    each(1.0f, 2.0f, 31, of_reciprocal);
    const float nan[lanes] = {std::nanf("")};
    of_exp(nan);
    of_pair(nan);
    of_log1p(nan);
    for (int i = 0; i < 6; ++i) std::printf("%s|%.3f\n", names[i], largest[i]);

    // In float64, against the C library's long double and its derivative by differences.
    double of_log_gamma = 0.0, of_digamma = 0.0, of_wide_log = 0.0;
    for (double v = 1e-6; v < 1e13; v *= 1.003) {
        const long double exact = lgammal(v), h = 1e-3L * v;
        const long double slope = (8 * (lgammal(v + h) - lgammal(v - h)) -
                                   (lgammal(v + 2 * h) - lgammal(v - 2 * h))) / (12 * h);
        const auto error = [](double got, long double of) {
            const double size = std::fabs(static_cast<double>(of));
            return std::fabs(static_cast<double>(got - of)) / (size > 1.0 ? size : 1.0);
        };
        of_log_gamma = std::fmax(of_log_gamma, error(log_gamma(v), exact));
        of_digamma = std::fmax(of_digamma, error(digamma(v), slope));
        of_wide_log = std::fmax(of_wide_log, error(log_of_positive(v), logl(v)));
    }
    std::printf("log_gamma|%.3g\ndigamma|%.3g\n", of_log_gamma, of_digamma);
    std::printf("log_of_positive|%.3g\n", of_wide_log);
}
"""
FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx2 -mfma".split(),
    "avx2": "-mavx2 -mfma -mbmi -mbmi2".split(),
    "portable": [],
}


@needs_compiler
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_vector_mathematics(instruction_set, tmp_path):
    """What csrc/vector_math.h states, over millions of arguments."""
    needed = {flag.removeprefix("-m") for flag in FLAGS[instruction_set]}
    if missing := needed - {"bmi"} - set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    source = ACCURACY.replace("HEADER", f"simd_{instruction_set}.h")
    printed = compile_and_run(tmp_path, source, *FLAGS[instruction_set])
    largest = {
        name: float(value)
        for name, value in (line.split("|") for line in printed.splitlines() if line[0] != "#")
    }
    stated = {"exp": 1.1, "exp of pair": 1.1, "expm1": 1.1, "log1p": 2.1, "log": 1.1}
    # Of float64, relative: terms of size 100 cancel in log_gamma, and the derivative by differences
    # is itself exact to 1e-11 only.
    stated |= {"reciprocal": 1, "log_gamma": 1e-13, "digamma": 1e-11, "log_of_positive": 1e-15}
    assert {name for name, limit in stated.items() if not largest[name] <= limit} == set(), printed
