"""Elementwise log-likelihoods: nb_log_prob, zinb_log_prob, poisson_log_prob."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import reference64
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoder_fast.functional import nb_log_prob, poisson_log_prob, zinb_log_prob

OURS = {"nb": nb_log_prob, "zinb": zinb_log_prob, "poisson": poisson_log_prob}
PARAMETERS = {"nb": ("mu", "theta"), "zinb": ("mu", "theta", "zi_logits"), "poisson": ("mu",)}
LIKELIHOODS = tuple(OURS)

COUNTS = (0, 0.25, 1, 2, 3.5, 17, 1e3, 1e6)
MEANS = (1e-12, 1e-8, 1e-3, 0.3, 1, 3.4, 50, 1e3, 1000100, 1e7)
# 29 and 31 lie on both sides of where the gamma functions change their form.
THETAS = (1e-6, 1e-3, 0.5, 1, 29, 31, 1e2, 1e4, 1e5, 1e6, 1e8)
DROPOUTS = (-50, -3, 0, 3, 50)


def points(likelihood, thetas=THETAS):
    """Every combination as columns ``x, mu, theta, d``, representable in float32."""
    grid = itertools.product(
        COUNTS,
        MEANS,
        thetas if likelihood != "poisson" else (1,),
        DROPOUTS if likelihood == "zinb" else (0,),
    )
    return torch.tensor(list(grid), dtype=torch.float32)


def exact(likelihood, at):
    """Value and derivatives, one row a point."""
    rows = [reference64.exact_log_prob(likelihood, *point) for point in at.double().tolist()]
    return torch.tensor(rows, dtype=torch.float64)


exact_grid = functools.cache(lambda likelihood: exact(likelihood, points(likelihood)))


def evaluate(function, at, dtype, n_parameters):
    """Value and derivatives of a function of (x, mu, ...), one row a point."""
    x, *parameters = (c.to(dtype) for c in at.t()[: 1 + n_parameters].contiguous())
    parameters = [p.requires_grad_() for p in parameters]
    value = function(x, *parameters)
    grads = torch.autograd.grad(value.sum(), parameters)
    return torch.stack([value.detach(), *grads], 1)


def assert_exact(likelihood, at, got, truth):
    """Every element within 1e-6 (value) and 1e-5 (derivatives) of the truth.

    Below that stand the roundings of terms of order one that cancel: in the value softplus minus
    softplus where x = 0, in the derivatives with respect to log(mu), log(theta) and d gamma
    functions, in float64 always. Where all is float64, 1e-9 and 1e-7: lgamma(1e6) = 1e7 and the
    derivative's terms at theta = 1e8 leave no more.
    """
    value_limit, limit, floor = (1e-6, 1e-5, 2.0**-23)
    if got.dtype == torch.float64:
        value_limit, limit, floor = (1e-9, 1e-7, 1e-15 + 1e-14 * at[:, 0].double())
    error = (got.double() - truth).abs()
    unit = torch.ones_like(truth)
    unit[:, 1:3] = at[:, 1:3].double()[:, : truth.shape[1] - 1]
    allowed = limit * truth.abs() + 1e-13 / unit
    allowed[:, 0] = value_limit * truth[:, 0].abs() + floor
    wrong = (~(error <= allowed)).nonzero().tolist()
    found = [
        f"{name} at x, mu, theta, d = {at[i].tolist()}: {got[i, k]:.7g}, not {truth[i, k]:.7g}"
        for i, k in wrong[:10]
        for name in [("value", *PARAMETERS[likelihood])[k]]
    ]
    assert not wrong, f"{len(wrong)} wrong: " + "; ".join(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_extremes(likelihood, dtype):
    """Value and derivatives over the whole range, against 80 digits."""
    at = points(likelihood)
    got = evaluate(OURS[likelihood], at, dtype, len(PARAMETERS[likelihood]))
    assert got.dtype == dtype
    assert_exact(likelihood, at, got, exact_grid(likelihood))


@pytest.mark.parametrize("theta", [1e5, 1e6])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_better_than_stock_at_large_theta(likelihood, theta, stock):
    """Where stock's float32 is lost, the value and the derivative by theta are not."""
    at = torch.tensor(
        list(itertools.product((0, 1, 2, 3.5, 17, 300), (0.01, 1, 20), (theta,), (-2, 1))),
        dtype=torch.float32,
    )
    truth = exact(likelihood, at)
    n = len(PARAMETERS[likelihood])
    ours = evaluate(OURS[likelihood], at, torch.float32, n)
    broadcast = {
        "nb": stock.log_nb_positive,
        "zinb": lambda x, mu, theta, d: stock.log_zinb_positive(x, mu, theta[None], d)[0],
    }[likelihood]
    theirs = evaluate(broadcast, at, torch.float32, n)
    for k, name in ((0, "value"), (2, "derivative by theta")):
        ours_error = reference64.error(ours[:, k], truth[:, k])
        stock_error = reference64.error(theirs[:, k], truth[:, k])
        assert ours_error < 1e-6, name
        assert stock_error > 1e-4, name
        assert stock_error > 10 * ours_error, name


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_eps_is_that_of_stock(likelihood, eps, stock):
    """In float64, at moderate values, stock's function and ours are one, whatever eps is."""
    at = points(likelihood, thetas=(0.5, 1, 29, 31, 1e2)).double()
    at = at[(at[:, 1] >= 1e-3) & (at[:, 1] <= 1e3) & (at[:, 0] <= 1e3)]
    n = len(PARAMETERS[likelihood])
    ours = evaluate(functools.partial(OURS[likelihood], eps=eps), at, torch.float64, n)
    function = {
        "nb": stock.log_nb_positive,
        "zinb": lambda x, mu, theta, d, eps: stock.log_zinb_positive(
            x, mu, theta[None], d, eps=eps
        )[0],
    }[likelihood]
    theirs = evaluate(functools.partial(function, eps=eps), at, torch.float64, n)
    for k in range(1 + n):
        # 1e-7 and not 1e-10: F.softplus is linear above 20, wrong by exp(-20) / 20 = 1e-10 there,
        # and stock's derivative by theta cancels terms 1e8 times larger.
        assert reference64.error(ours[:, k], theirs[:, k]) < 1e-7


@settings(max_examples=300)
@given(
    likelihood=st.sampled_from(LIKELIHOODS),
    x=st.one_of(st.integers(0, 30), st.integers(0, 1_000_000), st.floats(2**-10, 2**14, width=32)),
    log_mu=st.floats(-27.6, 16.1),
    log_theta=st.floats(-13.8, 18.4),
    d=st.floats(-50, 50),
)
def test_fuzz(likelihood, x, log_mu, log_theta, d):
    mu, theta = torch.tensor([log_mu, log_theta]).exp().tolist()
    at = torch.tensor([[x, mu, theta if likelihood != "poisson" else 1, d]], dtype=torch.float32)
    got = evaluate(OURS[likelihood], at, torch.float32, len(PARAMETERS[likelihood]))
    assert_exact(likelihood, at, got, exact(likelihood, at))


def sample(likelihood, x=(3, 1, 7), mu=(3, 4, 7), theta=(7,), zi_logits=(4, 1), dtype=None, seed=0):
    """Random arguments of those shapes: the counts, and the parameters by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=dtype or torch.float64)

    parameters = {
        "mu": normal(mu).exp(),
        "theta": normal(theta).exp(),
        "zi_logits": normal(zi_logits),
    }
    counts = torch.poisson(2 * torch.rand(x, generator=generator), generator=generator)
    return counts, {name: parameters[name] for name in PARAMETERS[likelihood]}


def naive(likelihood, x, parameters):
    shape = torch.broadcast_shapes(x.shape, *(p.shape for p in parameters.values()))
    x, mu, theta, d = (
        None if t is None else t.double().expand(shape)
        for t in (x, parameters["mu"], parameters.get("theta"), parameters.get("zi_logits"))
    )
    return reference64.log_prob(likelihood, x, mu, theta, d)


SHAPES = {
    "samples": {},
    "one by one": {"x": (3, 7), "mu": (3, 7), "theta": (3, 7), "zi_logits": (3, 7)},
    "x broadcast": {"x": (1, 7), "mu": (2, 5, 7), "theta": (2, 5, 7), "zi_logits": (2, 5, 7)},
    "scalars": {"x": (), "mu": (), "theta": (), "zi_logits": ()},
    "vector": {"x": (5,), "mu": (), "theta": (1,), "zi_logits": (5,)},
    "no cells": {"x": (0, 7), "mu": (0, 7), "theta": (7,), "zi_logits": (0, 7)},
    "no genes": {"x": (3, 0), "mu": (3, 0), "theta": (0,), "zi_logits": (3, 1)},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_broadcasting(likelihood, shapes):
    """Shapes broadcast, and gradients are summed back, under any upstream gradient."""
    x, parameters = sample(likelihood, **shapes)
    leaves = {name: p.requires_grad_() for name, p in parameters.items()}
    got, truth = OURS[likelihood](x, **leaves), naive(likelihood, x, leaves)
    assert got.shape == truth.shape
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).double()
    upstream[upstream.abs() < 0.3] = 0
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(got, list(leaves.values()), upstream)
    truth = torch.autograd.grad(truth, list(leaves.values()), upstream)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.uint16,
    ],
)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_count_dtypes(likelihood, dtype):
    """Counts of any dtype are the same counts, and do not change the dtype of the result."""
    x, parameters = sample(likelihood, dtype=torch.float32)
    expected = OURS[likelihood](x, **parameters)
    got = OURS[likelihood](x.to(dtype), **parameters)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(half):
    x, parameters = sample("zinb", dtype=half)
    got = zinb_log_prob(x, **parameters)
    assert got.dtype == torch.float32
    assert_close = torch.testing.assert_close
    assert_close(got.double(), naive("zinb", x, parameters), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = parameters["mu"].requires_grad_()
        under = zinb_log_prob(x, **parameters)
        assert torch.equal(under, got)
        under.sum().backward()
    assert leaf.grad.dtype == half


@pytest.mark.parametrize("wanted", [("mu",), ("theta",), ("zi_logits",), ("theta", "zi_logits")])
def test_subsets_of_gradients(wanted):
    x, parameters = sample("zinb")
    every = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    zinb_log_prob(x, **every).sum().backward()
    some = {name: p.clone().requires_grad_(name in wanted) for name, p in parameters.items()}
    zinb_log_prob(x, **some).sum().backward()
    for name, p in some.items():
        if name in wanted:
            assert torch.equal(p.grad, every[name].grad)
        else:
            assert p.grad is None


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradcheck(likelihood):
    x, parameters = sample(likelihood, x=(2, 3), mu=(2, 3), theta=(3,), zi_logits=(2, 3))
    leaves = [p.requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(lambda *p: OURS[likelihood](x, *p), leaves)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_memory_layout_does_not_matter(likelihood):
    """Transposed, sliced and expanded inputs; and the same bits at every run."""
    shape = (6, 9)
    x, parameters = sample(
        likelihood, x=shape, mu=shape, theta=shape, zi_logits=shape, dtype=torch.float32
    )
    expected = OURS[likelihood](x, **parameters)
    assert torch.equal(OURS[likelihood](x, **parameters), expected)
    transposed = {name: p.t().contiguous().t() for name, p in parameters.items()}
    assert torch.equal(OURS[likelihood](x.t().contiguous().t(), **transposed), expected)
    sliced = {name: torch.cat([p, p], 1)[:, :9] for name, p in parameters.items()}
    assert torch.equal(OURS[likelihood](torch.cat([x, x])[:6], **sliced), expected)
    for result in (
        OURS[likelihood](x[:1].expand(shape), **parameters),
        OURS[likelihood](x[:1].repeat(6, 1), **parameters),
    ):
        assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_result_is_fresh(likelihood):
    """The result may be changed in place before the backward pass; no gradients, no graph."""
    x, parameters = sample(likelihood)
    leaves = [p.requires_grad_() for p in parameters.values()]
    expected = torch.autograd.grad(OURS[likelihood](x, *leaves).sum(), leaves)
    value = OURS[likelihood](x, *leaves)
    value += 1
    value *= 2
    for got, half in zip(torch.autograd.grad(value.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, 2 * half, rtol=1e-12, atol=0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not OURS[likelihood](x, *leaves).requires_grad


def test_counts_are_not_differentiated():
    x, parameters = sample("nb")
    x.requires_grad_()
    (nb_log_prob(x, **parameters).sum() + (0 * x).sum()).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_double_backward_is_refused(likelihood):
    x, parameters = sample(likelihood)
    mu = parameters["mu"].requires_grad_()
    (grad,) = torch.autograd.grad(OURS[likelihood](x, **parameters).sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_compile(likelihood, dynamo):
    """Under torch.compile the graph breaks at the search for non-zeros; the result is the same."""
    x, parameters = sample(likelihood, dtype=torch.float32)
    leaves = [p.requires_grad_() for p in parameters.values()]
    compiled = torch.compile(OURS[likelihood], backend="aot_eager")
    values = [function(x, *leaves) for function in (compiled, OURS[likelihood])]
    grads = [torch.autograd.grad(value.sum(), leaves) for value in values]
    assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def nan_at(t, value=float("nan")):
    t = t.clone()
    t[1, 0] = value
    return t


BAD = {
    "integer mu": (dict(mu=torch.ones(3, 4).int()), TypeError, ["mu", "int32", "floating"]),
    "numpy": (dict(x=np.ones((3, 4))), TypeError, ["x is a numpy.ndarray", "as_tensor(x)"]),
    "number": (dict(theta=1.0), TypeError, ["theta is a builtins.float"]),
    "integer theta": (dict(theta=torch.ones(4).long()), TypeError, ["theta", "int64"]),
    "integer logits": (dict(zi_logits=torch.ones(4).long()), TypeError, ["zi_logits", "int64"]),
    "complex mu": (dict(mu=torch.ones(3, 4) + 0j), TypeError, ["mu", "complex64"]),
    "boolean x": (dict(x=torch.ones(3, 4).bool()), TypeError, ["x", "bool", "real"]),
    "sparse x": (dict(x=torch.ones(3, 4).to_sparse()), TypeError, ["x", "sparse_coo", "dense"]),
    "shapes": (dict(mu=torch.ones(3, 5)), ValueError, ["mu", "(3, 4)", "(3, 5)", "broadcast"]),
    "device of x": (dict(x=torch.ones(3, 4, device="meta")), ValueError, ["x", "meta", "cpu"]),
    "device of theta": (dict(theta=torch.ones(4, device="meta")), ValueError, ["theta", "meta"]),
    "negative": (dict(x=nan_at(torch.ones(3, 4), -2)), ValueError, ["-2", "non-negative"]),
    "negative integer": (
        dict(x=nan_at(torch.ones(3, 4).int(), -2)),
        ValueError,
        ["-2", "non-negative"],
    ),
    "NaN": (dict(x=nan_at(torch.ones(3, 4))), ValueError, ["nan", "non-negative"]),
}


@pytest.mark.parametrize(("change", "kind", "parts"), BAD.values(), ids=BAD)
def test_bad_input(change, kind, parts):
    arguments = {
        "x": torch.ones(3, 4),
        "mu": torch.ones(3, 4),
        "theta": torch.ones(4),
        "zi_logits": torch.zeros(3, 4),
    }
    with pytest.raises(kind) as raised:
        zinb_log_prob(**(arguments | change))
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("theta", [1e-6, 0.3, 29.0, 31.0, 1e6, 1e12])
def test_small_and_other_counts_meet(theta):
    """Finite sums for integers up to 8, gamma functions for the rest: one function, piecewise."""
    from decoder_fast.reference import log_prob as reference

    x = torch.tensor([1, 2, 7, 8, 8.5, 9, 10, 500], dtype=torch.float64)
    t = torch.tensor(theta, dtype=torch.float64) + torch.linspace(1e-3, 50, 8, dtype=torch.float64)
    thetas = torch.full_like(x, theta)
    for mixed, general in (
        (reference._log_gamma_terms, reference._general_log_gamma),
        (reference._digamma_terms, reference._general_digamma),
    ):
        a, b = mixed(x, thetas, t), general(x, thetas, t)
        # lgamma itself is good to a few roundings of its value, at most 1e3 here.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * max(1.0, 1 / theta))
