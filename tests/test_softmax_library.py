"""softmax_library: logits and library size to (px_scale, px_rate)."""

from __future__ import annotations

import instruction_sets
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
    torch.library.opcheck(
        torch.ops.decoder_fast.softmax_library.default, (*leaves, scale_activation, "auto")
    )
    scale, _ = softmax_library(logits, library, scale_activation=scale_activation)
    for grads in (upstream, (upstream[0], None), (None, upstream[1])):
        torch.library.opcheck(
            torch.ops.decoder_fast.softmax_library_backward.default,
            (*grads, scale, library, scale_activation, "auto"),
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
