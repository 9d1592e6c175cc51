"""The Triton kernels of ``count_nll``: in Triton's interpreter, or on a GPU where there is one.

The truth is that of ``reference64.py``. Sizes exceed one tile in every dimension, with a remainder
in each, on both routes; the chunks of genes are made small, so that there are several.
"""

from __future__ import annotations

import interpreter
import pytest
import reference64 as truth
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoder_fast.functional import count_nll

OPERATION = "count_nll"
N, G, H = 35, 140, 37  # tiles have at most 32 rows and 64 genes, products steps of 32
ROUTES = ["fused", "chunked"]
#: On the chunked route kernels of their own take CSR counts' non-zeros.
layouts = pytest.mark.parametrize("layout", ["dense", "csr"])
EVERY = [
    ("poisson", "none"),
    *((likelihood, by) for likelihood in ("nb", "zinb") for by in ("gene", "table", "cell")),
]


def offered(by, route):
    return route == "chunked" or by in ("gene", "none")


@pytest.fixture
def kernels(triton_device):
    from decoder_fast.triton_kernels import count_nll as kernels

    return kernels


@pytest.fixture
def several_chunks(kernels, monkeypatch):
    """Chunks of 64 genes, where the kernels read genes by chunks."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)


@pytest.fixture
def take(kernels, monkeypatch):
    """Choose the route."""

    def choose(route):
        monkeypatch.setattr(kernels, "is_fused", lambda inputs: route == "fused")

    return choose


def problem(
    likelihood,
    by,
    *,
    n=N,
    n_genes=G,
    n_hidden=H,
    n_samples=None,
    bias=True,
    seed=0,
    theta=1.0,
    fractions=False,
):
    """Counts and float32 parameters; ``theta`` scales the spread of the log dispersions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    lead = () if n_samples is None else (n_samples,)
    parameters = {
        "hidden": torch.relu(draw(*lead, n, n_hidden)),
        "library": 5 + draw(*lead, n, 1),
        "scale_weight": draw(n_genes, n_hidden) * 0.3,
    }
    heads = ["scale"]
    if likelihood == "zinb":
        parameters["dropout_weight"] = draw(n_genes, n_hidden) * 0.5
        heads.append("dropout")
    if by == "gene":
        parameters["px_r"] = draw(n_genes) * theta
    elif by == "table":  # the last label is nobody's
        parameters["px_r"] = draw(n_genes, 6) * theta
        parameters["px_r_index"] = torch.randint(0, 5, (n,), generator=generator)
    elif by == "cell":
        parameters["r_weight"] = draw(n_genes, n_hidden) * 0.3 * theta
        heads.append("r")
    if bias:
        parameters |= {f"{head}_bias": draw(n_genes) for head in heads}
    x = torch.poisson(torch.exp(draw(n, n_genes) + 0.5), generator=generator)
    x *= torch.rand(n, n_genes, generator=generator) < 0.3
    x[-1:] = 0
    if n_genes > 3 and n > 2:
        x[0, 1] = 3000.0
    return (x * 0.37 if fractions else x), parameters


def laid_out(x, layout):
    return x.to_sparse_csr() if layout == "csr" else x


def evaluate(function, x, parameters, dtype, upstream=None, wanted=None, device="cpu", **options):
    """The loss, and the gradients that are wanted, on the CPU."""
    inputs = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in parameters.items()
    }
    names = [
        name
        for name, value in inputs.items()
        if value.is_floating_point() and (wanted is None or name in wanted)
    ]
    for name in names:
        inputs[name] = inputs[name].detach().requires_grad_()
    arguments = dict(inputs)
    positional = [arguments.pop(name) for name in ("hidden", "library", "scale_weight")]
    nll = function(x.to(device), *positional, **arguments, **options)
    if upstream is None:
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(nll.shape, generator=generator)
    gradients = torch.autograd.grad(
        nll, [inputs[name] for name in names], upstream.to(device, dtype)
    )
    results = dict(zip(["nll", *names], [nll.detach(), *gradients], strict=True))
    return {name: value.cpu() for name, value in results.items()}


def assert_as_good_as_torch(got, exact, plain, floor=1e-6):
    """No worse than three times plain torch in float32; ``floor`` covers its luckiest cases."""
    for name, value in exact.items():
        assert got[name].shape == value.shape
        scale = value.abs().max().clamp(min=1e-30)
        error = float((got[name].double() - value).abs().max() / scale)
        allowed = float((plain[name].double() - value).abs().max() / scale)
        assert error <= max(3 * allowed, floor), (name, error, allowed)


def check(x, parameters, device, *, layout="dense", floor=1e-6, upstream=None, **options):
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, upstream, **options)
    plain = evaluate(count_nll, x, parameters, torch.float32, upstream, backend="torch", **options)
    got = evaluate(
        count_nll,
        laid_out(x, layout),
        parameters,
        torch.float32,
        upstream,
        device=device,
        backend="triton",
        **options,
    )
    assert_as_good_as_torch(got, exact, plain, floor)
    return got


@pytest.mark.usefixtures("poisoned", "several_chunks")
@pytest.mark.parametrize(
    ("likelihood", "by", "route", "layout"),
    [
        (*case, route, layout)
        for case in EVERY
        for route, layout in (("fused", "csr"), ("chunked", "dense"), ("chunked", "csr"))
        if offered(case[1], route)
    ],
)
@pytest.mark.parametrize("scale_activation", ["softmax", "softplus"])
def test_accuracy(likelihood, by, scale_activation, route, layout, take, triton_device):
    take(route)
    # a tile has 8 rows there, and kernels of the non-zeros have a program for each row
    n = 19 if route == "chunked" else N
    x, parameters = problem(likelihood, by, n=n)
    check(
        x,
        parameters,
        triton_device,
        layout=layout,
        likelihood=likelihood,
        scale_activation=scale_activation,
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("route", "layout"), [("either", "dense"), ("chunked", "csr")])
@pytest.mark.parametrize(("likelihood", "by"), EVERY)
def test_monte_carlo_samples_without_biases(likelihood, by, route, layout, take, triton_device):
    take("fused" if route == "either" and offered(by, "fused") else "chunked")
    x, parameters = problem(likelihood, by, n=11, n_genes=70, n_samples=3, bias=False)
    check(x, parameters, triton_device, likelihood=likelihood, layout=layout)


@pytest.mark.usefixtures("poisoned")
@layouts
def test_long_rows(layout, take, kernels, triton_device, monkeypatch):
    """Several tiles of every kernel for one program, with a remainder."""
    take("chunked")
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    x, parameters = problem("zinb", "gene", n=11, n_genes=1_300, n_hidden=5)
    check(x, parameters, triton_device, likelihood="zinb", layout=layout)


@layouts
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_long_sums(likelihood, layout, take, kernels, triton_device, monkeypatch):
    """240 tiles added by one program: plain float32 sums would lose a digit."""
    take("chunked")
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    by = "none" if likelihood == "poisson" else "gene"
    x, parameters = problem(likelihood, by, n=4, n_genes=15_333, n_hidden=2)
    options = {"likelihood": likelihood, "scale_activation": "softplus", "wanted": {"library"}}
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, **options)
    got = evaluate(
        count_nll,
        laid_out(x, layout),
        parameters,
        torch.float32,
        device=triton_device,
        backend="triton",
        **options,
    )
    relative = (got["nll"].double() / exact["nll"] - 1).abs()
    assert relative.max() <= 1.2e-7  # two roundings


def test_more_labels_than_a_grid_is_high(kernels, take, triton_device, monkeypatch):
    """Only a grid's first dimension may have more than 65,535 programs."""
    take("chunked")
    grids, launch = {}, kernels.launch

    def recorded(kernel, grid, *args, **options):
        grids[kernel.fn.__name__] = grid
        if kernel is not kernels._sum_by_label:
            launch(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", recorded)
    x, parameters = problem("nb", "table", n=3, n_genes=5)
    parameters["px_r"] = torch.zeros(5, 70_000)
    options = {"likelihood": "nb", "backend": "triton", "device": triton_device}
    evaluate(count_nll, x, parameters, torch.float32, **options)
    assert 70_000 in grids["_sum_by_label"]
    assert max(size for grid in grids.values() for size in grid[1:]) <= 65_535


@layouts
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 3), (35, 1, 130), (3, 65, 64)])
def test_small_and_odd_shapes(shape, route, layout, take, triton_device):
    take(route)
    n, n_genes, n_hidden = shape
    x, parameters = problem("zinb", "gene", n=n, n_genes=n_genes, n_hidden=n_hidden)
    # The softmax of one gene is 1, whatever its logit: gradients by it are nothing but rounding.
    nothing = {"scale_weight", "scale_bias"} if n_genes == 1 else set()
    wanted = parameters.keys() - nothing
    options = {"likelihood": "zinb"}
    got = check(x, parameters, triton_device, layout=layout, floor=2e-6, wanted=wanted, **options)
    size = got["library"].abs().sum() * parameters["hidden"].abs().max().clamp(min=1)
    options |= {"device": triton_device, "backend": "triton", "wanted": nothing | {"library"}}
    got = evaluate(count_nll, laid_out(x, layout), parameters, torch.float32, **options)
    assert all(got[name].abs().max() <= 1e-6 * size for name in nothing)


@pytest.mark.parametrize(("n_genes", "programs"), [(2_000, 500), (40_000, 1)])
def test_what_shifts_a_row_is_rounded_once(
    n_genes, programs, take, kernels, triton_device, monkeypatch
):
    """Its error is that of every mean, so that sums over genes do not average it out."""
    take("chunked")
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    n = 8
    generator = torch.Generator().manual_seed(0)
    bias = 0.3 * torch.randn(n_genes, generator=generator) - 2  # logits without a product's error
    size = bias.double().logsumexp(0)
    library = size.float() + torch.randn(n, 1, generator=generator) / 2
    shift = torch.ops.decoder_fast.count_nll(
        *(t.to(triton_device) for t in (torch.ones(1, n, 1), library[None, :, 0])),
        *(t.to(triton_device) for t in (torch.zeros(n_genes, 1), bias)),
        *(None,) * 6,
        *(torch.zeros(n, n_genes, device=triton_device), None, None, None),
        *("poisson", "softmax", "triton"),
    )[1].cpu()
    exact = library[:, 0].double() - size
    # half a unit in its last place, and a GPU's rounding of the exponentials, which it sums
    assert ((shift[0] - exact).abs() <= 6e-8 * exact.abs() + 1e-7).all()


@layouts
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("likelihood", "by", "library"),
    [
        *(("poisson", "none", library) for library in (-100.0, -41.0, -39.0, 80.0)),
        *(("nb", "gene", library) for library in (-80.0, -41.0, -39.0, 80.0)),
    ],
)
def test_extreme_libraries(likelihood, by, library, route, layout, take, triton_device):
    """The mean leaves the range of float32, or nearly so; the softmax does not."""
    take(route)
    x, parameters = problem(likelihood, by, n=9, n_genes=70)
    parameters["library"].fill_(library)
    check(x, parameters, triton_device, likelihood=likelihood, layout=layout, floor=5e-6)


@layouts
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("likelihood", "by"), [("poisson", "none"), ("zinb", "gene")])
def test_cell_without_counts(likelihood, by, route, layout, take, triton_device):
    """Whose library size is the logarithm of nothing."""
    take(route)
    x, parameters = problem(likelihood, by, n=33 if route == "fused" else 11, n_genes=70)
    x[:2] = 0
    parameters["library"][:2] = -torch.inf
    check(x, parameters, triton_device, likelihood=likelihood, layout=layout)


@pytest.mark.parametrize(("n", "n_genes"), [(0, 5), (4, 0)])
def test_no_cells_and_no_genes(n, n_genes, kernels, triton_device):
    x, parameters = problem("nb", "gene", n=n, n_genes=n_genes)
    got = evaluate(
        count_nll,
        x,
        parameters,
        torch.float32,
        device=triton_device,
        backend="triton",
        likelihood="nb",
    )
    assert got["nll"].shape == (n,)
    assert all((value == 0).all() for value in got.values())


@layouts
@pytest.mark.parametrize("log_theta", [-14.0, -3.0, 0.0, 9.0, 14.0])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_extreme_dispersions(likelihood, log_theta, layout, take, triton_device):
    """theta from 1e-6 to 1e6, where lgamma(x + theta) - lgamma(theta) has no digits in float32."""
    take("chunked")
    x, parameters = problem(likelihood, "gene", n=9, n_genes=140, theta=0.1)
    parameters["px_r"] += log_theta
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, likelihood=likelihood)
    got = evaluate(
        count_nll,
        laid_out(x, layout),
        parameters,
        torch.float32,
        device=triton_device,
        backend="triton",
        likelihood=likelihood,
    )
    for name, value in exact.items():
        if name == "px_r" and log_theta > 8:
            continue  # float64 itself has lost it: test_extreme_elements has it from mpmath
        scale = value.abs().max()
        # the likelihood to 1e-6; gradients to 1e-5
        assert (got[name] - value).abs().max() <= (1e-6 if name == "nll" else 1e-5) * scale, name


@layouts
@pytest.mark.parametrize("log_theta", [-79.0, -81.0, -95.0, -120.0])
@pytest.mark.parametrize(
    ("likelihood", "by"), [("nb", "gene"), ("zinb", "gene"), ("nb", "table"), ("zinb", "cell")]
)
def test_dispersions_that_underflow(likelihood, by, log_theta, layout, take, triton_device):
    take("chunked")
    x, parameters = problem(likelihood, by, n=9, n_genes=140)
    if by == "cell":
        parameters["r_weight"][::3] = 0
    parameters["r_bias" if by == "cell" else "px_r"][::3] = log_theta
    options = {"likelihood": likelihood}
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, **options)
    options |= {"device": triton_device, "backend": "triton"}
    got = evaluate(count_nll, laid_out(x, layout), parameters, torch.float32, **options)
    for name, value in exact.items():  # plain torch, where theta is 0, has no number to compare
        assert (got[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


def test_the_limit_that_is_poisson(take, triton_device):
    """Derivatives by the dispersion that underflow have been computed, all the same."""
    take("chunked")
    x, parameters = problem("nb", "gene", n=9, n_genes=140)
    parameters["px_r"].fill_(75.0)
    poisson = {name: value for name, value in parameters.items() if name != "px_r"}
    upstream = torch.full((9,), 1e-20)
    exact = evaluate(
        truth.count_nll, x.double(), poisson, torch.float64, upstream, likelihood="poisson"
    )
    options = {"likelihood": "nb", "device": triton_device, "backend": "triton"}
    got = evaluate(count_nll, x.to_sparse_csr(), parameters, torch.float32, upstream, **options)
    assert got.pop("px_r").abs().max() <= 1e-20
    for name, value in exact.items():
        assert (got[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


@layouts
@pytest.mark.parametrize("theta", [1e-6, 1e-2, 1.0, 50.0, 1e4, 1e6])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_extreme_elements(likelihood, theta, layout, kernels, triton_device):
    """Single elements against 80 digits: one gene, and a dispersion of its own for every cell."""
    x, log_mu = (
        values.flatten()
        for values in torch.meshgrid(
            torch.tensor([0.0, 1e-3, 0.5, 1.0, 2.0, 37.0, 1e4, 1e6]),
            torch.tensor([1e-6, 0.3, 40.0, 1e4, 1e7]).log(),
            indexing="ij",
        )
    )
    n, d = len(x), 0.7
    zeros = torch.zeros(1, 1)
    parameters = {
        "hidden": torch.ones(n, 1),
        "library": log_mu[:, None],  # mu = exp(library) softplus(0)
        "scale_weight": zeros,
        "px_r": torch.full((1, n), theta).log(),
        "px_r_index": torch.arange(n),
    }
    if likelihood == "zinb":
        parameters |= {"dropout_weight": zeros, "dropout_bias": torch.tensor([d])}
    got = evaluate(
        count_nll,
        laid_out(x[:, None], layout),
        parameters,
        torch.float32,
        torch.ones(n),
        {"library", "px_r"},
        device=triton_device,
        likelihood=likelihood,
        scale_activation="softplus",
        backend="triton",
    )
    theta = float(parameters["px_r"][0, 0].double().exp())
    d = float(torch.tensor(d))
    mus = (log_mu.double().exp() * torch.tensor(2.0).double().log()).tolist()
    for i, mu in enumerate(mus):
        # What four float32 roundings of the mean make of the exact results.
        at = [
            truth.exact_log_prob(likelihood, float(x[i]), mu * factor, theta, d)
            for factor in (1, 1 + 5e-7, 1 - 5e-7)
        ]
        exact, *near = [(-v[0], -v[1] * m, -v[2] * theta) for v, m in zip(
            at, (mu, mu * (1 + 5e-7), mu * (1 - 5e-7)), strict=True
        )]  # fmt: skip
        results = (got["nll"][i], got["library"][i, 0], got["px_r"][0, i])
        for k, bound in enumerate((1e-6, 1e-5, 1e-5)):
            blur = max(abs(other[k] - exact[k]) for other in near)
            # Roundings of the terms that the result is a sum of: about one; x / (x + theta) and the
            # slope of Binet's function, 1 / (12 theta).
            slopes = float(x[i]) / (float(x[i]) + theta) + 1 / (12 * theta + 12)
            terms = {0: 1.0, 1: 0.0, 2: slopes}[k]
            allowed = bound * abs(exact[k]) + blur + 6e-7 * terms
            assert abs(float(results[k]) - exact[k]) <= allowed, (k, float(x[i]), mu)


@layouts
@pytest.mark.parametrize("route", ROUTES)
def test_subsets_of_gradients(route, layout, take, triton_device):
    take(route)
    # one row more than a tile has
    x, parameters = problem("zinb", "gene", n=33 if route == "fused" else 9, n_genes=70)
    x = laid_out(x, layout)
    options = {"likelihood": "zinb", "device": triton_device, "backend": "triton"}
    every = evaluate(count_nll, x, parameters, torch.float32, **options)
    for name in ("hidden", "library", "scale_bias", "dropout_weight", "px_r", "scale_weight"):
        some = evaluate(count_nll, x, parameters, torch.float32, wanted={name}, **options)
        assert some.keys() == {"nll", name}
        if triton_device.type == "cpu":
            assert torch.equal(some[name], every[name]), name
        else:  # each subset is a kernel of its own, whose compiler may fuse other multiply-adds
            floor = 1e-6 * every[name].abs().max().item()
            torch.testing.assert_close(some[name], every[name], rtol=1e-6, atol=floor)


@layouts
@pytest.mark.parametrize("route", ROUTES)
def test_upstream_gradients(route, layout, take, triton_device):
    take(route)
    n = 33 if route == "fused" else 18
    x, parameters = problem("nb", "gene", n=n, n_genes=70)
    options = {"likelihood": "nb", "layout": layout}
    upstream = torch.linspace(-1, 1, n)
    upstream[3:9] = 0
    for given_gradient in (upstream, torch.tensor(1 / n).expand(n)):
        check(x, parameters, triton_device, upstream=given_gradient, **options)
    got = evaluate(
        count_nll,
        laid_out(x, layout),
        parameters,
        torch.float32,
        torch.zeros(n),
        device=triton_device,
        likelihood="nb",
        backend="triton",
    )
    assert all((value == 0).all() for name, value in got.items() if name != "nll")


@pytest.mark.usefixtures("several_chunks")
@layouts
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float64])
def test_dtypes_of_counts(dtype, layout, take, triton_device):
    take("chunked")
    x, parameters = problem("nb", "gene", n=18, n_genes=70)
    x = x.clamp(max=250)
    options = {"likelihood": "nb", "device": triton_device, "backend": "triton"}
    expected = evaluate(count_nll, x, parameters, torch.float32, **options)
    x = laid_out(x.to(dtype), layout)
    got = evaluate(count_nll, x, parameters, torch.float32, **options)
    for name, value in expected.items():  # integers go a shorter way through the gamma functions
        bound = 2e-6 * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=2e-6, atol=bound)


@layouts
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_fractions(likelihood, layout, take, triton_device):
    take("chunked")
    by = "none" if likelihood == "poisson" else "gene"
    x, parameters = problem(likelihood, by, n=11, n_genes=70, fractions=True)
    check(x, parameters, triton_device, likelihood=likelihood, layout=layout)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_csr_in_any_order_and_with_duplicates(index, route, take, kernels, triton_device):
    """Rows of several blocks, one of them out of order and one with repeated columns."""
    take(route)
    n_genes = 2 * kernels._NONZEROS["BLOCK"] + 50
    generator = torch.Generator().manual_seed(0)
    ascending = torch.arange(n_genes)
    shuffled = torch.randperm(n_genes, generator=generator)
    columns = [shuffled, ascending[:0], ascending, shuffled.repeat(2), torch.tensor([7, 7, 7])]
    crow = torch.tensor([0, *map(len, columns)]).cumsum(0)
    col = torch.cat(columns)
    values = torch.poisson(torch.ones(len(col)), generator=generator)
    values[-3:] = torch.tensor([5.0, -2.0, 0.0])  # it is their sum that must not be negative
    x = torch.sparse_csr_tensor(
        crow.to(index), col.to(index), values, (5, n_genes), check_invariants=False
    )
    _, parameters = problem("nb", "gene", n=5, n_genes=n_genes, n_hidden=5)
    dense = torch.zeros(5, n_genes)
    rows = torch.repeat_interleave(torch.arange(5), crow.diff())
    dense.index_put_((rows, col), values, accumulate=True)
    exact = evaluate(truth.count_nll, dense.double(), parameters, torch.float64, likelihood="nb")
    plain = evaluate(count_nll, x, parameters, torch.float32, likelihood="nb", backend="torch")
    options = {"likelihood": "nb", "device": triton_device, "backend": "triton"}
    got = evaluate(count_nll, x, parameters, torch.float32, **options)
    assert_as_good_as_torch(got, exact, plain)


@pytest.mark.parametrize("route", ROUTES)
def test_zeros_that_csr_stores(route, take, triton_device):
    """Zeros, and what scvi-tools takes for zero."""
    take(route)
    x, parameters = problem("zinb", "gene", n=5, n_genes=300)
    stored = x + 1.0
    csr = stored.to_sparse_csr()
    csr.values().sub_(1.0)
    csr.values()[::7] *= 1e-12
    x.view(-1)[::7] = 0
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, likelihood="zinb")
    plain = evaluate(count_nll, x, parameters, torch.float32, likelihood="zinb", backend="torch")
    options = {"likelihood": "zinb", "device": triton_device, "backend": "triton"}
    got = evaluate(count_nll, csr, parameters, torch.float32, **options)
    assert_as_good_as_torch(got, exact, plain)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("programs", [1, 10_000])
@pytest.mark.parametrize("by", ["gene", "cell"])
def test_parts_of_a_row(by, programs, take, kernels, triton_device, monkeypatch):
    """One program takes all non-zeros of a row, or each block of them its own."""
    take("chunked")
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    x, parameters = problem("zinb", by, n=3, n_genes=1000, n_hidden=5)
    x[0] += 1
    x[1, :450] += 1
    parts = []
    launch = kernels.launch

    def recorded(kernel, grid, *args, **options):
        if "nonzeros" in kernel.__name__:
            parts.append(grid[1])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", recorded)
    check(x, parameters, triton_device, likelihood="zinb", layout="csr")
    average = x.count_nonzero() // (3 * kernels._NONZEROS["BLOCK"])
    assert average > 1 and set(parts) == {1 if programs == 1 else int(average)}


@pytest.mark.parametrize(
    ("n_genes", "expected"), [(100, 1), (2_000, 1), (64 * 6 + 1, 4), (40_000, 6), (400_000, 6)]
)
def test_number_of_chunks(n_genes, expected, kernels, triton_device, monkeypatch):
    """As many as a byte budget allows, but no more than Python can launch in time."""
    from decoder_fast.ops.count_nll import _inputs

    if expected == 4:
        monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "FUSED_ELEMENTS", 0)
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: None)
    inputs = _inputs(
        torch.zeros(1, 2_000, 1),
        torch.zeros(1, 2_000),
        torch.zeros(n_genes, 1),
        *(None,) * 5,
        torch.zeros(n_genes),
        None,
        torch.zeros(1, n_genes).expand(2_000, n_genes),
        *(None,) * 3,
        "nb",
        "softmax",
    )
    chunks = [chunk.genes for chunk in kernels._Problem(inputs).chunks]
    assert len(chunks) == expected
    assert [chunk.stop for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
    assert (chunks[0].start, chunks[-1].stop) == (0, n_genes)


@pytest.mark.parametrize(
    ("by", "route"), [("gene", "fused"), ("gene", "chunked"), ("cell", "chunked")]
)
def test_sliced_and_expanded_inputs(by, route, take, triton_device):
    take(route)
    x, parameters = problem("zinb", by, n=35, n_genes=70)
    options = {"likelihood": "zinb", "device": triton_device, "backend": "triton"}
    expected = evaluate(count_nll, x, parameters, torch.float32, **options)
    wide = torch.full((35, 2 * 70 + 3), 99.0)
    wide[:, 1:141:2] = x
    strided = {
        name: torch.stack([value, torch.full_like(value, 99.0)], -1)[..., 0]
        for name, value in parameters.items()
    }
    got = evaluate(count_nll, wide[:, 1:141:2], strided, torch.float32, **options)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    one_size = parameters | {
        "library": torch.tensor([[6.0]]),
        "scale_bias": torch.tensor([0.3]).expand(70),
    }
    check(x, one_size, triton_device, likelihood="zinb")


@pytest.mark.parametrize("route", ROUTES)
def test_bitwise_the_same_at_every_run(route, take, triton_device):
    take(route)
    x, parameters = problem("zinb", "gene")
    options = {"likelihood": "zinb", "device": triton_device, "backend": "triton"}
    first, second = (
        evaluate(count_nll, x.to_sparse_csr(), parameters, torch.float32, **options)
        for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device asserts, and is lost")
@layouts
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("value", "message"), [(-1.0, "non-negative"), (torch.nan, "NaN"), (torch.inf, "infinite")]
)
def test_bad_counts(value, message, route, layout, take, triton_device):
    take(route)
    x, parameters = problem("nb", "gene", n=5, n_genes=70)
    x[4, 69] = value
    with pytest.raises(ValueError, match=message):
        evaluate(
            count_nll,
            laid_out(x, layout),
            parameters,
            torch.float32,
            likelihood="nb",
            backend="triton",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device asserts, and is lost")
@pytest.mark.parametrize(
    ("crow", "col"),
    [
        ([0, 2, 3], [1, 70, 3]),
        ([0, 2, 3], [1, -1, 3]),
        ([0, 9, 3], [1, 2, 3]),
        ([0, 2, 9], [1, 2, 3]),
        ([-4, 2, 3], [1, 2, 3]),
        ([1, 2, 3], [1, 2, 3]),
        ([0, 2], [1, 2, 3]),
        ([0, 2, 3], [1, 2]),
    ],
)
def test_csr_that_lies_about_its_shape(crow, col, take, triton_device):
    take("chunked")
    _, parameters = problem("nb", "gene", n=2, n_genes=70)
    x = torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(col), torch.ones(3), (2, 70), check_invariants=False
    )
    with pytest.raises(ValueError, match="do not fit"):
        evaluate(count_nll, x, parameters, torch.float32, likelihood="nb", backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tensor cores themselves round")
@pytest.mark.parametrize(("setting", "bound"), [("high", 3e-3), ("medium", 2e-2)])
def test_precision_follows_the_setting(setting, bound, kernels, triton_device, monkeypatch):
    """tf32 keeps 10 bits of a factor, bfloat16 7; strict float32 is not fused."""
    interpreter.round_products(monkeypatch)
    x, parameters = problem("zinb", "gene", n=35, n_genes=70)
    exact = evaluate(truth.count_nll, x.double(), parameters, torch.float64, likelihood="zinb")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        got = evaluate(count_nll, x, parameters, torch.float32, likelihood="zinb", backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    errors = {
        name: float((got[name] - value).abs().max() / value.abs().max())
        for name, value in exact.items()
    }
    assert 1e-6 < errors["hidden"] and max(errors.values()) < bound, errors


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_precision_by_torchs_newer_setting(setting, expected, kernels):
    """After it, torch refuses to answer in the words of the older one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        assert kernels.product_precision() == expected
    finally:
        matmul.fp32_precision = before
    torch.get_float32_matmul_precision()  # answers again


def test_predicate_of_the_route(kernels, triton_device):
    from decoder_fast.ops.count_nll import _inputs

    def fused(likelihood, by, setting, n_hidden=H, n=3, n_genes=5):
        x, parameters = problem(likelihood, by, n=n, n_genes=n_genes, n_hidden=n_hidden)
        names = (
            "hidden library scale_weight scale_bias dropout_weight dropout_bias r_weight r_bias "
            "px_r px_r_index"
        ).split()
        inputs = _inputs(
            *(parameters.get(name) for name in names), x, None, None, None, likelihood, "softmax"
        )
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        try:
            return kernels.is_fused(inputs)
        finally:
            torch.set_float32_matmul_precision(before)

    assert fused("nb", "gene", "high") and fused("zinb", "gene", "medium", 128)
    assert fused("poisson", "none", "high")
    assert not fused("nb", "gene", "highest")
    assert not fused("nb", "table", "high") and not fused("nb", "cell", "high")
    assert not fused("nb", "gene", "high", 129)
    assert fused("nb", "gene", "high", 2, 1_024, 1_024)
    assert not fused("nb", "gene", "high", 2, 1_024, 1_025)


@settings(max_examples=12)
@given(
    n=st.integers(1, 40),
    n_genes=st.integers(2, 140),  # one gene: test_small_and_odd_shapes
    n_hidden=st.integers(1, 40),
    case=st.sampled_from(EVERY),
    layout=st.sampled_from(["dense", "csr"]),
    route=st.sampled_from(ROUTES),
    seed=st.integers(0, 99),
)
def test_fuzz(triton_device, n, n_genes, n_hidden, case, layout, route, seed):
    from decoder_fast.triton_kernels import count_nll as kernels

    likelihood, by = case
    x, parameters = problem(
        likelihood, by, n=n, n_genes=n_genes, n_hidden=n_hidden, seed=seed, theta=3.0
    )
    x[0, 0] += 200  # with next to no counts gradients are nothing but what means of 150 leave
    with pytest.MonkeyPatch.context() as patch:
        fused = route == "fused" and offered(by, route)
        patch.setattr(kernels, "is_fused", lambda inputs: fused)
        patch.setattr(kernels, "CHUNK_BYTES", 1)
        check(x, parameters, triton_device, layout=layout, likelihood=likelihood, floor=4e-6)


def test_compile(dynamo, take, triton_device):
    """One graph, the same bits."""
    take("chunked")
    x, parameters = problem("zinb", "gene", n=18, n_genes=70)
    options = {"likelihood": "zinb", "device": triton_device, "backend": "triton"}
    expected = evaluate(count_nll, x, parameters, torch.float32, **options)
    compiled = torch.compile(count_nll, fullgraph=True, backend="aot_eager")
    got = evaluate(compiled, x, parameters, torch.float32, **options)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
every_case = pytest.mark.parametrize(("likelihood", "by"), EVERY)


def gpu_step(likelihood, by, device="cuda", layout="csr"):
    """A function that takes a step, and the tensors that it reads."""
    x, parameters = problem(likelihood, by, n=300, n_genes=1000)
    x = laid_out(x, layout).to(device)
    tensors = {name: value.to(device) for name, value in parameters.items()}
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    arguments = dict(tensors)
    positional = [arguments.pop(name) for name in ("hidden", "library", "scale_weight")]
    upstream = torch.linspace(-1, 1, 300, device=device)

    def step(function=count_nll):
        nll = function(x, *positional, likelihood=likelihood, **arguments)
        return [nll, *torch.autograd.grad(nll, leaves, upstream)]

    return step, leaves


@on_gpu
@every_case
def test_cuda_graph(likelihood, by):
    """A whole step waits for nothing, and replays to the same bits."""
    step, _ = gpu_step(likelihood, by)
    # Detached: what keeps the autograd graph ties the leaves to this stream, for the recording too.
    expected = [t.detach().clone() for t in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@on_gpu
def test_streams():
    step, leaves = gpu_step("zinb", "gene")
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # whatever does not wait for it comes too early
        for leaf in leaves:
            leaf.data.mul_(1.0)
        got = step()
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    results = [gpu_step("zinb", "table", f"cuda:{i}")[0]() for i in (0, 1)]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*results, strict=True))


@on_gpu
@every_case
def test_autocast(likelihood, by):
    step, _ = gpu_step(likelihood, by)
    expected = step()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = step()
    assert all(map(torch.equal, got, expected))


@on_gpu
def test_default():
    """On a GPU nobody has to ask for them."""
    from decoder_fast.backends import choose

    assert choose(OPERATION, device=torch.device("cuda"), likelihood="nb").backend == "triton"
