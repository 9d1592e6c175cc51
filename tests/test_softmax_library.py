"""softmax_library: logits and library size to (px_scale, px_rate)."""

from __future__ import annotations

import instruction_sets
import numpy as np
import pytest
import reference64
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference64 import assert_accurate

from decoder_fast.backends import choose
from decoder_fast.functional import softmax_library

OPERATION = "softmax_library"
ACTIVATIONS = ("softmax", "softplus")


def sample(*shape, library=None, dtype=torch.float64, seed=0):
    """Logits, log library sizes, and an upstream gradient for each output, some of it zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    library = normal((*shape[:-1], 1) if library is None else library) + 6
    upstream = [normal(shape), normal(shape) * 1e-3]
    for u in upstream:
        u[u.abs() < 0.3 * u.abs().mean()] = 0
    return 3 * normal(shape), library, upstream


def stock(logits, library, scale_activation):
    """What scvi-tools' decoder computes."""
    scale = logits.softmax(-1) if scale_activation == "softmax" else F.softplus(logits)
    return scale, torch.exp(library) * scale


def evaluate(function, logits, library, upstream, dtype, *arguments, **options):
    """Outputs, and gradients by the logits and the library."""
    leaves = [t.to(dtype).requires_grad_() for t in (logits.detach(), library.detach())]
    outputs = function(*leaves, *arguments, **options)
    grads = torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream])
    return dict(zip(("px_scale", "px_rate", "logits", "library"), (*outputs, *grads), strict=True))


SHAPES = [
    ((5, 203), (5, 1)),
    ((5, 203), (1,)),
    ((5, 203), (1, 1)),
    ((3, 5, 203), (3, 5, 1)),
    ((3, 5, 203), (5, 1)),
    ((3, 5, 203), (3, 1, 1)),
    ((7, 1), (7, 1)),
    ((9, 4099), (9, 1)),
]


@pytest.mark.parametrize(("shape", "library"), SHAPES)
@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_float64(scale_activation, shape, library):
    """The formulas, in the dtype where only their truth counts, on the backend that has it."""
    problem = sample(*shape, library=library)
    got = evaluate(softmax_library, *problem, torch.float64, scale_activation=scale_activation)
    truth = evaluate(reference64.scale_and_rate, *problem, torch.float64, scale_activation)
    for name in got:
        assert got[name].shape == truth[name].shape
        torch.testing.assert_close(got[name], truth[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("shape", "library"), SHAPES)
@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_no_worse_than_stock(scale_activation, shape, library, backend):
    problem = [t.float() for t in sample(*shape, library=library)[:2]] + [sample(*shape)[2]]
    got = evaluate(
        softmax_library,
        *problem,
        torch.float32,
        scale_activation=scale_activation,
        backend=backend,
    )
    theirs = evaluate(stock, *problem, torch.float32, scale_activation)
    problem = [problem[0].double(), problem[1].double(), [u.float() for u in problem[2]]]
    truth = evaluate(reference64.scale_and_rate, *problem, torch.float64, scale_activation)
    limits = {"px_scale": 1e-6, "px_rate": 1e-6, "logits": 1e-5, "library": 1e-5}
    for name, limit in limits.items():
        assert_accurate(name, got[name], truth[name], theirs[name], limit)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=3),
    scale_activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 100),
)
def test_fuzz(shape, scale_activation, seed):
    """Any shape, those without cells, samples or genes included."""
    problem = sample(*shape, seed=seed)
    got = evaluate(softmax_library, *problem, torch.float64, scale_activation=scale_activation)
    logits, library, _ = problem
    if shape[-1]:
        truth = evaluate(reference64.scale_and_rate, *problem, torch.float64, scale_activation)
    else:
        empty, zero = torch.zeros_like(logits), torch.zeros_like(library)
        truth = {"px_scale": empty, "px_rate": empty, "logits": empty, "library": zero}
    for name in got:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-10, atol=1e-11)


@settings(max_examples=100)
@given(
    n=st.integers(0, 9),
    genes=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 130, 1023, 1025, 2100]),
    samples=st.sampled_from([None, 0, 1, 3]),
    scale_activation=st.sampled_from(ACTIVATIONS),
    used=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 100),
)
def test_fuzz_float32(n, genes, samples, scale_activation, used, seed):
    """Numbers of genes about those of vectors and of blocks; either gradient or both."""
    shape = (n, genes) if samples is None else (samples, n, genes)
    logits, library, upstream = sample(*shape, dtype=torch.float32, seed=seed)
    upstream = [u if use else torch.zeros_like(u) for u, use in zip(upstream, used, strict=True)]
    leaves = logits.requires_grad_(), library.requires_grad_()
    outputs = softmax_library(*leaves, scale_activation=scale_activation)
    taken = [k for k in (0, 1) if used[k]]
    grads = torch.autograd.grad([outputs[k] for k in taken], leaves, [upstream[k] for k in taken])
    truth = evaluate(
        reference64.scale_and_rate, logits, library, upstream, torch.float64, scale_activation
    )
    # A row of the gradients is small where its terms cancel: 1e-5 of the terms, not of their sum.
    size = library.detach().exp()
    terms = (upstream[0].abs() + upstream[1].abs() * size) * outputs[0].detach()
    limit = 1e-5 * terms.sum(-1).max().item() if terms.numel() else 0.0
    for name, got in zip(truth, (*outputs, *grads), strict=True):
        atol = 0.0 if name.startswith("px") else limit
        torch.testing.assert_close(got.double(), truth[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_threads_do_not_matter(scale_activation, one_thread, backend):
    """The same bits for any number of threads."""
    problem = sample(37, 2003, dtype=torch.float32)
    options = {"scale_activation": scale_activation, "backend": backend}
    expected = evaluate(softmax_library, *problem, torch.float32, **options)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        got = evaluate(softmax_library, *problem, torch.float32, **options)
        for name in got:
            assert torch.equal(got[name], expected[name]), (threads, name)


@pytest.mark.parametrize("instruction_set", instruction_sets.OTHERS)
def test_other_instruction_sets(instruction_set):
    tests = "no_worse_than_stock or fuzz_float32 or threads or extreme"
    instruction_sets.rerun(instruction_set, __file__, tests)


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_not_a_number_stays_in_its_row(scale_activation, backend):
    logits = torch.zeros(3, 40)
    logits[1, 33] = torch.nan
    outputs = softmax_library(
        logits, torch.ones(3, 1), scale_activation=scale_activation, backend=backend
    )
    for output in outputs:
        assert output[1, 33].isnan()
        assert output[1].isnan().all() == (scale_activation == "softmax")
        assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_extreme_logits(scale_activation):
    """Huge and equal logits, and empty cells, give what their limits are, and finite gradients."""
    logits = torch.tensor([[1e4, 0, -1e4], [7, 7, 7], [-1e4, -1e4, -1e4], [88, 90, 200], [1, 2, 3]])
    library = torch.tensor([[3.0], [3.0], [3.0], [-40.0], [-torch.inf]])
    leaves = logits.requires_grad_(), library.requires_grad_()
    scale, rate = softmax_library(*leaves, scale_activation=scale_activation)
    truth = reference64.scale_and_rate(logits.double(), library.double(), scale_activation)
    torch.testing.assert_close(scale.double(), truth[0], rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(rate.double(), truth[1], rtol=1e-6, atol=1e-38)
    assert (rate[4] == 0).all()
    if scale_activation == "softmax":
        assert torch.equal(scale[0], torch.tensor([1.0, 0.0, 0.0]))
        torch.testing.assert_close(scale[1:3], torch.full((2, 3), 1 / 3))
    grads = torch.autograd.grad([scale.sum(), rate.square().sum()], leaves)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_output_alone(scale_activation, used, dtype, tolerance):
    logits, library, upstream = sample(4, 6, dtype=dtype)
    zeroed = [u if k == used else torch.zeros_like(u) for k, u in enumerate(upstream)]
    expected = evaluate(
        softmax_library, logits, library, zeroed, dtype, scale_activation=scale_activation
    )
    leaves = logits.requires_grad_(), library.requires_grad_()
    output = softmax_library(*leaves, scale_activation=scale_activation)[used]
    output.backward(upstream[used])
    for leaf, name in zip(leaves, ("logits", "library"), strict=True):
        torch.testing.assert_close(leaf.grad, expected[name], rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_subsets_of_gradients(scale_activation, wanted, dtype):
    logits, library, upstream = sample(4, 6, dtype=dtype)
    expected = evaluate(
        softmax_library, logits, library, upstream, dtype, scale_activation=scale_activation
    )
    leaves = [logits, library]
    leaves[wanted].requires_grad_()
    outputs = softmax_library(*leaves, scale_activation=scale_activation)
    torch.autograd.backward(outputs, upstream)
    assert torch.equal(leaves[wanted].grad, expected[("logits", "library")[wanted]])
    assert leaves[1 - wanted].grad is None


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_outputs_are_separate_and_writable(scale_activation):
    """scvi-tools multiplies px_scale in place; the rate must not feel it, nor its gradients."""
    logits, library, upstream = sample(4, 6)
    scale, rate = softmax_library(logits, library, scale_activation=scale_activation)
    before = rate.clone()
    scale *= 0
    assert torch.equal(rate, before)
    leaf = logits.clone().requires_grad_()
    _, rate = softmax_library(leaf, library, scale_activation=scale_activation)
    rate *= 3
    rate.backward(upstream[1])
    again = logits.clone().requires_grad_()
    _, rate = softmax_library(again, library, scale_activation=scale_activation)
    rate.backward(3 * upstream[1])
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    logits, library, _ = sample(4, 6)
    expected = softmax_library(logits, library)
    logits.requires_grad_()
    with mode():
        outputs = softmax_library(logits, library)
    for got, value in zip(outputs, expected, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, value)


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_memory_layout_does_not_matter(scale_activation):
    """Transposed, sliced and expanded inputs; and the same bits at every run."""
    logits, library, upstream = sample(3, 5, 8, dtype=torch.float32)
    library = library[:1].expand(3, 5, 1)

    def run(logits, library):
        return evaluate(
            softmax_library,
            logits,
            library,
            upstream,
            torch.float32,
            scale_activation=scale_activation,
        )

    expected = run(logits, library)
    others = {
        "again": (logits, library),
        "transposed": (
            logits.transpose(0, 2).contiguous().transpose(0, 2),
            library.transpose(0, 1).contiguous().transpose(0, 1),
        ),
        "sliced": (torch.cat([logits, logits], 2)[..., :8], torch.cat([library] * 2, 2)[..., 1:]),
        "copied": (logits, library.contiguous()),
    }
    for how, inputs in others.items():
        for name, value in run(*inputs).items():
            assert torch.equal(value, expected[name]), (how, name)


def test_dtypes():
    """Half precision computes in float32, any float64 in float64; gradients have their own."""
    logits, library, upstream = sample(4, 6, dtype=torch.bfloat16)
    expected = softmax_library(logits.float(), library.float())
    leaves = logits.requires_grad_(), library.requires_grad_()
    outputs = softmax_library(*leaves)
    for got, value in zip(outputs, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, value)
    torch.autograd.backward(outputs, [u.float() for u in upstream])
    assert logits.grad.dtype == library.grad.dtype == torch.bfloat16
    assert softmax_library(logits, library.double())[0].dtype == torch.float64


def test_autocast():
    logits, library, upstream = sample(4, 6, dtype=torch.float32)
    expected = evaluate(softmax_library, logits, library, upstream, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(softmax_library, logits, library, upstream, torch.float32)
    for name in got:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name])


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "library"), [((3, 4), (3, 1)), ((2, 3, 4), (3, 1))])
def test_gradcheck(scale_activation, shape, library):
    logits, library, _ = sample(*shape, library=library)
    leaves = logits.requires_grad_(), library.requires_grad_() - 6
    assert torch.autograd.gradcheck(
        lambda a, b: softmax_library(a, b, scale_activation=scale_activation), leaves
    )


def test_double_backward_is_refused():
    logits, library, _ = sample(3, 4)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        softmax_library(logits, library)[1].sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "broadcast"])
def test_opcheck(scale_activation, layout):
    logits, library, upstream = sample(2, 5, 7, dtype=torch.float32)
    if layout == "transposed":
        logits, library, *upstream = (
            t.transpose(0, 1).contiguous().transpose(0, 1) for t in (logits, library, *upstream)
        )
    if layout == "broadcast":
        library = library[:1]
    leaves = logits.clone().requires_grad_(), library.clone().requires_grad_()
    options = (scale_activation, "auto")
    torch.library.opcheck(
        torch.ops.decoder_fast.softmax_library.default, (*leaves, None, None, *options)
    )
    scale, _ = softmax_library(logits, library, scale_activation=scale_activation)
    for grads in (upstream, (upstream[0], None), (None, upstream[1])):
        for wanted in ("logits library", "logits", "library", ""):
            torch.library.opcheck(
                torch.ops.decoder_fast.softmax_library_backward.default,
                (*grads, scale, library, None, None, *options, wanted),
            )


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_compile(scale_activation, dynamo):
    """Compiled without a break, for the last, smaller mini-batch too: the same bits."""
    compiled = torch.compile(softmax_library, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        for n in (6, 5, 3):
            problem = sample(n, 7, dtype=torch.float32)
            expected = evaluate(
                softmax_library, *problem, torch.float32, scale_activation=scale_activation
            )
            got = evaluate(compiled, *problem, torch.float32, scale_activation=scale_activation)
            for name in got:
                assert torch.equal(got[name], expected[name]), name


# From hidden units: the head's weight and bias


def head(*lead, genes=31, hidden=5, with_bias=True, dtype=torch.float64):
    """Hidden units, log library sizes, weight, perhaps bias; and upstream gradients."""
    _, library, upstream = sample(*lead, genes, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((*lead, hidden), (genes, hidden), (genes,))
    )
    return [hidden, library, weight, *([bias] if with_bias else [])], upstream


def from_hidden(hidden, library, weight, bias=None, **options):
    return softmax_library(hidden, library, weight=weight, bias=bias, **options)


def from_product(function):
    """The same from the logits, by autograd."""

    def run(hidden, library, weight, bias=None, **options):
        return function(F.linear(hidden, weight, bias), library, **options)

    return run


def evaluate_head(function, tensors, upstream, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves, **options)
    return *outputs, *torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream])


@pytest.mark.parametrize("lead", [(7,), (2, 3), (1,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
def test_from_hidden(scale_activation, with_bias, lead):
    tensors, upstream = head(*lead, with_bias=with_bias)
    options = {"scale_activation": scale_activation}
    got = evaluate_head(from_hidden, tensors, upstream, torch.float64, **options)
    truth = evaluate_head(
        from_product(reference64.scale_and_rate), tensors, upstream, torch.float64, **options
    )
    for value, right in zip(got, truth, strict=True):
        assert value.shape == right.shape
        torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lead", [(7,), (2, 3)])
def test_from_hidden_no_worse_than_stock(lead, backend):
    tensors, upstream = head(*lead, genes=203, hidden=37, dtype=torch.float32)
    got = evaluate_head(from_hidden, tensors, upstream, torch.float32, backend=backend)
    options = {"scale_activation": "softmax"}
    theirs = evaluate_head(from_product(stock), tensors, upstream, torch.float32, **options)
    truth = evaluate_head(
        from_product(reference64.scale_and_rate), tensors, upstream, torch.float64, **options
    )
    names = ("px_scale", "px_rate", "hidden", "library", "weight", "bias")
    for name, value, right, other in zip(names, got, truth, theirs, strict=True):
        assert_accurate(name, value, right, other, 1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_from_hidden_subsets_of_gradients(wanted, backend):
    tensors, upstream = head(2, 3, dtype=torch.float32)
    expected = evaluate_head(from_hidden, tensors, upstream, torch.float32, backend=backend)[2:]
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    torch.autograd.backward(from_hidden(*leaves, backend=backend), upstream)
    for k, (leaf, grad) in enumerate(zip(leaves, expected, strict=True)):
        assert torch.equal(leaf.grad, grad) if k in wanted else leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_from_hidden_of_nothing(shape, backend):
    """No cells, no genes, no hidden units."""
    n, genes, hidden = shape
    tensors = [torch.zeros(n, hidden), torch.zeros(n, 1), torch.zeros(genes, hidden)]
    upstream = torch.ones(n, genes), torch.ones(n, genes)
    *outputs, _, _, _ = got = evaluate_head(
        from_hidden, tensors, upstream, torch.float32, backend=backend
    )
    for output in outputs:
        torch.testing.assert_close(output, torch.full((n, genes), 1 / max(1, genes)))
    assert [g.shape for g in got[2:]] == [t.shape for t in tensors]


@pytest.mark.parametrize("function", [softmax_library, from_hidden])
def test_logits_are_not_kept(function, backend):
    """Of cells x genes autograd keeps one output, and nothing else."""
    tensors, _ = head(9, dtype=torch.float32)
    if function is softmax_library:
        tensors = sample(9, 31, dtype=torch.float32)[:2]
    leaves = [t.requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scale, _ = function(*leaves, backend=backend)
    large = [t for t in kept if t.numel() >= scale.numel()]
    assert [t.data_ptr() for t in large] == [scale.data_ptr()]


def test_from_hidden_dtypes():
    """Half precision computes in float32, any float64 in float64; gradients have their own."""
    tensors, upstream = head(4, dtype=torch.bfloat16)
    expected = from_hidden(*(t.float() for t in tensors))
    leaves = [t.requires_grad_() for t in tensors]
    outputs = from_hidden(*leaves)
    for got, value in zip(outputs, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, value)
    torch.autograd.backward(outputs, [u.float() for u in upstream])
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
    for position in (2, 3):
        mixed = [t.double() if k == position else t for k, t in enumerate(tensors)]
        assert from_hidden(*mixed)[0].dtype == torch.float64


def test_from_hidden_autocast(backend):
    tensors, upstream = head(4, dtype=torch.float32)
    expected = evaluate_head(from_hidden, tensors, upstream, torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate_head(from_hidden, tensors, upstream, torch.float32, backend=backend)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(3,), (2, 2)])
def test_from_hidden_gradcheck(lead, with_bias):
    tensors, _ = head(*lead, genes=4, hidden=3, with_bias=with_bias)
    tensors[1] -= 6
    assert torch.autograd.gradcheck(from_hidden, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_from_hidden_opcheck(lead, with_bias):
    tensors, upstream = head(*lead, with_bias=with_bias, dtype=torch.float32)
    arguments = [t.requires_grad_() for t in tensors] + [None] * (4 - len(tensors))
    options = ("softmax", "auto")
    torch.library.opcheck(torch.ops.decoder_fast.softmax_library.default, (*arguments, *options))
    hidden, library, weight = (t.detach() for t in tensors[:3])
    scale = from_hidden(*tensors)[0].detach()
    for wanted in ("logits library weight bias", "weight", "bias logits", ""):
        torch.library.opcheck(
            torch.ops.decoder_fast.softmax_library_backward.default,
            (*upstream, scale, library, hidden, weight, *options, wanted),
        )


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (2,)])
def test_from_hidden_compile(wanted, dynamo):
    compiled = torch.compile(from_hidden, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        for n in (6, 5, 3):
            tensors, upstream = head(n, dtype=torch.float32)
            grads = []
            for function in (from_hidden, compiled):
                leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
                torch.autograd.backward(function(*leaves), upstream)
                grads.append([leaf.grad for leaf in leaves])
            for k, (expected, got) in enumerate(zip(*grads, strict=True)):
                assert torch.equal(got, expected) if k in wanted else got is None


BAD = {
    "integer logits": (dict(logits=torch.ones(3, 4).int()), TypeError, ["logits", "int32"]),
    "integer library": (dict(library=torch.ones(3, 1).long()), TypeError, ["library", "int64"]),
    "1-D logits": (dict(logits=torch.ones(4)), ValueError, ["logits", "(4,)", "(cells, genes)"]),
    "4-D logits": (dict(logits=torch.ones(1, 1, 3, 4)), ValueError, ["logits", "(1, 1, 3, 4)"]),
    "library (N,)": (dict(library=torch.ones(3)), ValueError, ["library", "(3,)", "(3, 1)"]),
    "library (N, G)": (dict(library=torch.ones(3, 4)), ValueError, ["library", "(3, 4)"]),
    "library of others": (dict(library=torch.ones(2, 1)), ValueError, ["library", "(2, 1)"]),
    "library larger": (dict(library=torch.ones(2, 3, 1)), ValueError, ["library", "(2, 3, 1)"]),
    "scalar library": (dict(library=torch.tensor(1.0)), ValueError, ["library", "()"]),
    "device": (
        dict(library=torch.ones(3, 1, device="meta")),
        ValueError,
        ["library", "'meta'", "logits", "'cpu'"],
    ),
    "weight of others": (
        dict(weight=torch.ones(7, 5)),
        ValueError,
        ["weight", "(7, 5)", "(7, 4)", "hidden units"],
    ),
    "1-D weight": (dict(weight=torch.ones(4)), ValueError, ["weight", "(4,)", "(genes, hidden"]),
    "1-D hidden": (
        dict(logits=torch.ones(4), weight=torch.ones(7, 4)),
        ValueError,
        ["logits", "(4,)", "(cells, hidden units)"],
    ),
    "bias of others": (
        dict(weight=torch.ones(7, 4), bias=torch.ones(4)),
        ValueError,
        ["bias", "(4,)", "(7,)"],
    ),
    "numpy": (dict(logits=np.ones((3, 4))), TypeError, ["logits is a numpy.ndarray", "as_tensor"]),
    "number": (dict(library=3.0), TypeError, ["library is a builtins.float"]),
    "bias alone": (dict(bias=torch.ones(4)), ValueError, ["bias", "(4,)", "without weight"]),
    "integer weight": (dict(weight=torch.ones(7, 4).int()), TypeError, ["weight", "int32"]),
    "integer bias": (
        dict(weight=torch.ones(7, 4), bias=torch.ones(7).long()),
        TypeError,
        ["bias", "int64"],
    ),
    "device of weight": (
        dict(weight=torch.ones(7, 4, device="meta")),
        ValueError,
        ["weight", "'meta'", "logits", "'cpu'"],
    ),
    "device of bias": (
        dict(weight=torch.ones(7, 4), bias=torch.ones(7, device="meta")),
        ValueError,
        ["bias", "'meta'", "logits", "'cpu'"],
    ),
    "activation": (
        dict(scale_activation="relu"),
        ValueError,
        ["scale_activation", "'relu'", "'softmax'", "'softplus'"],
    ),
    "backend": (dict(backend="cuda"), ValueError, ["'cuda'", "'auto'", "'torch'"]),
}


@pytest.mark.parametrize(("change", "kind", "parts"), BAD.values(), ids=BAD)
def test_bad_input(change, kind, parts):
    arguments = {"logits": torch.ones(3, 4), "library": torch.ones(3, 1)}
    with pytest.raises(kind) as raised:
        softmax_library(**(arguments | change))
    for part in parts:
        assert part in str(raised.value)


def test_backend_that_cannot_run(missing_backend):
    logits, library, _ = sample(3, 4)
    with pytest.raises(RuntimeError) as raised:
        softmax_library(logits, library, backend=missing_backend)
    reason = choose(OPERATION, device=logits.device).reasons.get(missing_backend, "")
    for part in (repr(missing_backend), OPERATION, reason, "backend='auto'"):
        assert part in str(raised.value)
