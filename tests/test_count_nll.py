"""count_nll: hidden units, heads, library and counts to one negative log-likelihood a cell."""

from __future__ import annotations

import itertools
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import reference64
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference64 import Recorder, assert_accurate, error

from decoder_fast.backends import choose
from decoder_fast.functional import count_nll, covariate_linear, softmax_library
from decoder_fast.reference import count_nll as tiled

OPERATION = "count_nll"
#: Likelihood and dispersion; a Poisson distribution has none.
MODELS = [
    *itertools.product(("nb", "zinb", "normal"), ("gene", "table", "head")),
    ("poisson", None),
]
ACTIVATIONS = ("softmax", "softplus")
SIZES = {"2-D": None, "3-D": 3}

pytestmark = pytest.mark.usefixtures("one_thread")
float64 = pytest.mark.computes_in(torch.float64)


class Problem:
    """Inputs of the operation: counts, differentiable tensors by name, and the other options."""

    def __init__(
        self,
        likelihood="nb",
        dispersion="gene",
        scale_activation="softmax",
        *,
        samples=None,
        n=37,
        genes=203,
        hidden=13,
        dtype=torch.float64,
        biases=True,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=generator)).to(dtype)

        lead = () if samples is None else (samples,)
        self.tensors = {
            "hidden": normal(*lead, n, hidden).relu(),
            "library": normal(n, 1, scale=0.5),
            "scale_weight": normal(genes, hidden, scale=0.4),
        }
        if biases:
            self.tensors["scale_bias"] = normal(genes, scale=0.5)
        self.options = {"likelihood": likelihood, "scale_activation": scale_activation}
        if likelihood == "zinb":
            self.tensors["dropout_weight"] = normal(genes, hidden, scale=0.4)
            if biases:
                self.tensors["dropout_bias"] = normal(genes) - 1
        if dispersion == "gene":
            self.tensors["px_r"] = normal(genes)
        elif dispersion == "table":
            self.tensors["px_r"] = normal(genes, 5)  # nobody has category 4
            self.options["px_r_index"] = torch.randint(0, 4, (n,), generator=generator)
        elif dispersion == "head":
            self.tensors["r_weight"] = normal(genes, hidden, scale=0.3)
            if biases:
                self.tensors["r_bias"] = normal(genes)
        # Zeros mostly, small counts, and a few large and fractional ones.
        rate = torch.rand(n, genes, generator=generator) ** 4 * 3
        self.x = torch.poisson(rate, generator=generator).to(dtype)
        spots = torch.rand(n, genes, generator=generator)
        self.x[spots < 0.01] = 250
        self.x[spots > 0.99] = 1.5
        if likelihood == "normal":
            self.x[spots < 0.1] *= -1
            # Else one element, far off or of small sigma, is all of the loss, squared as it is.
            self.x.clamp_(max=10)
            for name in {"scale_weight", "scale_bias", "r_weight", "r_bias", "px_r"}:
                if name in self.tensors:
                    self.tensors[name] *= 0.3
        if scale_activation == "softmax":
            self.tensors["library"] += self.x.abs().sum(1, keepdim=True).add(1).log()
        self.upstream = normal(*lead, n)
        self.upstream[..., ::4] = 0

    def evaluate(self, function=count_nll, dtype=torch.float64, x=None, wanted=None, **options):
        """Losses, and gradients of their product with the upstream gradient, by name."""
        leaves = {
            name: t.detach().to(dtype).requires_grad_(wanted is None or name in wanted)
            for name, t in self.tensors.items()
        }
        if x is None:
            x = self.x.to(dtype)
        nll = function(x, **leaves, **(self.options | options))
        nll.backward(self.upstream.to(dtype))
        return nll.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    def truth(self):
        return self.evaluate(reference64.count_nll)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 genes x 7 rows or fewer: many of each, and a remainder in both."""
    monkeypatch.setattr(tiled, "TILE", 112)
    monkeypatch.setattr(tiled, "_MAX_ROWS", 7)


def stock_nll(stock):
    """What scvi-tools computes, step by step."""

    def function(
        x,
        hidden,
        library,
        scale_weight,
        scale_bias=None,
        *,
        likelihood,
        scale_activation,
        dropout_weight=None,
        dropout_bias=None,
        px_r=None,
        px_r_index=None,
        r_weight=None,
        r_bias=None,
    ):
        logits = F.linear(hidden, scale_weight, scale_bias)
        scale = logits.softmax(-1) if scale_activation == "softmax" else F.softplus(logits)
        mu = torch.exp(library) * scale
        if likelihood == "poisson":
            log_prob = torch.distributions.Poisson(mu, validate_args=False).log_prob(x)
            return -log_prob.sum(-1)
        if r_weight is not None:
            theta = F.linear(hidden, r_weight, r_bias).exp()
        elif px_r_index is not None:
            theta = F.linear(F.one_hot(px_r_index, px_r.shape[1]).to(px_r.dtype), px_r).exp()
        else:
            theta = px_r.exp()
        if likelihood == "normal":
            log_prob = torch.distributions.Normal(mu, theta, validate_args=False).log_prob(x)
        elif likelihood == "nb":
            log_prob = stock.log_nb_positive(x, mu, theta)
        else:
            logits = F.linear(hidden, dropout_weight, dropout_bias)
            log_prob = stock.log_zinb_positive(x, mu, theta, logits)
        return -log_prob.sum(-1)

    return function


def assert_same(got, expected, tolerance):
    """Losses and gradients agree, each in norm."""
    assert got[0].shape == expected[0].shape
    assert error(got[0], expected[0].double()) <= tolerance, "nll"
    for name, value in expected[1].items():
        if value is None:
            assert got[1][name] is None, name
        else:
            assert got[1][name].shape == value.shape, name
            found = error(got[1][name], value.double())
            assert found <= tolerance, f"gradient of {name}: {found:.1e}"


def assert_identical(got, expected):
    assert torch.equal(got[0], expected[0])
    for name, value in expected[1].items():
        if value is None:
            assert got[1][name] is None, name
        else:
            assert torch.equal(got[1][name], value), name


def widest_dtype(backend):
    """Of those that a backend computes in."""
    cpu = torch.device("cpu")
    try:
        choose(OPERATION, backend, device=cpu, dtype=torch.float64)
    except RuntimeError:
        return torch.float32
    return torch.float64


def assert_right(problem, backend, tolerance, **options):
    """Compare with the truth: to ``tolerance`` in float64, or to what float32 promises.

    The problem's tensors are float32, so that every dtype holds their values.
    """
    got = problem.evaluate(dtype=widest_dtype(backend), backend=backend, **options)
    truth = problem.truth()
    if got[0].dtype == torch.float64:
        assert_same(got, truth, tolerance)
    else:
        assert_accurate("nll", got[0], truth[0], None, 1e-6)
        for name, value in truth[1].items():
            assert got[1][name].shape == value.shape
            assert_accurate(name, got[1][name], value, None, 1e-5)
    return got


every_model = pytest.mark.parametrize(("likelihood", "dispersion"), MODELS)
every_activation = pytest.mark.parametrize("scale_activation", ACTIVATIONS)
every_size = pytest.mark.parametrize("samples", SIZES.values(), ids=SIZES)


@float64
@pytest.mark.usefixtures("small_tiles")
@every_size
@every_activation
@every_model
def test_float64(likelihood, dispersion, scale_activation, samples, backend):
    """The formulas, in the dtype where only their truth counts; over many tiles."""
    problem = Problem(likelihood, dispersion, scale_activation, samples=samples)
    got, truth = problem.evaluate(backend=backend), problem.truth()
    # 1e-11: the naive truth subtracts gamma functions of order 1e3 from one another.
    assert_same(got, truth, 1e-11)
    if dispersion == "table":
        assert (got[1]["px_r"][:, 4] == 0).all()


@pytest.mark.usefixtures("small_tiles")
@every_size
@every_activation
@every_model
def test_no_worse_than_stock(likelihood, dispersion, scale_activation, samples, backend, stock):
    """float32: losses to 1e-6 and gradients to 1e-5, and at most twice the error of stock."""
    problem = Problem(
        likelihood, dispersion, scale_activation, samples=samples, dtype=torch.float32
    )
    nll, grads = problem.evaluate(dtype=torch.float32, backend=backend)
    stock_values, stock_grads = problem.evaluate(stock_nll(stock), torch.float32)
    true_nll, true_grads = problem.truth()
    assert nll.dtype == torch.float32
    assert_accurate("nll", nll, true_nll, stock_values, 1e-6)
    for name, truth in true_grads.items():
        assert_accurate(name, grads[name], truth, stock_grads[name], 1e-5)


@every_activation
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_tiles_as_they_are(likelihood, scale_activation, threads, stock, backend):
    """More rows and more genes than one tile has, without a change to the tiles' size."""
    torch.set_num_threads(threads)
    n, genes = tiled._MAX_ROWS + 5, tiled.TILE // tiled._MAX_ROWS + 23
    problem = Problem(
        likelihood, "gene", scale_activation, n=n, genes=genes, hidden=5, dtype=torch.float32
    )
    nll, grads = problem.evaluate(dtype=torch.float32, backend=backend)
    stock_values, stock_grads = problem.evaluate(stock_nll(stock), torch.float32)
    true_nll, true_grads = problem.truth()
    assert_accurate("nll", nll, true_nll, stock_values, 1e-6)
    for name, truth in true_grads.items():
        assert_accurate(name, grads[name], truth, stock_grads[name], 1e-5)


def test_many_gene_tiles(monkeypatch, stock):
    """Sums over hundreds of tiles lose nothing against stock's, which are taken in one go."""
    monkeypatch.setattr(tiled, "TILE", 1)
    problem = Problem("zinb", "gene", n=16, genes=8003, hidden=5, dtype=torch.float32)
    nll, grads = problem.evaluate(dtype=torch.float32, backend="torch")
    stock_values, stock_grads = problem.evaluate(stock_nll(stock), torch.float32)
    true_nll, true_grads = problem.truth()
    assert_accurate("nll", nll, true_nll, stock_values, 1e-6)
    for name, truth in true_grads.items():
        assert_accurate(name, grads[name], truth, stock_grads[name], 1e-5)


@pytest.mark.parametrize(("tile", "max_rows"), [(1, 1), (97, 5), (1000, 7), (1 << 18, 36)])
@pytest.mark.parametrize("csr", [False, True])
@every_model
def test_tiling_does_not_matter(monkeypatch, likelihood, dispersion, tile, max_rows, csr):
    problem = Problem(likelihood, dispersion, samples=2, genes=51)
    x = problem.x.to_sparse_csr() if csr else problem.x
    expected = problem.evaluate(x=x, backend="torch")
    monkeypatch.setattr(tiled, "TILE", tile)
    monkeypatch.setattr(tiled, "_MAX_ROWS", max_rows)
    # 1e-13: sums of some hundred float64 numbers in another order.
    assert_same(problem.evaluate(x=x, backend="torch"), expected, 1e-13)


@settings(max_examples=80)
@given(
    model=st.sampled_from(MODELS),
    scale_activation=st.sampled_from(ACTIVATIONS),
    samples=st.sampled_from([None, 0, 1, 2, 3]),
    n=st.integers(0, 9),
    genes=st.integers(1, 60),
    hidden=st.integers(1, 9),
    biases=st.booleans(),
    csr=st.booleans(),
    tile=st.integers(1, 200),
    max_rows=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_fuzz(model, scale_activation, csr, tile, max_rows, **shape):
    problem = Problem(*model, scale_activation, **shape)
    x = problem.x.to_sparse_csr() if csr else problem.x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILE", tile)
        patch.setattr(tiled, "_MAX_ROWS", max_rows)
        got = problem.evaluate(x=x)
    assert_same(got, problem.truth(), 1e-10)


# ---------------------------------------------------------------------------------------------
# Counts


def to_csr(x, *, index=torch.int64, dtype=None, how="canonical", seed=0):
    """Counts as CSR: canonical, with zeros stored, columns shuffled, or counts in two parts."""
    generator = torch.Generator().manual_seed(seed)
    crow, col, values = [0], [], []
    for row in x:
        stored = torch.ones_like(row, dtype=torch.bool) if how == "zeros" else row != 0
        columns = stored.nonzero().flatten()
        entries = row[columns]
        if how in ("duplicates", "in pairs"):
            again = columns[entries >= 2]
            entries = torch.cat([torch.where(entries >= 2, entries - 1, entries), 0 * again + 1])
            columns = torch.cat([columns, again])
        if how in ("unsorted", "duplicates"):
            order = torch.randperm(columns.numel(), generator=generator)
            columns, entries = columns[order], entries[order]
        elif how == "in pairs":
            columns, order = columns.sort()
            entries = entries[order]
        col.append(columns)
        values.append(entries)
        crow.append(crow[-1] + columns.numel())
    return torch.sparse_csr_tensor(
        torch.tensor(crow, dtype=index),
        torch.cat(col).to(index),
        torch.cat(values).to(dtype or x.dtype),
        size=x.shape,
        check_invariants=False,
    )


@pytest.fixture
def counted():
    """A problem whose counts are integers, with an empty cell and a gene that nobody expresses."""
    problem = Problem("zinb", "gene", samples=2, n=11, genes=45, dtype=torch.float32)
    problem.x = problem.x.floor().clamp(max=100)
    problem.x[0] = problem.x[10] = problem.x[4:6] = 0
    problem.x[:, 0] = problem.x[:, 44] = problem.x[:, 20] = 0
    return problem


DENSE = "float32 float64 bfloat16 float16 int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_count_dtypes(counted, dtype, layout, backend):
    """Counts of any dtype are the same counts."""
    dtype = getattr(torch, dtype)
    x = counted.x.to(dtype)
    if layout == "csr":
        x = to_csr(counted.x, dtype=dtype)
    expected = counted.evaluate(dtype=torch.float32, backend=backend)
    assert_identical(counted.evaluate(dtype=torch.float32, x=x, backend=backend), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("how", ["canonical", "zeros", "unsorted", "duplicates", "in pairs"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8])
def test_csr(counted, index, dtype, how, backend):
    """However CSR counts are stored, they are those that ``to_dense`` shows."""
    x = to_csr(counted.x, index=index, dtype=dtype, how=how)
    assert x.col_indices().dtype == index
    n = int((counted.x > 0).sum())
    in_two = n + int((counted.x > 1).sum())
    stored = {"zeros": counted.x.numel(), "duplicates": in_two, "in pairs": in_two}
    assert x.values().numel() == stored.get(how, n)
    expected = counted.evaluate(dtype=torch.float32, backend=backend)
    assert_identical(counted.evaluate(dtype=torch.float32, x=x, backend=backend), expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("how", ["zeros", "unsorted", "duplicates"])
def test_csr_of_real_values(how):
    """Under the normal likelihood zeros and negative values are values like any other."""
    problem = Problem("normal", "gene", n=11, genes=45)
    problem.x = problem.x.round()
    x = to_csr(problem.x, how=how)
    assert_same(problem.evaluate(x=x), problem.evaluate(), 1e-13)


@pytest.mark.parametrize("x", ["dense", "csr"])
def test_no_counts_at_all(counted, x, backend):
    """Every cell empty: the likelihood of zeros."""
    counted.x.zero_()
    counts = counted.x.to_sparse_csr() if x == "csr" else counted.x
    assert_right(counted, backend, 1e-12, x=counts)


# ---------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_extremes(likelihood, backend):
    """Inverse dispersion 1e-6 to 1e8, means 1e-12 to 1e7, counts to 1e6, any dropout; float32."""
    n, genes = 9, 50
    generator = torch.Generator().manual_seed(0)
    problem = Problem(likelihood, "gene", n=n, genes=genes, hidden=2, dtype=torch.float32)
    tensors = problem.tensors
    tensors["px_r"] = torch.linspace(-13.8, 18.4, genes)
    tensors["scale_weight"] = torch.zeros(genes, 2)
    tensors["scale_bias"] = torch.linspace(-28, 15, genes)[
        torch.randperm(genes, generator=generator)
    ]
    tensors["library"] = torch.linspace(-5, 16, n)[:, None]
    if likelihood == "zinb":
        tensors["dropout_bias"] = torch.linspace(-50, 50, genes)[
            torch.randperm(genes, generator=generator)
        ]
        tensors["dropout_weight"] = torch.zeros(genes, 2)
    problem.x = torch.tensor([0, 0, 0, 1, 2, 0.25, 17.0, 1e3, 1e6])[
        torch.randint(0, 9, (n, genes), generator=generator)
    ]
    nll, grads = problem.evaluate(dtype=torch.float32, backend=backend)

    exact = {name: t.double() for name, t in tensors.items()}
    logits = exact["scale_bias"].expand(n, genes)
    _, mu = reference64.scale_and_rate(logits, exact["library"], "softmax")
    theta = exact["px_r"].exp().expand(n, genes)
    d = exact.get("dropout_bias", torch.zeros(genes)).expand(n, genes)
    columns = torch.stack([problem.x.double(), mu, theta, d], -1).reshape(-1, 4).tolist()
    rows = [reference64.exact_log_prob(likelihood, *row) for row in columns]
    truth = torch.tensor(rows, dtype=torch.float64).reshape(n, genes, -1)
    true_nll = -truth[..., 0].sum(1)
    weight = -problem.upstream.double()
    u = weight[:, None] * mu * truth[..., 1]
    true_grads = {
        "library": u.sum(1, keepdim=True),
        "scale_bias": (u - mu / mu.sum(1, keepdim=True) * u.sum(1, keepdim=True)).sum(0),
        "px_r": (weight[:, None] * theta * truth[..., 2]).sum(0),
    }
    if likelihood == "zinb":
        true_grads["dropout_bias"] = (weight[:, None] * truth[..., 3]).sum(0)
    assert ((nll - true_nll).abs() <= 1e-6 * true_nll.abs()).all()
    for name, value in true_grads.items():
        assert_accurate(name, grads[name], value, None, 1e-5)


@pytest.mark.parametrize("theta", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("dispersion", ["gene", "head"])
def test_better_than_stock_at_large_theta(theta, dispersion, stock, backend):
    """Where stock's float32 is lost, the loss and the dispersion's gradient are not."""
    problem = Problem("nb", dispersion, dtype=torch.float32)
    problem.x = problem.x.clamp(max=20)
    name = {"gene": "px_r", "head": "r_bias"}[dispersion]
    problem.tensors[name] = torch.full((203,), theta).log()
    if dispersion == "head":
        problem.tensors["r_weight"] *= 0.01
    nll, grads = problem.evaluate(dtype=torch.float32, backend=backend)
    stock_values, stock_grads = problem.evaluate(stock_nll(stock), torch.float32)
    true_nll, true_grads = problem.truth()
    # float64 itself has lost: 1e-9 of the gradient at 1e4, 1e-5 of it at 1e6.
    for what, ours, theirs, truth in (
        ("nll", nll, stock_values, true_nll),
        (name, grads[name], stock_grads[name], true_grads[name]),
    ):
        assert error(ours, truth) < 1e-5, what
        assert error(theirs, truth) > 10 * error(ours, truth), what
        if theta >= 1e5:
            assert error(theirs, truth) > 1e-4, what


def test_log_mean_below_float32(backend):
    """A mean that underflows keeps its logarithm: scvi-tools would say -inf."""
    x = torch.tensor([[3.0, 0.0, 2.0]])
    arguments = dict(hidden=torch.ones(1, 1), library=torch.tensor([[5.0]]), backend=backend)
    weight = torch.tensor([[-200.0], [0.0], [-150.0]], requires_grad=True)
    nll = count_nll(x, **arguments, scale_weight=weight, likelihood="poisson")
    log_mu = torch.tensor([-195.0, 5.0, -145.0], dtype=torch.float64)
    truth = -(x * log_mu - log_mu.exp() - torch.lgamma(x.double() + 1)).sum(1)
    torch.testing.assert_close(nll.double(), truth, rtol=1e-6, atol=0)
    nll.sum().backward()
    # Of x - mu; the softmax takes exp(-200) of the sum, which is nothing.
    u = x[0].double() - log_mu.exp()
    expected = -(u - torch.tensor([0.0, 1.0, 0.0]) * u.sum())
    torch.testing.assert_close(weight.grad[:, 0].double(), expected, rtol=1e-6, atol=1e-6)
    # softplus(a) is exp(a) there, and below -745 zero even in float64.
    weight = torch.tensor([[-800.0], [0.0], [-150.0]], requires_grad=True)
    nll = count_nll(
        x, **arguments, scale_weight=weight, likelihood="poisson", scale_activation="softplus"
    )
    log_mu[0] -= 600
    log_mu[1] += torch.tensor(2.0, dtype=torch.float64).log().log()
    truth = -(x * log_mu - log_mu.exp() - torch.lgamma(x.double() + 1)).sum(1)
    torch.testing.assert_close(nll.double(), truth, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(nll.sum(), weight)
    torch.testing.assert_close(grad[[0, 2], 0], torch.tensor([-3.0, -2.0]))


@every_activation
@every_model
def test_cell_without_counts(likelihood, dispersion, scale_activation, backend):
    """Library -inf and no counts: zero loss under any count likelihood, and finite gradients."""
    problem = Problem(
        likelihood, dispersion, scale_activation, n=5, genes=20, dtype=torch.float32
    )
    problem.tensors["library"][2] = -torch.inf
    problem.x[2] = 0
    got = assert_right(problem, backend, 1e-11)
    assert all(g.isfinite().all() for g in got[1].values())
    if likelihood != "normal":
        assert got[0][2] == 0


@pytest.mark.parametrize("logits", ["equal", "huge"])
@every_model
def test_unusual_logits(likelihood, dispersion, logits, backend):
    """Logits all equal, or far apart."""
    problem = Problem(likelihood, dispersion, n=5, genes=20, dtype=torch.float32)
    if logits == "equal":
        problem.tensors["scale_weight"][:] = problem.tensors["scale_weight"][0]
        problem.tensors["scale_bias"][:] = 3
    else:
        problem.tensors["scale_bias"] *= 1e4
        problem.x[:] = problem.x * (problem.tensors["scale_bias"] > 1e4)  # xlogy(1, 0) is -inf
        top = problem.tensors["scale_bias"].argmax()
        problem.x[:, torch.arange(20) != top] = 0
    dtype = widest_dtype(backend)
    got, truth = problem.evaluate(dtype=dtype, backend=backend), problem.truth()
    rtol, grad_rtol = (1e-11, 1e-9) if dtype == torch.float64 else (1e-6, 1e-5)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=rtol, atol=0)
    for name, value in truth[1].items():
        # Of the whole gradient: where all logits are equal, what reaches the hidden units cancels.
        largest = max(g.abs().max().item() for g in truth[1].values())
        torch.testing.assert_close(
            got[1][name].double(), value, rtol=grad_rtol, atol=grad_rtol * largest
        )
    nll, grads = problem.evaluate(dtype=torch.float32, backend=backend)
    assert nll.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


@every_size
@every_activation
@every_model
def test_one_gene_one_cell(likelihood, dispersion, scale_activation, samples, backend):
    problem = Problem(
        likelihood,
        dispersion,
        scale_activation,
        samples=samples,
        n=1,
        genes=1,
        hidden=1,
        dtype=torch.float32,
    )
    problem.x[:] = 2
    assert_right(problem, backend, 1e-11)


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize(("samples", "n", "genes"), [(None, 0, 9), (2, 0, 9), (0, 4, 9), (2, 4, 0)])
@every_activation
@every_model
def test_empty(likelihood, dispersion, scale_activation, samples, n, genes, csr, backend):
    """Without cells, samples or genes: no loss, and gradients of zero."""
    problem = Problem(likelihood, dispersion, scale_activation, samples=samples, n=n, genes=genes)
    x = problem.x.to_sparse_csr() if csr else problem.x
    nll, grads = problem.evaluate(dtype=widest_dtype(backend), x=x, backend=backend)
    assert nll.shape == problem.upstream.shape
    assert not nll.any()
    assert all(not g.any() for g in grads.values())


# ---------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "wanted", [("hidden",), ("library",), ("px_r",), ("dropout_bias",), ("scale_weight", "px_r")]
)
@pytest.mark.parametrize("dispersion", ["gene", "table"])
def test_subsets_of_gradients(wanted, dispersion, backend):
    problem = Problem("zinb", dispersion, n=11, genes=45)
    options = dict(dtype=torch.float32, backend=backend)
    nll, every = problem.evaluate(**options)
    expected = {name: g if name in wanted else None for name, g in every.items()}
    assert_identical(problem.evaluate(wanted=wanted, **options), (nll, expected))


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        # Forwards two for the scale (log-sum-exp, likelihood), one for each other head; backwards
        # each logit once more, one product for each weight and one for each way to hidden.
        (None, 4 + 3 + 6),
        (("hidden",), 4 + 3 + 3),
        (("scale_weight",), 4 + 3 + 1),
        (("scale_weight", "scale_bias", "r_weight"), 4 + 3 + 2),
        (("dropout_bias", "r_bias"), 4 + 3),
        (("library",), 4),
    ],
)
def test_gradients_of_others_are_not_computed(monkeypatch, wanted, products):
    monkeypatch.setattr(tiled, "TILE", 1 << 18)  # one tile, however they are tuned
    problem = Problem("zinb", "head")
    with Recorder() as recorder:
        problem.evaluate(wanted=wanted, backend="torch")
    assert recorder.products == products


def test_unused_heads_have_no_gradient(backend):
    """None and not zero: an optimiser's weight decay would move them."""
    problem = Problem("zinb", "gene", n=5, genes=20, dtype=torch.float32)
    spare = {
        name: torch.randn(20, 13, requires_grad=True) for name in ("dropout_weight", "r_weight")
    }
    tensors = {
        name: problem.tensors[name].requires_grad_()
        for name in ("hidden", "library", "scale_weight", "px_r")
    }
    nb = count_nll(
        problem.x,
        **tensors,
        dropout_weight=spare["dropout_weight"],
        likelihood="nb",
        backend=backend,
    )
    nb.sum().backward()
    assert spare["dropout_weight"].grad is None
    del tensors["px_r"]
    problem.tensors["px_r"].grad = None
    poisson = count_nll(
        problem.x,
        **tensors,
        **spare,
        px_r=problem.tensors["px_r"],
        likelihood="poisson",
        backend=backend,
    )
    poisson.sum().backward()
    assert spare["dropout_weight"].grad is spare["r_weight"].grad is None
    assert problem.tensors["px_r"].grad is None
    assert tensors["scale_weight"].grad is not None


@every_size
def test_result_is_fresh(samples, backend):
    """The loss is changed in place downstream; the gradients must not feel it."""
    problem = Problem("zinb", "gene", samples=samples, n=5, genes=20)
    options = dict(dtype=widest_dtype(backend), backend=backend)

    def changed(*args, **options):
        nll = count_nll(*args, **options)
        nll += 1
        nll *= 2
        return nll

    nll, grads = problem.evaluate(**options)
    expected = 2 * (nll + 1), {name: 2 * g for name, g in grads.items()}
    # Twice the upstream gradient: exactly, as far as 2 x is taken without rounding.
    assert_same(problem.evaluate(changed, **options), expected, torch.finfo(nll.dtype).eps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, backend):
    problem = Problem("zinb", "gene", n=5, genes=20, dtype=torch.float32)
    expected, _ = problem.evaluate(dtype=torch.float32, backend=backend)
    tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    with mode():
        nll = count_nll(problem.x, **tensors, **problem.options, backend=backend)
    assert not nll.requires_grad
    assert torch.equal(nll, expected)


@every_size
@every_model
def test_memory_layout_does_not_matter(likelihood, dispersion, samples, backend):
    """Transposed, sliced and expanded inputs; and the same bits at every run."""
    problem = Problem(likelihood, dispersion, samples=samples, n=5, genes=20, dtype=torch.float32)
    problem.tensors["library"][:] = problem.tensors["library"][:1]
    problem.tensors["library"] = problem.tensors["library"][:1].expand(5, 1)
    options = dict(dtype=widest_dtype(backend), backend=backend)
    expected = problem.evaluate(**options)
    assert_identical(problem.evaluate(**options), expected)
    contiguous, x = problem.tensors, problem.x

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack([t, t * torch.nan], -1)[..., 0]

    for how in (transposed, sliced):
        problem.tensors = {name: how(t) for name, t in contiguous.items()}
        index = problem.options.get("px_r_index")
        changed = {} if index is None else {"px_r_index": torch.stack([index, index], 1)[:, 0]}
        got = problem.evaluate(x=how(x), **changed, **options)
        if backend == "torch":  # torch.mm takes its products in another order then
            assert_same(got, expected, 1e-14)
        else:
            assert_identical(got, expected)
    problem.tensors = contiguous | {"library": contiguous["library"].contiguous()}
    assert_identical(problem.evaluate(**options), expected)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), (1, 5, 1), (3, 1, 1), (3, 5, 1)])
def test_library_broadcasts(shape, backend):
    problem = Problem("nb", "gene", samples=3, n=5, genes=20, dtype=torch.float32)
    problem.tensors["library"] = torch.randn(shape) + 5
    assert_right(problem, backend, 1e-11)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("column", [False, True])
def test_labels(dtype, column, backend):
    """Labels of any integer dtype, as (N,) or (N, 1)."""
    problem = Problem("nb", "table", n=5, genes=20)
    options = dict(dtype=torch.float32, backend=backend)
    expected = problem.evaluate(**options)
    index = problem.options["px_r_index"].to(dtype)
    index = index[:, None] if column else index
    assert_identical(problem.evaluate(px_r_index=index, **options), expected)


@pytest.mark.usefixtures("small_tiles")
@every_activation
@pytest.mark.parametrize("samples", SIZES.values(), ids=SIZES)
@every_model
def test_gradcheck(likelihood, dispersion, scale_activation, samples):
    problem = Problem(
        likelihood, dispersion, scale_activation, samples=samples, n=8, genes=17, hidden=2
    )
    problem.x = problem.x.clamp(max=5)
    problem.tensors["library"] -= 3
    names = list(problem.tensors)

    def function(*tensors):
        return count_nll(problem.x, **dict(zip(names, tensors, strict=True)), **problem.options)

    leaves = [t.requires_grad_() for t in problem.tensors.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_double_backward_is_refused(backend):
    problem = Problem("nb", "gene", n=5, genes=20, dtype=torch.float32)
    weight = problem.tensors["scale_weight"].requires_grad_()
    nll = count_nll(problem.x, **problem.tensors, **problem.options, backend=backend)
    (grad,) = torch.autograd.grad(nll.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------
# Precision and memory


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half, backend):
    """Half-precision tensors are computed with in float32; their gradients are half again."""
    problem = Problem("zinb", "gene", n=5, genes=20, dtype=half)
    tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    nll = count_nll(problem.x, **tensors, **problem.options, backend=backend)
    assert nll.dtype == torch.float32
    truth, _ = problem.truth()
    torch.testing.assert_close(nll.double(), truth, rtol=1e-6, atol=0)
    nll.sum().backward()
    assert all(t.grad.dtype == half for t in tensors.values())


def test_autocast(backend):
    """Autocast changes nothing: the operation chooses its own precision, backward as forward."""
    problem = Problem("zinb", "head", n=5, genes=20, dtype=torch.float32)
    expected = problem.evaluate(dtype=torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = problem.evaluate(dtype=torch.float32, backend=backend)
    assert_identical(got, expected)


def test_float64_of_any_decides():
    problem = Problem("nb", "gene", n=5, genes=20, dtype=torch.float32)
    for name, dtype in (
        ("hidden", torch.float64),
        ("scale_weight", torch.float64),
        ("library", torch.float32),
    ):
        tensors = problem.tensors | {name: problem.tensors[name].double()}
        assert count_nll(problem.x, **tensors, **problem.options).dtype == dtype


@pytest.mark.parametrize("csr", [False, True])
@every_activation
@pytest.mark.parametrize(("likelihood", "dispersion"), [("zinb", "head"), ("nb", "table")])
def test_nothing_of_all_cells_and_genes(monkeypatch, likelihood, dispersion, scale_activation, csr):
    """Forward and backward: no tensor larger than a tile is made, and few of a tile's size live."""
    n, genes, hidden, tile = 600, 4000, 4, 1 << 14
    monkeypatch.setattr(tiled, "TILE", tile)
    monkeypatch.setattr(tiled, "_MAX_ROWS", 128)
    problem = Problem(
        likelihood,
        dispersion,
        scale_activation,
        n=n,
        genes=genes,
        hidden=hidden,
        dtype=torch.float32,
    )
    sparse = problem.x * (torch.rand(n, genes, generator=torch.Generator().manual_seed(1)) < 0.03)
    x = sparse.to_sparse_csr() if csr else sparse
    leaves = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    saved = []

    def save(t):
        saved.append(t)
        return t

    inputs = [*leaves.values(), *([x.values()] if csr else [x])]
    recorder = Recorder(*inputs)
    with recorder, torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        nll = count_nll(x, **leaves, **problem.options, backend="torch")
    own = {t.untyped_storage().data_ptr(): t.numel() for t in saved}
    for t in inputs:
        own.pop(t.untyped_storage().data_ptr(), None)
    nnz = int((sparse != 0).sum())
    assert sum(own.values()) <= 5 * n + csr * nnz, "kept for the backward pass"
    with recorder:
        nll.backward(problem.upstream)
    largest = max(tile, genes * 5, csr * nnz)  # a table of px_r has five columns
    assert recorder.largest <= largest
    assert n * genes > 60 * largest

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        count_nll(x, **leaves, **problem.options, backend="torch").backward(problem.upstream)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    live = list(itertools.accumulate(e.nbytes() for e in events))
    gradients = sum(t.numel() for t in leaves.values())
    # At most 30 tensors of a tile live at once, beside the results and what the CSR counts need.
    assert max(live) <= 4 * (30 * tile + 2 * gradients) + csr * 40 * nnz


# ---------------------------------------------------------------------------------------------
# torch.library and torch.compile


def operands(problem, x=None, options=("auto",)):
    """Arguments of the registered operation."""
    tensors = problem.tensors
    hidden, library = tensors["hidden"], tensors["library"]
    if hidden.dim() == 2:
        hidden = hidden[None]
    library = library[..., 0].expand(hidden.shape[:2])
    names = ("scale", "dropout", "r")
    heads = [tensors.get(f"{n}_{part}") for n in names for part in ("weight", "bias")]
    x = problem.x if x is None else x
    counts = (
        (None, x.crow_indices().clone(), x.col_indices().clone(), x.values().clone())
        if x.layout == torch.sparse_csr
        else (x, None, None, None)
    )
    return (
        hidden,
        library,
        *heads,
        tensors.get("px_r"),
        problem.options.get("px_r_index"),
        *counts,
        problem.options["likelihood"],
        problem.options["scale_activation"],
        *options,
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "csr"])
@pytest.mark.parametrize(
    ("likelihood", "dispersion", "scale_activation", "samples"),
    [
        ("zinb", "gene", "softmax", None),
        ("nb", "table", "softplus", 3),
        ("normal", "head", "softmax", 3),
        ("poisson", None, "softmax", 2),
    ],
)
def test_opcheck(likelihood, dispersion, scale_activation, samples, layout, backend):
    dtype = widest_dtype(backend)
    problem = Problem(
        likelihood,
        dispersion,
        scale_activation,
        samples=samples,
        n=5,
        genes=20,
        hidden=3,
        dtype=dtype,
    )
    if layout == "transposed":
        problem.tensors = {
            name: t.transpose(0, -1).contiguous().transpose(0, -1)
            for name, t in problem.tensors.items()
        }
        if samples:
            problem.tensors["library"] = torch.randn(5, samples, dtype=dtype).t()[..., None] + 5
    problem.tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    x = problem.x.to_sparse_csr() if layout == "csr" else problem.x
    arguments = operands(problem, x, (backend,))
    ops = torch.ops.decoder_fast
    torch.library.opcheck(ops.count_nll.default, arguments)
    with torch.no_grad():
        nll, shift, usum = ops.count_nll(*arguments)
    torch.library.opcheck(
        ops.count_nll_backward.default,
        (
            torch.randn_like(nll),
            shift,
            usum,
            *(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments),
            " ".join(problem.tensors),
        ),
    )


@pytest.mark.parametrize(
    ("likelihood", "dispersion", "scale_activation", "samples"),
    [
        ("zinb", "gene", "softmax", None),
        ("nb", "table", "softplus", 3),
        ("normal", "head", "softmax", 3),
        ("poisson", None, "softmax", None),
    ],
)
def test_compile(likelihood, dispersion, scale_activation, samples, dynamo, backend):
    """Compiled without a break, for the last, smaller mini-batch too: the same bits."""
    compiled = torch.compile(count_nll, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        for n in (9, 8, 5):
            problem = Problem(
                likelihood,
                dispersion,
                scale_activation,
                samples=samples,
                n=n,
                genes=20,
                dtype=torch.float32,
            )
            expected = problem.evaluate(dtype=torch.float32, backend=backend)
            got = problem.evaluate(compiled, torch.float32, backend=backend)
            assert_identical(got, expected)


def test_compile_frozen_head(dynamo, backend):
    """Heads that need no gradient get none from the compiled operation either."""
    problem = Problem("zinb", "gene", n=5, genes=20, dtype=torch.float32)
    options = dict(dtype=torch.float32, wanted=("hidden", "px_r"), backend=backend)
    compiled = torch.compile(count_nll, fullgraph=True, backend="aot_eager")
    assert_identical(problem.evaluate(compiled, **options), problem.evaluate(**options))


@pytest.mark.filterwarnings("ignore:Dynamo d")
def test_compile_csr(dynamo, backend):
    """torch.compile traces no sparse tensor; the graph breaks around it, and nothing else does."""
    problem = Problem("zinb", "table", n=5, genes=20, dtype=torch.float32)
    compiled = torch.compile(count_nll, backend="aot_eager")
    options = dict(dtype=torch.float32, x=problem.x.to_sparse_csr(), backend=backend)
    assert_identical(problem.evaluate(compiled, **options), problem.evaluate(**options))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's inductor needs g++")
def test_inductor(dynamo):
    """The three operations in one compiled decoder: values and gradients of the eager one."""
    problem = Problem("zinb", "gene", n=9, genes=20, hidden=6, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(9, 4, generator=generator)
    batch = torch.randint(0, 3, (9, 1), generator=generator)
    parameters = problem.tensors | {
        "weight": torch.randn(6, 7, generator=generator),
        "bias": torch.randn(6, generator=generator),
    }
    del parameters["hidden"]

    def decoder(weight, bias, library, scale_weight, **heads):
        hidden = covariate_linear(z, weight, bias, [batch], [3], use_layer_norm=True)
        scale, rate = softmax_library(F.linear(hidden, scale_weight), library)
        nll = count_nll(
            problem.x, hidden, library, scale_weight=scale_weight, likelihood="zinb", **heads
        )
        return nll.sum() + (scale * rate).sum()

    def run(function):
        leaves = {name: t.clone().requires_grad_() for name, t in parameters.items()}
        loss = function(**leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values())]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        got = run(torch.compile(decoder, fullgraph=True))
    # 1e-5: inductor fuses what stands between the operations, and rounds differently.
    torch.testing.assert_close(got, run(decoder), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Bad input


def with_value(value, dtype=torch.float32, csr=False):
    x = torch.ones(4, 6, dtype=dtype)
    x[2, 3] = value
    return x.to_sparse_csr() if csr else x


def meta(*shape):
    return torch.ones(*shape, device="meta")


def malformed(crow=(0, 2, 2, 3, 5), col=(0, 5, 2, 1, 3), n_values=5):
    return torch.sparse_csr_tensor(
        torch.tensor(crow),
        torch.tensor(col),
        torch.ones(n_values),
        size=(4, 6),
        check_invariants=False,
    )


TABLE = dict(px_r=torch.zeros(6, 3), px_r_index=torch.tensor([0, 1, 2, 0]))
BAD = {
    "x shape": (dict(x=torch.ones(4, 5)), ValueError, ["x has", "(4, 5)", "(4, 6)"]),
    "x 3-D": (dict(x=torch.ones(1, 4, 6)), ValueError, ["x has", "(1, 4, 6)", "(4, 6)"]),
    "x cells": (dict(x=torch.ones(3, 6).to_sparse_csr()), ValueError, ["x has", "(3, 6)"]),
    "x numpy": (dict(x=np.ones((4, 6))), TypeError, ["x is a numpy.ndarray", "as_tensor(x)"]),
    "library number": (dict(library=3.0), TypeError, ["library is a builtins.float", "Tensor"]),
    "px_r numpy": (dict(px_r=np.zeros(6)), TypeError, ["px_r is a numpy.ndarray"]),
    "x boolean": (dict(x=torch.ones(4, 6).bool()), TypeError, ["x has", "bool", "real"]),
    "x complex": (dict(x=torch.ones(4, 6) + 0j), TypeError, ["x has", "complex64", "real"]),
    "x coo": (dict(x=torch.ones(4, 6).to_sparse()), TypeError, ["x has", "sparse_coo", "csr"]),
    "x csc": (dict(x=torch.ones(4, 6).to_sparse_csc()), TypeError, ["x has", "sparse_csc", "csr"]),
    "x grad": (
        dict(x=torch.ones(4, 6, requires_grad=True)),
        ValueError,
        ["x requires grad", "detach"],
    ),
    "x device": (dict(x=meta(4, 6)), ValueError, ["x is on", "'meta'", "'cpu'"]),
    "x negative": (dict(x=with_value(-3)), ValueError, ["x holds", "-3", "non-negative"]),
    "x negative integer": (
        dict(x=with_value(-3, torch.int32)),
        ValueError,
        ["x holds", "-3", "non-negative"],
    ),
    "x negative csr": (
        dict(x=with_value(-3, csr=True)),
        ValueError,
        ["x holds", "-3", "non-negative"],
    ),
    "x infinite": (dict(x=with_value(torch.inf)), ValueError, ["x holds", "infinite", "finite"]),
    "x NaN": (dict(x=with_value(torch.nan)), ValueError, ["x holds", "nan", "non-negative"]),
    "x NaN csr": (
        dict(x=with_value(torch.nan, csr=True)),
        ValueError,
        ["x holds", "nan", "non-negative"],
    ),
    "x NaN normal": (
        dict(x=with_value(torch.nan), likelihood="normal", backend="torch"),
        ValueError,
        ["x holds NaN"],
    ),
    "csr column": (
        dict(x=malformed(col=(0, 6, 2, 1, 3))),
        ValueError,
        ["CSR", "4 cells x 6 genes", "0..5"],
    ),
    "csr huge column": (dict(x=malformed(col=(0, 1 << 40, 2, 1, 3))), ValueError, ["CSR", "0..5"]),
    "csr negative column": (dict(x=malformed(col=(0, -1, 2, 1, 3))), ValueError, ["CSR", "0..5"]),
    "csr descending": (dict(x=malformed(crow=(0, 3, 2, 3, 5))), ValueError, ["CSR", "ascend"]),
    "csr start": (dict(x=malformed(crow=(1, 2, 2, 3, 5))), ValueError, ["CSR", "ascend from 0"]),
    "csr end": (dict(x=malformed(crow=(0, 2, 2, 3, 9))), ValueError, ["CSR", "ascend"]),
    "csr rows": (dict(x=malformed(crow=(0, 2, 5))), ValueError, ["CSR", "4 cells"]),
    "csr values": (dict(x=malformed(n_values=4)), ValueError, ["CSR", "number of values"]),
    "hidden 1-D": (dict(hidden=torch.ones(3)), ValueError, ["hidden has", "(3,)", "(cells"]),
    "hidden dtype": (dict(hidden=torch.ones(4, 3).int()), TypeError, ["hidden has", "int32"]),
    "hidden units": (
        dict(hidden=torch.ones(4, 2)),
        ValueError,
        ["scale_weight", "(6, 3)", "(6, 2)"],
    ),
    "library (N,)": (dict(library=torch.ones(4)), ValueError, ["library", "(4,)", "(4, 1)"]),
    "library (N, G)": (dict(library=torch.ones(4, 6)), ValueError, ["library", "(4, 6)", "(4, 1)"]),
    "library cells": (dict(library=torch.ones(3, 1)), ValueError, ["library", "(3, 1)", "(4, 1)"]),
    "library scalar": (dict(library=torch.tensor(1.0)), ValueError, ["library", "()", "(4, 1)"]),
    "library dtype": (dict(library=torch.ones(4, 1).long()), TypeError, ["library", "int64"]),
    "library device": (dict(library=meta(4, 1)), ValueError, ["library is on", "'meta'", "'cpu'"]),
    "scale_weight scalar": (
        dict(scale_weight=torch.tensor(1.0)),
        ValueError,
        ["scale_weight", "()", "(genes, hidden units)"],
    ),
    "scale_weight dtype": (
        dict(scale_weight=torch.ones(6, 3).int()),
        TypeError,
        ["scale_weight", "int32"],
    ),
    "scale_weight device": (dict(scale_weight=meta(6, 3)), ValueError, ["scale_weight", "'meta'"]),
    "scale_bias shape": (
        dict(scale_bias=torch.ones(6, 1)),
        ValueError,
        ["scale_bias", "(6, 1)", "(6,)"],
    ),
    "scale_bias device": (dict(scale_bias=meta(6)), ValueError, ["scale_bias", "'meta'"]),
    "dropout missing": (dict(dropout_weight=None), ValueError, ["'zinb'", "dropout_weight"]),
    "dropout bias alone": (
        dict(dropout_weight=None, dropout_bias=torch.ones(6)),
        ValueError,
        ["dropout_bias", "without dropout_weight"],
    ),
    "dropout shape": (
        dict(dropout_weight=torch.ones(5, 3)),
        ValueError,
        ["dropout_weight", "(5, 3)", "(6, 3)"],
    ),
    "dropout dtype": (
        dict(dropout_weight=torch.ones(6, 3).int()),
        TypeError,
        ["dropout_weight", "int32"],
    ),
    "no dispersion": (dict(px_r=None), ValueError, ["'zinb'", "px_r", "r_weight", "neither"]),
    "two dispersions": (dict(r_weight=torch.ones(6, 3)), ValueError, ["px_r", "r_weight", "both"]),
    "r_weight shape": (
        dict(px_r=None, r_weight=torch.ones(6, 4)),
        ValueError,
        ["r_weight", "(6, 4)", "(6, 3)"],
    ),
    "r_bias alone": (dict(r_bias=torch.ones(6)), ValueError, ["r_bias", "without r_weight"]),
    "px_r shape": (dict(px_r=torch.ones(5)), ValueError, ["px_r has", "(5,)", "(6,)"]),
    "px_r dtype": (dict(px_r=torch.ones(6).int()), TypeError, ["px_r has", "int32"]),
    "px_r device": (dict(px_r=meta(6)), ValueError, ["px_r is on", "'meta'", "'cpu'"]),
    "px_r table": (dict(px_r=torch.ones(6, 3)), ValueError, ["px_r has", "(6, 3)", "px_r_index"]),
    "table shape": (
        TABLE | dict(px_r=torch.ones(3, 6)),
        ValueError,
        ["px_r has", "(3, 6)", "(6, n)"],
    ),
    "table 1-D": (TABLE | dict(px_r=torch.ones(6)), ValueError, ["px_r has", "(6,)", "(6, n)"]),
    "index alone": (
        dict(px_r_index=TABLE["px_r_index"], px_r=None, r_weight=torch.ones(6, 3)),
        ValueError,
        ["px_r_index", "without px_r"],
    ),
    "index dtype": (
        TABLE | dict(px_r_index=torch.ones(4)),
        TypeError,
        ["px_r_index", "float32", "integers"],
    ),
    "index shape": (
        TABLE | dict(px_r_index=torch.ones(3).long()),
        ValueError,
        ["px_r_index", "(3,)", "(4,)"],
    ),
    "index device": (
        TABLE | dict(px_r_index=meta(4).long()),
        ValueError,
        ["px_r_index", "'meta'", "'cpu'"],
    ),
    "label too large": (
        TABLE | dict(px_r_index=torch.tensor([0, 1, 3, 0])),
        ValueError,
        ["px_r_index", "label 3", "3 categories", "0..2"],
    ),
    "label negative": (
        TABLE | dict(px_r_index=torch.tensor([0, 1, -1, 0])),
        ValueError,
        ["px_r_index", "label -1", "3 categories"],
    ),
    "likelihood": (dict(likelihood="gamma"), ValueError, ["'gamma'", "'nb'", "'poisson'"]),
    "likelihood tensor": (
        dict(likelihood=torch.ones(4, 6)),
        TypeError,
        ["likelihood is a Tensor, expected one of 'nb'"],
    ),
    "activation": (
        dict(scale_activation="exp"),
        ValueError,
        ["scale_activation", "'exp'", "'softmax'", "'softplus'"],
    ),
    "backend": (dict(backend="cuda"), ValueError, ["'cuda'", "'auto'", "'torch'"]),
}


@pytest.mark.parametrize(("change", "kind", "parts"), BAD.values(), ids=BAD)
def test_bad_input(change, kind, parts, backend):
    arguments = {
        "x": torch.ones(4, 6),
        "hidden": torch.ones(4, 3),
        "library": torch.ones(4, 1),
        "scale_weight": torch.ones(6, 3),
        "dropout_weight": torch.ones(6, 3),
        "px_r": torch.zeros(6),
        "likelihood": "zinb",
        "backend": backend,
    }
    with pytest.raises(kind) as raised:
        count_nll(**(arguments | change))
    for part in parts:
        assert part in str(raised.value)


def test_tiles_are_large_where_each_launch_costs():
    for device, expected in (("cpu", 10), ("meta", 1)):
        inputs = SimpleNamespace(
            hidden=torch.empty(1, 128, 1, device=device),
            scale_weight=torch.empty(20_000, 1, device=device),
        )
        assert len(list(tiled.Inputs.gene_tiles(inputs, slice(0, 128)))) == expected


def test_messages_that_a_gpu_takes(monkeypatch):
    """CUDA raises at every assertion whose message has 255 characters or more, true or not."""
    from decoder_fast.reference import counts

    messages = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, said: messages.append(said))
    on_device = torch.ones((), dtype=torch.bool, device="meta")
    for message in (
        *(counts._bad_indices(10**8, 10**6), counts.BAD_COUNT, counts.INFINITE_COUNT),
        "x" * 300,
    ):
        counts._require(on_device, message)
    *ours, long = map(len, messages)
    assert max(ours) < 250 and long == 254


def test_backend_that_cannot_run(missing_backend):
    problem = Problem("nb", "gene", n=5, genes=20)
    with pytest.raises(RuntimeError) as raised:
        problem.evaluate(backend=missing_backend)
    reason = choose(OPERATION, device=problem.x.device).reasons.get(missing_backend, "")
    for part in (repr(missing_backend), OPERATION, reason, "backend='auto'"):
        assert part in str(raised.value)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("csr", [False, True])
def test_a_bad_count_in_the_last_tile(csr, backend):
    problem = Problem("nb", "gene", dtype=torch.float32)
    problem.x[-1, -1] = -1
    x = problem.x.to_sparse_csr() if csr else problem.x
    with pytest.raises(ValueError, match="non-negative"):
        problem.evaluate(dtype=torch.float32, x=x, backend=backend)
