"""covariate_linear's Triton kernels: on a GPU, else in Triton's interpreter.

Sizes exceed one tile everywhere, with a remainder; limits are lowered so that every route is taken.
"""

from __future__ import annotations

import itertools

import interpreter
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference64 import assert_accurate, error
from test_covariate_linear import ACTIVATIONS, NORMS, Layer, assert_identical, assert_same

from decoder_fast import functional
from decoder_fast.reference.covariate_linear import Inputs

OPERATION = "covariate_linear"
#: Limits of the kernels' module by route: "fused" has all in the product kernel, "parts" merges
#: batch norm's statistics while it normalises, "steps" before, and takes layer norm apart.
ROUTES = {
    "fused": {},
    "parts": {"MAX_ROWS_A_PROGRAM": 0},
    "steps": {"MAX_ROWS_A_PROGRAM": 0, "MAX_FUSED_HIDDEN": 0, "_MAX_PARTS": 2},
}
#: Routes, norms, modes and numbers of samples that differ in the kernels they take.
PATHS = [
    *itertools.product(("fused",), ("plain", "layer"), ("train",), (None, 3)),
    *itertools.product(("fused",), ("batch", "both"), ("train", "eval"), (None, 3)),
    ("parts", "batch", "train", None),
    *itertools.product(("steps",), ("batch", "both"), ("train",), (None, 3)),
    *itertools.product(("steps",), ("layer", "both"), ("eval",), (None,)),
]
#: Relative error of a product whose factors are rounded as the setting says, and sums of products.
PRODUCT_ERROR = {"highest": 1e-6, "high": 3e-3, "medium": 3e-2}
SIZES = {"n": 37, "n_in": 35, "hidden": 33, "n_cats": (35, 3, 2, 1)}

pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture
def kernels(triton_device):
    from decoder_fast.triton_kernels import covariate_linear as module

    return module


@pytest.fixture
def take(monkeypatch, kernels):
    """Take a route whatever the sizes."""

    def take(route):
        for name, value in ROUTES[route].items():
            monkeypatch.setattr(kernels, name, value)

    return take


@pytest.fixture
def compute(triton_device):
    """The operation on Triton's device, from and to the CPU."""

    def compute(*, categories, how=lambda t: t, **arguments):
        moved = {
            name: how(value.to(triton_device)) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        out = functional.covariate_linear(
            categories=[how(c.to(triton_device)) for c in categories], backend="triton", **moved
        )
        for name in ("running_mean", "running_var"):
            if arguments.get(name) is not None:
                arguments[name].copy_(moved[name])
        return out.cpu()

    return compute


@pytest.fixture
def precision(monkeypatch):
    """Set the precision of products for one test; in the interpreter, round as tensor cores do."""
    before = torch.get_float32_matmul_precision()
    if not torch.cuda.is_available():
        interpreter.round_products(monkeypatch)
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def sample(norm="plain", activation="gelu", **options):
    """A layer in float32; ``norm`` is a name, or the options that stand for it."""
    options = SIZES | (NORMS[norm] if isinstance(norm, str) else norm) | options
    return Layer(
        dtype=torch.float32,
        activation=activation,
        activation_parameter=ACTIVATIONS[activation],
        **options,
    )


def check(layer, compute):
    """Against the truth, and against plain torch in float32: everything that is computed."""
    got = layer.evaluate(compute, torch.float32)
    plain = layer.evaluate(dtype=torch.float32, backend="torch")
    truth = layer.truth()
    assert_accurate("output", got[0], truth[0], plain[0], 1e-6)
    for name in layer.meaningful():
        assert got[1][name].shape == truth[1][name].shape
        assert_accurate(name, got[1][name], truth[1][name], plain[1][name], 1e-5)
    for name in layer.running:
        assert_accurate(name, got[2][name], truth[2][name], plain[2][name], 1e-6)
    return got


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("route", "norm", "mode", "samples"), PATHS)
def test_accuracy(compute, take, route, norm, mode, samples):
    """Every path through the kernels, and the same bits at every run."""
    take(route)
    layer = sample(norm, samples=samples, training=mode == "train", activation="elu")
    got = check(layer, compute)
    assert_identical(layer.evaluate(compute, torch.float32), got)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["plain", "both"])
def test_activations(compute, norm, activation):
    # At a kink the last bit of the input decides: few elements.
    check(sample(norm, activation, n=19, hidden=7), compute)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("n", "hidden", "norm"),
    [
        (129, 17, "batch"),  # more cells than one program has
        (300, 20, "both"),
        (1030, 5, "batch"),  # 33 parts of 32 cells
        (19, 300, "layer"),  # wider than the product kernel's rows
        (5, 1100, "both"),
    ],
)
def test_sizes_as_shipped(compute, n, hidden, norm):
    check(sample(norm, "silu", n=n, hidden=hidden, n_in=3, n_cats=(4,)), compute)


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    samples=st.sampled_from([None, 0, 1, 2]),
    n=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    n_in=st.sampled_from([0, 1, 16, 17]),
    hidden=st.sampled_from([1, 16, 17, 33]),
    n_cats=st.lists(st.sampled_from([1, 2, 3, 33]), max_size=4),
    norm=st.sampled_from(list(NORMS)),
    route=st.sampled_from(list(ROUTES)),
    training=st.booleans(),
    bias=st.booleans(),
    affine=st.booleans(),
    track=st.booleans(),
    upstream=st.sampled_from([1.0, -1e-3, 0.0]),
    seed=st.integers(0, 99),
)
def test_fuzz(compute, kernels, n, n_in, n_cats, norm, route, training, track, upstream, **options):
    """About the sides of tiles, and without cells, samples, columns, parameters, statistics."""
    if n == 1 and norm in ("batch", "both"):
        training, track = False, True
    if not n_in and not n_cats:
        n_in = 1
    layer = sample(norm, n=n, n_in=n_in, n_cats=n_cats, training=training, track=track, **options)
    layer.upstream *= upstream
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ROUTES[route].items():
            patch.setattr(kernels, name, value)
        got = layer.evaluate(compute, torch.float32)
    if got[0].numel() == 0:
        assert got[0].shape == layer.upstream.shape
        assert all(not g.any() for g in got[1].values())
        return
    plain, truth = layer.evaluate(dtype=torch.float32, backend="torch"), layer.truth()

    def compare(name, ours, theirs, value, terms=0.0):
        assert ours.shape == value.shape
        norm = torch.linalg.vector_norm
        allowed = 4 * norm(theirs.double() - value) + 1e-6 * norm(value) + 1e-6 * terms
        assert norm(ours.double() - value) <= allowed, name

    compare("output", got[0], plain[0], truth[0])
    for name in layer.meaningful():
        # Gradients cancel under norms: 1e-6 of the upstream's size too.
        compare(name, got[1][name], plain[1][name], truth[1][name], layer.upstream.norm())
    for name in layer.running:
        compare(name, got[2][name], plain[2][name], truth[2][name])


@pytest.mark.parametrize(
    ("n", "n_cat"), [(300, 5), (300, 40), (70, 700), (1100, 6000)], ids=lambda n: str(n)
)
@pytest.mark.usefixtures("poisoned")
def test_many_and_few_categories(compute, n, n_cat):
    """Cells that share a category, cells with one of their own, and categories of nobody."""
    layer = sample(n=n, n_in=1, hidden=3, n_cats=(n_cat,))
    labels = layer.categories[0]
    labels[::3] = n_cat - 1  # many in one tile, and few in each of the others
    labels[labels == 2] = 0
    got = check(layer, compute)
    assert (got[1]["weight"][:, 1 + 2] == 0).all()


@pytest.mark.parametrize(("route", "samples"), [("fused", None), ("parts", 3), ("steps", 3)])
@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_running_statistics(compute, take, route, samples, momentum):
    """They move once for each sample; also where they cannot be moved in place."""
    take(route)
    layer = sample("batch", samples=samples, momentum=momentum, n_cats=(), n_in=3)
    expected = check(layer, compute)[2]

    def sliced(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    _, _, running = layer.evaluate(compute, torch.float32, how=sliced)
    for name, value in running.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 3])
def test_update_of_running_statistics(triton_device, samples):
    """The operation of its own that a compiled graph takes."""
    generator = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(samples, 20, 150, generator=generator, dtype=torch.float64)
    expected = [torch.zeros(150), torch.ones(150)]
    for one in v.unbind():
        expected[0].lerp_(one.mean(0).float(), 0.3)
        expected[1].lerp_(one.var(0).float(), 0.3)
    mean, invstd = v.mean(1), torch.rsqrt(v.var(1, correction=0) + 1e-3)
    running = [t.to(triton_device) for t in (torch.zeros(150), torch.ones(150))]
    torch.ops.decoder_fast.update_running(
        *running, mean.float().to(triton_device), invstd.float().to(triton_device),
        0.3, 1e-3, 20, "triton",
    )  # fmt: skip
    for got, right in zip(running, expected, strict=True):
        torch.testing.assert_close(got.cpu(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_far_from_zero(compute, take, route):
    """Units whose mean is 3e4 times their deviation: no mean of squares would tell."""
    take(route)
    layer = sample("batch", n_cats=(), activation="identity")
    layer.tensors["bias"] += 3e4 * layer.tensors["weight"].norm(dim=1)
    layer.tensors["x"] *= 0.2
    got = layer.evaluate(compute, torch.float32)[0]
    plain = layer.evaluate(dtype=torch.float32, backend="torch")[0]
    truth = layer.truth()[0]
    assert error(got, truth) <= 2 * error(plain, truth) <= 0.05


@pytest.mark.parametrize(
    "wanted",
    [
        ("x",),
        ("weight",),
        ("bias",),
        ("batch_norm_weight",),
        ("categories.2",),
        ("bias", "batch_norm_bias"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("route", ["fused", "parts"])
def test_subsets_of_gradients(compute, take, route, training, wanted):
    take(route)
    layer = sample("batch", training=training, n_cats=(2, 2, 2), n_in=3)
    out, every, running = layer.evaluate(compute, torch.float32)
    expected = {name: g if name in wanted else None for name, g in every.items()}
    got = layer.evaluate(compute, torch.float32, wanted=wanted)
    assert_identical(got, (out, expected, running))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_memory_layout_does_not_matter(compute, norm):
    """Transposed and sliced inputs; expanded ones, and an expanded upstream gradient."""
    layer = sample(norm, samples=2)
    layer.tensors["x"] = layer.tensors["x"][:1].repeat(2, 1, 1)
    layer.upstream = torch.full_like(layer.upstream, 0.5)
    expected = layer.evaluate(compute, torch.float32)

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    def expanded(t):
        return t[:1].expand_as(t) if t.dim() == 3 else t

    for how in (transposed, sliced):
        got = layer.evaluate(compute, torch.float32, how=how)
        # 1e-6: the products that torch takes depend on the layout in their last bits.
        assert_same(got, expected, layer, 1e-6)
    layer.upstream = torch.tensor(0.5).expand_as(layer.upstream)
    out, grads, _ = layer.evaluate(compute, torch.float32, how=expanded)
    assert torch.equal(out, expected[0])
    assert torch.equal(grads["weight"], expected[1]["weight"])


@pytest.mark.parametrize("norm", ["plain", "batch"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "silu"])
def test_nan_stays(compute, activation, norm):
    """In a cell's inputs and in its upstream gradient."""
    layer = sample(norm, activation, n_in=3, hidden=5, n_cats=())
    # On the side where gradients flow.
    layer.tensors["batch_norm_bias" if norm == "batch" else "bias"] += 100
    layer.upstream[3, 2] = torch.nan
    _, grads, _ = layer.evaluate(compute, torch.float32)
    assert grads["x"][3].isnan().all()
    for name in ("weight", "bias"):
        assert grads[name][2].isnan().all(), name
        assert grads[name][3].isfinite().all(), name
    layer.tensors["x"][3] = torch.nan
    out, _, _ = layer.evaluate(compute, torch.float32)
    assert out[3].isnan().all()
    assert out[4].isnan().all() == (norm == "batch")


@pytest.mark.parametrize("setting", PRODUCT_ERROR)
def test_precision(compute, precision, setting):
    """Products follow torch's setting; sums by label are exact under each."""
    precision(setting)
    layer = sample("layer", "silu", n_in=40)
    got, truth = layer.evaluate(compute, torch.float32), layer.truth()
    found = error(got[0], truth[0])
    assert found <= PRODUCT_ERROR[setting]
    if setting != "highest":
        assert found > PRODUCT_ERROR["highest"], "no product was rounded"
    else:
        assert error(got[1]["weight"], truth[1]["weight"]) <= 1e-6


def inputs(layer, device, **changes):
    """The arguments of the kernels' module."""
    fields = {
        "bias": None,
        "batch_norm_weight": None,
        "batch_norm_bias": None,
        "running_mean": None,
        "running_var": None,
        "use_batch_norm": False,
        "batch_statistics": False,
        "batch_norm_eps": 1e-3,
        "use_layer_norm": False,
        "layer_norm_eps": 1e-5,
        "activation": "relu",
        "activation_parameter": 0.0,
        "categories": [c[:, 0].to(device) for c in layer.categories],
        "n_cats": layer.n_cats,
        **{name: t.to(device) for name, t in layer.tensors.items()},
        **changes,
    }
    return Inputs(**fields | {"x": fields["x"][None]})


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**62)])
def test_labels_out_of_range(compute, kernels, triton_device, monkeypatch, bad):
    """Nothing outside the weight is read or written, and the device is told."""
    layer = sample(n=21, n_cats=(5,), n_in=2)
    good = inputs(layer, triton_device)
    wrong = inputs(layer, triton_device)
    wrong.categories = [good.categories[0].clone()]
    wrong.categories[0][20] = bad
    told = []
    monkeypatch.setattr(torch, "_assert_async", lambda ok, message: told.append((int(ok), message)))
    out, wrong_out = (kernels.forward(i)[0] for i in (good, wrong))
    assert [ok for ok, _ in told] == [1, 0]
    assert "category 0: a label is outside 0..4" in told[1][1]
    assert torch.equal(out[:, :20], wrong_out[:, :20])
    good.weight = good.weight.clone()
    good.weight[:, 2:] = 0
    assert torch.equal(wrong_out[:, 20], kernels.forward(good)[0][:, 20]), "of no category"

    grad = torch.ones_like(out)
    grad[:, 20] = 0
    wanted = frozenset({"weight"})
    empty = out.new_empty(0)
    d_weight, wrong_d_weight = (
        kernels.backward(i, grad, out, empty, empty, empty, wanted)["weight"] for i in (good, wrong)
    )
    assert torch.equal(d_weight, wrong_d_weight)

    if triton_device.type == "cpu":  # on a GPU an assertion ends the process
        layer.categories[0][20] = bad
        with pytest.raises(ValueError, match=f"category 0: found label {bad}.* 5 categories"):
            layer.evaluate(compute, torch.float32)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_nothing_is_written_elsewhere(compute, take, monkeypatch, route, norm):
    """Buffers lie between others that stay as they were."""
    take(route)
    guards = []

    def guarded(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            n, margin = tensor.numel(), 4096
            memory = torch.full((n + 2 * margin,), 77, dtype=tensor.dtype, device=tensor.device)
            guards.append((memory[:margin], memory[margin + n :]))
            return memory[margin : margin + n].view(tensor.shape)

        return made

    monkeypatch.setattr(torch, "empty_like", guarded(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty))
    layer = sample(norm, samples=2)
    layer.evaluate(compute, torch.float32)
    monkeypatch.undo()
    assert guards
    for pair in guards:
        assert all((part == 77).all() for part in pair)


# ---------------------------------------------------------------------------------------------
# On a GPU alone


def gpu_layer(norm, device="cuda", **options):
    """A layer's tensors on a GPU, that need gradients, and a function of nothing of them."""
    layer = sample(norm, n=200, hidden=128, **options)
    _, tensors, categories = layer.leaves(torch.float32)
    tensors = {name: t.detach().to(device).requires_grad_() for name, t in tensors.items()}
    running = {name: t.to(device) for name, t in layer.running.items()}
    categories = [c.detach().to(device) for c in categories]

    def run():
        return functional.covariate_linear(
            categories=categories, n_cats=layer.n_cats, **tensors, **running, **layer.options
        )

    return run, tensors, running, layer.upstream.to(device)


def step(run, tensors, upstream):
    out = run()
    return [out, *torch.autograd.grad(out, list(tensors.values()), upstream)]


@on_gpu
@every_norm
def test_cuda_graph(norm):
    """A whole step waits for nothing, and replays to the same bits."""
    run, tensors, running, upstream = gpu_layer(norm)
    # Detached: what keeps the autograd graph ties the leaves to this stream, for the recording too.
    expected = [t.detach().clone() for t in step(run, tensors, upstream)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(run, tensors, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(run, tensors, upstream)
    before = [t.clone() for t in running.values()]
    graph.replay()
    assert all(map(torch.equal, captured, expected))
    assert not any(map(torch.equal, before, running.values()))


@on_gpu
def test_streams():
    run, tensors, _, upstream = gpu_layer("batch")
    expected = step(run, tensors, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # whatever does not wait for it comes too early
        for t in tensors.values():
            t.data.mul_(1.0)
        got = step(run, tensors, upstream)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device():
    (run, *rest), (other, *other_rest) = (gpu_layer("both", f"cuda:{i}") for i in (0, 1))
    expected = step(run, rest[0], rest[2])
    got = step(other, other_rest[0], other_rest[2])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


@on_gpu
@every_norm
def test_autocast(norm):
    run, tensors, _, upstream = gpu_layer(norm)
    expected = step(run, tensors, upstream)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = run()
    got = [out, *torch.autograd.grad(out, list(tensors.values()), upstream)]
    assert all(map(torch.equal, got, expected))


@on_gpu
@either_mode
@every_norm
def test_compile(norm, training, dynamo):
    """One graph, the same bits, and running statistics that move."""
    run, tensors, running, upstream = gpu_layer(norm, training=training)
    start = [t.clone() for t in running.values()]
    expected = step(run, tensors, upstream)
    moved = [t.clone() for t in running.values()]
    for t, value in zip(running.values(), start, strict=True):
        t.copy_(value)
    got = step(torch.compile(run, fullgraph=True), tensors, upstream)
    assert all(map(torch.equal, got, expected))
    for t, value in zip(running.values(), moved, strict=True):
        torch.testing.assert_close(t, value, rtol=1e-6, atol=1e-6)


@on_gpu
def test_default():
    """On a GPU nobody has to ask for them."""
    from decoder_fast.backends import choose

    assert choose(OPERATION, device=torch.device("cuda")).backend == "triton"
