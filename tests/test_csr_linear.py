"""``csr_linear``: every backend against float64, and against torch's own linear map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import OTHERS, rerun

from decoder_fast import functional, native
from decoder_fast.functional import csr_linear

OPERATION = "csr_linear"


def problem(n, k, h, *, density=0.05, seed=0, index=torch.int32):
    """A sparse matrix (an empty row and an empty column in it), weight, bias, upstream gradient."""
    torch.manual_seed(seed)
    x = torch.poisson(torch.full((n, k), density)).log1p()
    if n and k:
        x[n // 2] = x[:, k // 3] = 0
    csr = x.to_sparse_csr()
    csr = torch.sparse_csr_tensor(
        csr.crow_indices().to(index), csr.col_indices().to(index), csr.values(), size=(n, k)
    )
    return csr, torch.randn(h, k), torch.randn(h), torch.randn(n, h)


def answers(linear, x, weight, bias, grad):
    """Output and gradients."""
    weight, bias = (t.clone().requires_grad_() for t in (weight, bias))
    out = linear(x, weight, bias)
    out.backward(grad.to(out.dtype))
    return out.detach(), weight.grad, bias.grad


def assert_as_good_as_torch(x, weight, bias, grad, backend):
    ours = answers(
        lambda x, *rest: csr_linear(x, *rest, backend=backend), x, weight, bias, grad
    )
    dense = x.to_dense()
    stock = answers(F.linear, dense, weight, bias, grad)
    truth = answers(F.linear, *(t.double() for t in (dense, weight, bias, grad)))
    for a, b, t in zip(ours, stock, truth, strict=True):
        assert a.shape == t.shape and a.dtype == torch.float32
        error, theirs = ((found.double() - t).norm() for found in (a, b))
        assert error <= 2 * theirs + 1e-6 * t.norm()


# More than one tile of columns, of outputs and of rows, with and without a remainder.
SHAPES = [
    (1, 1, 1),
    (3, 256, 64),
    (5, 257, 65),
    (70, 1000, 128),
    (130, 515, 200),
    (1100, 300, 33),
    (7, 2100, 10),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_grid(shape, index, backend, poisoned):
    assert_as_good_as_torch(*problem(*shape, index=index), backend)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 600),
    st.integers(0, 140),
    st.floats(0, 1.5),
    st.integers(0, 2**31),
)
def test_any_shape(n, k, h, density, seed):
    for name in {"torch", "cpp"} & {"torch", *(["cpp"] if native.reason() is None else [])}:
        assert_as_good_as_torch(*problem(n, k, h, density=density, seed=seed), name)


@pytest.mark.parametrize("instruction_set", OTHERS)
def test_other_instruction_sets(instruction_set):
    rerun(instruction_set, __file__, "test_grid and cpp")


def test_same_bits_for_any_number_of_threads(backend):
    if backend == "torch":
        pytest.skip("torch's own products may differ with the number of threads")
    case = problem(300, 700, 128)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3, 7, 16, 1):
            torch.set_num_threads(n_threads)
            found.append(answers(csr_linear, *case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_columns_of_a_wider_weight(backend):
    x, weight, bias, grad = problem(20, 300, 65)
    wide = torch.cat([weight, torch.randn(65, 11)], 1).requires_grad_()
    out = csr_linear(x, wide[:, :300], bias, backend=backend)
    out.backward(grad)
    torch.testing.assert_close(out, F.linear(x.to_dense(), weight, bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(wide.grad[:, :300], grad.t() @ x.to_dense(), rtol=1e-5, atol=1e-4)
    assert not wide.grad[:, 300:].any()


def test_strides(backend):
    x, weight, bias, grad = problem(20, 300, 65)
    expected = answers(F.linear, x.to_dense(), weight, bias, grad)
    ours = answers(
        lambda x, w, b: csr_linear(x, w, b, backend=backend),
        x,
        weight.t().contiguous().t(),
        torch.stack([bias, bias], 1)[:, 0],
        grad.t().contiguous().t(),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_out_of_order_and_duplicates(backend):
    crow, col = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 4, 2, 1])
    x = torch.sparse_csr_tensor(crow, col, torch.arange(1.0, 6.0), size=(3, 5))
    weight = torch.randn(7, 5)
    expected = F.linear(x.to_dense(), weight)
    assert expected[1].count_nonzero() == 0
    torch.testing.assert_close(csr_linear(x, weight, backend=backend), expected)


def test_what_is_not_wanted_is_not_computed(backend):
    x, weight, bias, grad = problem(9, 30, 5)
    frozen = csr_linear(x, weight, bias.requires_grad_(), backend=backend)
    frozen.backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, grad.sum(0))
    assert not csr_linear(x, weight, backend=backend).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float16])
def test_values_of_any_dtype(dtype):
    x, weight, bias, _ = problem(9, 30, 5)
    x = torch.sparse_csr_tensor(
        x.crow_indices(), x.col_indices(), (3 * x.values()).to(dtype), size=x.shape
    )
    out = csr_linear(x, weight, bias)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dense = x.to_dense().to(out.dtype)
    torch.testing.assert_close(out, F.linear(dense, weight.to(out.dtype), bias.to(out.dtype)))


@pytest.mark.computes_in(torch.float64)
def test_gradients(backend):
    x, weight, bias, _ = problem(4, 12, 3, density=0.5)
    weight, bias = (t.double().requires_grad_() for t in (weight, bias))
    torch.autograd.gradcheck(lambda w, b: csr_linear(x, w, b, backend=backend), (weight, bias))


def test_differentiates_once(backend):
    x, weight, bias, _ = problem(4, 12, 3)
    out = csr_linear(x, weight.requires_grad_(), bias, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(out, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_under_compile(dynamo):
    """The graph breaks there, and goes on behind."""
    x, weight, bias, _ = problem(9, 30, 5)
    crow, col, values = x.crow_indices(), x.col_indices(), x.values()

    def linear(values, weight, bias):
        return csr_linear(torch.sparse_csr_tensor(crow, col, values, size=x.shape), weight, bias)

    expected = linear(values, weight, bias)
    torch.testing.assert_close(torch.compile(linear)(values, weight, bias), expected)


def test_autocast_leaves_float32(backend):
    x, weight, bias, _ = problem(9, 30, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = csr_linear(x, weight, bias, backend=backend)
    assert torch.equal(out, csr_linear(x, weight, bias, backend=backend))


def _csr(crow, col, size=(2, 3), values=None):
    values = torch.ones(len(col)) if values is None else values
    return torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(col), values, size=size, check_invariants=False
    )


@pytest.mark.parametrize(
    ("crow", "col"),
    [
        ([0, 1, 2], [0, 3]),
        ([0, 1, 2], [-1, 0]),
        ([0, 2, 1], [0]),
        ([0, 5, 2], [0, 1]),
        ([1, 1, 2], [0, 1]),
        ([0, 1, 1], [0, 1]),
    ],
)
def test_csr_that_lies_is_refused(crow, col, backend):
    with pytest.raises(ValueError, match="indices do not fit"):
        csr_linear(_csr(crow, col), torch.ones(4, 3), backend=backend)


def test_bad_input():
    x, weight, bias, _ = problem(9, 30, 5)
    with pytest.raises(TypeError, match=r"expected torch\.sparse_csr"):
        csr_linear(x.to_dense(), weight)
    sparse = pytest.importorskip("scipy.sparse", reason="scipy comes with scvi-tools")
    with pytest.raises(TypeError, match=r"x is a scipy.sparse.*sparse_csr_tensor of x.tocsr\(\)"):
        csr_linear(sparse.csr_matrix(x.to_dense().numpy()), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 29\)"):
        csr_linear(x, weight[:, 1:])
    with pytest.raises(ValueError, match="one number a hidden unit"):
        csr_linear(x, weight, bias[1:])
    with pytest.raises(TypeError, match="weight has dtype"):
        csr_linear(x, weight.long())
    with pytest.raises(ValueError, match="on device"):
        csr_linear(x, weight.to("meta"))
    with pytest.raises(ValueError, match="unknown backend"):
        csr_linear(x, weight, backend="fast")
    with pytest.raises(ValueError, match="requires grad"):
        csr_linear(x.requires_grad_(), weight)


def test_missing_backend(missing_backend):
    x, weight, bias, _ = problem(9, 30, 5)
    with pytest.raises(RuntimeError, match="cannot run csr_linear here"):
        csr_linear(x, weight, bias, backend=missing_backend)


def test_is_public():
    assert "csr_linear" in functional.__all__
