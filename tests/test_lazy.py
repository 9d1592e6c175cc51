"""Lazy tensors: whatever touches them sees the values that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, one_hot

pytest.importorskip("scvi", reason="the bridge's lazy tensors stand in scvi-tools' models")

import scvi.nn

from decoder_fast import fuse
from decoder_fast.scvi.decoder import LazyOutput, lazy_outputs
from decoder_fast.scvi.lazy import LazyColumns, LazyCounts, LazyOneHots, LazyRows, LazyTensor

N, G = 11, 13


@pytest.fixture
def outputs():
    """What a decoder returns, lazy and real."""
    torch.manual_seed(0)
    decoder = fuse(scvi.nn.DecoderSCVI(4, G, n_cat_list=[3]))
    args = ("gene-cell", torch.randn(N, 4), torch.randn(N, 1), torch.randint(0, 3, (N, 1)))
    token = lazy_outputs.set(True)
    lazy = decoder(*args)
    lazy_outputs.reset(token)
    return lazy, decoder(*args)


def test_metadata_costs_nothing(outputs):
    for lazy, real in zip(*outputs, strict=True):
        assert isinstance(lazy, LazyOutput)
        assert lazy.shape == real.shape
        assert (lazy.dtype, lazy.device, lazy.dim()) == (real.dtype, real.device, real.dim())
        assert (lazy.size(-1), lazy.numel(), len(lazy)) == (G, N * G, N)
        assert lazy._value is None, "the values were computed"


OPERATIONS = {
    "arithmetic": lambda t: 2 * t + 1,
    "method": lambda t: t.exp().sum(),
    "index": lambda t: t[3:7, ::2],
    "mask": lambda t: t[..., torch.arange(G) % 2 == 0],
    "in a list": lambda t: torch.stack([t, t]),
    "in a keyword": lambda t: torch.add(input=torch.ones(N, G), other=t),
    "comparison": lambda t: t > t.mean(),
    "not negative": lambda t: (t >= 0).all(),
    "not negative, how many": lambda t: (t >= 0).sum(0),
    "not negative, by gene": lambda t: (t >= torch.zeros(G)).sum(0),
    "not less": lambda t: (t >= 0.1) + 0,
    "numbers": lambda t: (t == t).all(),
    "numbers, how many": lambda t: (t == t).sum(0),
    "detached": lambda t: t.detach().cpu(),
    "numpy": lambda t: torch.as_tensor(t.detach().numpy()),
    "of a class": lambda t: torch.distributions.Normal(t, 1.0).log_prob(torch.ones(N, G)),
    "split along genes": lambda t: t.split([3, 10], dim=1)[1],
    "split by size": lambda t: torch.split(t, 4)[2],
    "broadcast": lambda t: torch.broadcast_tensors(t, torch.ones(5, 1, 1))[0] + 0,
    "broadcast back": lambda t: torch.broadcast_tensors(t, torch.arange(float(G)))[1] + 0,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_see_the_values(outputs, operation):
    for lazy, real in zip(*outputs, strict=True):
        a, b = OPERATIONS[operation](lazy), OPERATIONS[operation](real)
        assert not isinstance(a, LazyTensor)
        torch.testing.assert_close(a, b)


def test_gradients_flow_through_the_values(outputs):
    lazy, _ = outputs
    (lazy[2] * lazy[0]).sum().backward()
    weight = lazy[0].decoded.decoder.px_scale_decoder[0].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_values_are_computed_once(outputs):
    scale = outputs[0][0]
    assert scale.materialise() is scale.materialise()
    with torch.no_grad():
        scale.mul_(2)  # so that a change in place stays
        torch.testing.assert_close(scale + 0, 2 * outputs[1][0])
        torch.testing.assert_close(outputs[0][2] + 0, outputs[1][2])  # px_rate is another tensor


def test_distributions_check_rates_without_computing_them(outputs):
    rate = outputs[0][2]
    torch.distributions.Poisson(rate, validate_args=True)
    assert rate._value is None


def test_not_a_number_is_seen_outside_of_checks(outputs):
    rate = outputs[0][2]
    rate.decoded.hidden = rate.decoded.hidden.detach().clone()
    rate.decoded.hidden[0] = torch.nan
    assert (rate >= 0).sum() == (N - 1) * G
    assert (rate == rate).sum() == (N - 1) * G


@pytest.mark.parametrize("dim", [0, -2])
def test_split_along_cells_stays_lazy(outputs, dim):
    for lazy, real in zip(*outputs, strict=True):
        parts = torch.split(lazy, [4, 7], dim=dim)
        assert all(isinstance(part, LazyOutput) for part in parts)
        for part, expected in zip(parts, torch.split(real, [4, 7], dim=dim), strict=True):
            assert part.shape == expected.shape
            torch.testing.assert_close(part.decoded.hidden.shape[0], expected.shape[0])
            torch.testing.assert_close(part + 0, expected)


@pytest.mark.parametrize("sizes", [[4, 6], [4, 8], [13, -2]])
def test_split_that_does_not_add_up(outputs, sizes):
    for lazy in outputs[0]:
        with pytest.raises(RuntimeError):
            torch.split(lazy, sizes, -2)


def test_changes_in_place_are_seen_beside_other_lazy_tensors(counts, outputs):
    columns = torch.cat([counts[0], torch.ones(N, 1)], -1)
    assert isinstance(columns, LazyColumns)
    columns.add_(7)
    with LazyOneHots():
        encoded = one_hot(torch.arange(N), N)
        joined = torch.cat([columns, encoded], -1)
    torch.testing.assert_close(joined[:, :G] + 0, counts[1] + 7)

    px_r, rate = outputs[0][1:3]
    theta = torch.exp(px_r)
    with torch.no_grad():
        theta.clamp_(max=0.5)
    _, expanded = torch.broadcast_tensors(rate, theta)
    assert (expanded <= 0.5).all()


def test_lookups_in_the_place_of_one_hot_products():
    labels, table = torch.randint(0, 5, (N,)), torch.randn(G, 5, requires_grad=True)
    expected = linear(one_hot(labels, 5).float(), table)
    with LazyOneHots():
        encoded = one_hot(labels, 5)
        rows = linear(encoded.float(), table)
        theta = torch.exp(rows)
        assert isinstance(rows, LazyRows) and isinstance(theta, LazyTensor)
    assert encoded._value is None
    torch.testing.assert_close(rows + 0, expected)
    torch.testing.assert_close(theta + 0, expected.exp())
    torch.testing.assert_close(encoded + 0, one_hot(labels, 5))
    torch.testing.assert_close(linear(encoded.float(), table, torch.ones(G)), expected + 1)
    (a,) = torch.autograd.grad(rows.sum(), table)
    (b,) = torch.autograd.grad(expected.sum(), table)
    torch.testing.assert_close(a, b)


def test_lookups_refuse_labels_out_of_range():
    with LazyOneHots():
        rows = linear(one_hot(torch.tensor([0, 5]), 5).float(), torch.randn(G, 5))
    with pytest.raises(ValueError, match="found label 5, but there are 5 categories"):
        rows.sum()


# --- counts --------------------------------------------------------------------------------------


@pytest.fixture
def counts():
    """Counts lazy and dense; the first cell and the last gene are empty."""
    torch.manual_seed(0)
    dense = torch.poisson(torch.full((N, G), 0.4))
    dense[0] = dense[:, -1] = 0
    return LazyCounts.of(dense.to_sparse_csr()), dense


@pytest.mark.parametrize("operation", OPERATIONS)
def test_counts_look_dense(counts, operation):
    lazy, dense = counts
    assert (lazy.shape, lazy.dtype, lazy.layout) == (dense.shape, dense.dtype, torch.strided)
    a, b = OPERATIONS[operation](lazy), OPERATIONS[operation](dense)
    assert type(a) is torch.Tensor
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


FROM_NONZEROS = {
    "library size": lambda t: t.sum(1),
    "library size, last": lambda t: torch.sum(t, dim=-1),
    "library size, listed": lambda t: t.sum(dim=[1]),
}


@pytest.mark.parametrize("operation", FROM_NONZEROS)
def test_what_the_encoder_asks_for_comes_from_the_nonzeros(counts, operation):
    lazy, dense = counts
    answer = FROM_NONZEROS[operation](lazy)
    assert type(answer) is torch.Tensor
    assert torch.equal(answer, FROM_NONZEROS[operation](dense))
    assert lazy._value is None, "the counts were made dense"


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t.sum(),
        lambda t: t.sum(0),
        lambda t: t.sum(1, keepdim=True),
        lambda t: t.sum((0, 1)),
        lambda t: t.sum(1, dtype=torch.float64),
        lambda t: torch.log1p(t, out=torch.empty(N, G)),
    ],
)
def test_other_sums_of_counts(counts, operation):
    lazy, dense = counts
    a, b = operation(lazy), operation(dense)
    assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dim", [2, 3, -3])
def test_sum_over_a_dimension_that_is_not_there(counts, dim):
    with pytest.raises(IndexError):
        counts[0].sum(dim)


def test_library_size_is_as_accurate_as_a_dense_sum():
    torch.manual_seed(0)
    dense = torch.rand(3, 40_000) * 1000
    expected = dense.double().sum(1)
    torch.testing.assert_close(
        LazyCounts.of(dense.to_sparse_csr()).sum(1).double(), expected, rtol=6e-8, atol=0
    )


def test_counts_out_of_order():
    dense = torch.tensor([[2.0, 0, 3, 0, 1], [0, 0, 0, 0, 0], [0, 4, 0, 0, 0]])
    for integer in (torch.int32, torch.int64):
        crow, col = (torch.tensor(i, dtype=integer) for i in ([0, 3, 3, 4], [4, 0, 2, 1]))
        csr = torch.sparse_csr_tensor(
            crow, col, torch.tensor([1.0, 2, 3, 4]), (3, 5), check_invariants=False
        )
        assert torch.equal(LazyCounts.of(csr) + 0, dense)


def test_counts_stay_lazy_when_moved(counts):
    lazy, dense = counts
    assert lazy.to(torch.device("cpu"), non_blocking=True) is lazy
    moved = lazy.to(torch.device("meta"))
    assert isinstance(moved, LazyCounts) and moved.device.type == moved.csr.device.type == "meta"
    assert torch.equal(lazy.to(torch.float64), dense.double())
