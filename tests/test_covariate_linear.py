"""covariate_linear: linear + covariate injection + norm + activation, one hidden layer."""

from __future__ import annotations

import warnings

import instruction_sets
import numpy as np
import pytest
import reference64
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference64 import Recorder, assert_accurate, error
from torch import nn

from decoder_fast.backends import choose
from decoder_fast.functional import covariate_linear

OPERATION = "covariate_linear"
NORMS = {
    "plain": {},
    "batch": {"use_batch_norm": True},
    "layer": {"use_layer_norm": True},
    "both": {"use_batch_norm": True, "use_layer_norm": True},
}
ACTIVATIONS = {
    "identity": 0.0,
    "relu": 0.0,
    "leaky_relu": 0.03,
    "elu": 1.3,
    "gelu": 0.0,
    "silu": 0.0,
}
SIZES = {"2-D": None, "3-D": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer:
    """Inputs of the operation: differentiable tensors by name, covariates and other options.

    The covariates are labels, an integer one-hot matrix and a soft one; nobody has category 2 of
    the first. With ``affine=False`` batch norm has no parameters, with ``track=False`` no running
    statistics.
    """

    def __init__(
        self,
        *,
        samples=None,
        n=23,
        n_in=5,
        hidden=9,
        n_cats=(4, 3, 2),
        bias=True,
        affine=True,
        track=True,
        dtype=torch.float64,
        seed=0,
        **options,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        lead = () if samples is None else (samples,)
        self.tensors = {
            "x": normal(*lead, n, n_in),
            "weight": normal(hidden, n_in + sum(n_cats)),
        }
        if bias:
            self.tensors["bias"] = normal(hidden)
        self.n_cats = list(n_cats)
        self.categories = []
        for k, n_cat in enumerate(n_cats):
            labels = torch.randint(0, n_cat, (n, 1), generator=generator)
            if k == 0:
                labels[labels == 2] = 0
            if n_cat == 1:
                self.categories.append(labels)
            elif k % 3 == 1:
                self.categories.append(nn.functional.one_hot(labels[:, 0], n_cat))
            elif k % 3 == 2:
                self.categories.append(normal(n, n_cat).softmax(-1))
            else:
                self.categories.append(labels)
        self.options = {"training": True} | options
        self.running = {}
        if options.get("use_batch_norm"):
            if affine:
                self.tensors["batch_norm_weight"] = normal(hidden)
                self.tensors["batch_norm_bias"] = normal(hidden)
            if track:
                self.running["running_mean"] = normal(hidden)
                self.running["running_var"] = normal(hidden).square() + 0.5
        self.upstream = normal(*lead, n, hidden)
        self.upstream[..., ::4, :] = 0

    def leaves(self, dtype, wanted=None):
        """Copies that need gradients (soft covariates too), and the other arguments."""
        tensors = {name: t.detach().to(dtype).clone() for name, t in self.tensors.items()}
        categories = [c.to(dtype).clone() if c.is_floating_point() else c for c in self.categories]
        named = tensors | {
            f"categories.{k}": c for k, c in enumerate(categories) if c.is_floating_point()
        }
        for name, t in named.items():
            t.requires_grad_(wanted is None or name in wanted)
        return named, tensors, categories

    def evaluate(self, function=covariate_linear, dtype=torch.float64, wanted=None, **options):
        """Output, gradients by name, and running statistics after the call."""
        named, tensors, categories = self.leaves(dtype, wanted)
        running = {name: t.to(dtype).clone() for name, t in self.running.items()}
        out = function(
            categories=categories,
            n_cats=self.n_cats,
            **tensors,
            **running,
            **(self.options | options),
        )
        out.backward(self.upstream.to(dtype))
        return out.detach(), {name: t.grad for name, t in named.items()}, running

    def truth(self):
        return self.evaluate(naive)

    def meaningful(self):
        """Gradients that are more than rounding: batch norm takes a constant away."""
        soft = (k for k, c in enumerate(self.categories) if c.is_floating_point())
        names = [*self.tensors, *(f"categories.{k}" for k in soft)]
        batch_statistics = self.options["training"] or not self.running
        if self.options.get("use_batch_norm") and batch_statistics:
            names = [name for name in names if name != "bias"]
        return names


def naive(
    *,
    x,
    weight,
    bias=None,
    categories,
    n_cats,
    use_batch_norm=False,
    running_mean=None,
    running_var=None,
    training,
    momentum=0.01,
    **options,
):
    """The truth, batch norm's statistics included."""
    norm = None
    if use_batch_norm:
        with torch.no_grad():
            linear = reference64.hidden_layer(
                x, weight, bias, categories, n_cats, activation="identity"
            )
        if training or running_mean is None:
            # Differentiable, through everything that the statistics depend on.
            v = reference64.hidden_layer(x, weight, bias, categories, n_cats, activation="identity")
            norm = v.mean(-2, keepdim=True), v.var(-2, keepdim=True, correction=0)
        else:
            norm = running_mean.clone(), running_var.clone()
        if training and running_mean is not None:
            for sample in linear if linear.dim() == 3 else [linear]:
                running_mean.lerp_(sample.mean(0), momentum)
                running_var.lerp_(sample.var(0), momentum)
    return reference64.hidden_layer(x, weight, bias, categories, n_cats, norm=norm, **options)


def stock(
    *,
    x,
    weight,
    bias=None,
    categories,
    n_cats,
    training,
    use_batch_norm=False,
    use_layer_norm=False,
    batch_norm_weight=None,
    batch_norm_bias=None,
    running_mean=None,
    running_var=None,
    activation="relu",
    activation_parameter=0.0,
):
    """What scvi-tools' layer computes, from torch's modules' functions."""
    F = nn.functional
    one_hot = [
        c if c.dim() == 2 and c.shape[1] == n else F.one_hot(c[:, 0], n)
        for c, n in zip(categories, n_cats, strict=True)
    ]
    columns = [c.to(x.dtype).expand(*x.shape[:-1], -1) for c in one_hot]
    v = F.linear(torch.cat([x, *columns], -1), weight, bias)
    if use_batch_norm:

        def normed(sample):
            return F.batch_norm(
                sample,
                running_mean,
                running_var,
                batch_norm_weight,
                batch_norm_bias,
                training or running_mean is None,
                0.01,
                1e-3,
            )

        v = normed(v) if v.dim() == 2 else torch.stack([normed(sample) for sample in v])
    if use_layer_norm:
        v = F.layer_norm(v, v.shape[-1:])
    if activation == "identity":
        return v
    parameter = [activation_parameter] if activation in ("leaky_relu", "elu") else []
    return getattr(F, activation)(v, *parameter)


def assert_same(got, expected, layer, tolerance):
    """Output, meaningful gradients and running statistics agree, each in norm."""
    assert got[0].shape == expected[0].shape
    assert error(got[0], expected[0].double()) <= tolerance, "output"
    for name in expected[1].keys() & set(layer.meaningful()):
        found = error(got[1][name], expected[1][name].double())
        assert found <= tolerance, f"gradient of {name}: {found:.1e}"
    for name, value in expected[2].items():
        assert error(got[2][name], value.double()) <= tolerance, name


def assert_identical(got, expected):
    assert torch.equal(got[0], expected[0])
    for part in (1, 2):
        assert got[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            if value is None:
                assert got[part][name] is None, name
            else:
                assert torch.equal(got[part][name], value), name


every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_size = pytest.mark.parametrize("samples", SIZES.values(), ids=SIZES)
either_precision = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=["64", "32"]
)
either_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@either_mode
@every_size
@every_activation
@every_norm
def test_float64(norm, activation, samples, training):
    """The formulas, in the dtype where only their truth counts, on the backend that has it."""
    layer = Layer(
        samples=samples,
        training=training,
        activation=activation,
        activation_parameter=ACTIVATIONS[activation],
        **norm,
    )
    got = layer.evaluate()
    assert_same(got, layer.truth(), layer, 1e-12)
    assert (got[1]["weight"][:, 5 + 2] == 0).all(), "a category that nobody has"


@either_mode
@every_size
@every_activation
@every_norm
def test_no_worse_than_stock(norm, activation, samples, training, backend):
    """float32: outputs to 1e-6, gradients to 1e-5, and at most twice the error of stock."""
    layer = Layer(
        samples=samples,
        n=131,
        n_in=17,
        hidden=33,
        n_cats=(7, 3, 2, 1),
        training=training,
        activation=activation,
        activation_parameter=ACTIVATIONS[activation],
        dtype=torch.float32,
        **norm,
    )
    got = layer.evaluate(dtype=torch.float32, backend=backend)
    theirs = layer.evaluate(stock, dtype=torch.float32)
    truth = layer.truth()
    assert_accurate("output", got[0], truth[0], theirs[0], 1e-6)
    for name in layer.meaningful():
        assert_accurate(name, got[1][name], truth[1][name], theirs[1][name], 1e-5)
    for name in layer.running:
        assert_accurate(name, got[2][name], truth[2][name], theirs[2][name], 1e-6)


@settings(max_examples=80)
@given(
    samples=st.sampled_from([None, 0, 1, 2]),
    n=st.sampled_from([0, 2, 3, 7]),
    n_in=st.integers(0, 6),
    hidden=st.integers(1, 7),
    n_cats=st.lists(st.integers(1, 5), max_size=4),
    norm=st.sampled_from(list(NORMS)),
    training=st.booleans(),
    bias=st.booleans(),
    affine=st.booleans(),
    track=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fuzz(n_in, n_cats, norm, **arguments):
    """Any shape, those without cells, samples or columns included."""
    if not n_in and not n_cats:
        n_in = 1
    # A smooth activation, and one unit more than layer norm would make constant.
    layer = Layer(n_in=n_in, n_cats=n_cats, activation="gelu", **NORMS[norm], **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = layer.evaluate()
    out, grads, running = got
    if out.numel() == 0:
        assert out.shape == layer.upstream.shape
        assert all(not g.any() for g in grads.values())
        assert all(torch.equal(t, layer.running[name]) for name, t in running.items())
        return
    truth = layer.truth()
    largest = max(g.abs().max().item() for g in truth[1].values() if g.numel())
    torch.testing.assert_close(out, truth[0], rtol=1e-9, atol=1e-9)
    for name, value in truth[1].items():
        if value.numel():
            # Of two cells batch norm makes +-1, whatever they are: gradients cancel.
            torch.testing.assert_close(grads[name], value, rtol=1e-8, atol=1e-9 * (1 + largest))
    for name, value in truth[2].items():
        torch.testing.assert_close(running[name], value, rtol=1e-10, atol=1e-10)


@settings(max_examples=150)
@given(
    samples=st.sampled_from([None, 0, 1, 3, 18]),
    n=st.sampled_from([0, 1, 3, 5, 63, 64, 65, 130]),
    n_in=st.sampled_from([0, 1, 5, 16, 17, 33, 70]),
    hidden=st.sampled_from([1, 7, 8, 15, 16, 17, 33, 64, 65, 100]),
    n_cats=st.lists(st.sampled_from([1, 2, 3, 16, 50]), max_size=4),
    norm=st.sampled_from(list(NORMS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    training=st.booleans(),
    bias=st.booleans(),
    affine=st.booleans(),
    track=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fuzz_float32(n, n_in, n_cats, norm, activation, training, track, **arguments):
    """Sizes about those of vectors, blocks and slots: as right as the reference in float32."""
    if n == 1 and "batch_norm" in str(NORMS[norm]):
        training, track = False, True
    if not n_in and not n_cats:
        n_in = 1
    if n * arguments["hidden"] > 1000 and activation in ("relu", "leaky_relu", "elu"):
        activation = "silu"  # at a kink the last bit of the input decides
    layer = Layer(
        n=n,
        n_in=n_in,
        n_cats=n_cats,
        activation=activation,
        activation_parameter=ACTIVATIONS[activation],
        training=training,
        track=track,
        dtype=torch.float32,
        **NORMS[norm],
        **arguments,
    )
    got = layer.evaluate(dtype=torch.float32)
    if got[0].numel() == 0:
        assert got[0].shape == layer.upstream.shape
        assert all(not g.any() for g in got[1].values())
        return
    reference, truth = layer.evaluate(dtype=torch.float32, backend="torch"), layer.truth()

    def check(name, ours, theirs, value, terms=0.0):
        assert ours.shape == value.shape
        norm = torch.linalg.vector_norm
        allowed = 4 * norm(theirs.double() - value) + 1e-6 * norm(value) + 1e-6 * terms
        assert norm(ours.double() - value) <= allowed, name

    check("output", got[0], reference[0], truth[0])
    for name in layer.meaningful():
        # Gradients cancel under norms: 1e-6 of the upstream's size too.
        check(name, got[1][name], reference[1][name], truth[1][name], layer.upstream.norm())
    for name in layer.running:
        check(name, got[2][name], reference[2][name], truth[2][name])


@pytest.mark.parametrize("samples", [None, 3])
@every_norm
def test_threads_do_not_matter(norm, samples, backend):
    """The same bits for any number of threads."""
    if backend == "torch":
        pytest.skip("torch's matrix products depend on the number of threads")
    layer = Layer(
        samples=samples, n=701, n_in=33, hidden=130, n_cats=(7, 3, 5), dtype=torch.float32, **norm
    )
    expected = layer.evaluate(dtype=torch.float32, backend=backend)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_identical(layer.evaluate(dtype=torch.float32, backend=backend), expected)


@pytest.mark.parametrize("instruction_set", instruction_sets.OTHERS)
def test_other_instruction_sets(instruction_set):
    tests = "no_worse_than_stock or fuzz_float32 or threads or labels or layout"
    instruction_sets.rerun(instruction_set, __file__, tests)


# ---------------------------------------------------------------------------------------------
# Covariates


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("label", [3, 100, -1])
def test_labels_out_of_range(dtype, label, backend):
    if label < 0 and dtype == torch.uint8:
        label = 255
    layer = Layer(n=5, n_cats=(2, 3, 3), dtype=torch.float32)
    bad = torch.tensor([[0], [2], [label], [1], [1]]).to(dtype)
    layer.categories = [*layer.categories[:1], layer.categories[1][:, :1].long() % 3, bad]
    with pytest.raises(ValueError, match=f"category 2: found label {label}.* 3 categories"):
        layer.evaluate(dtype=torch.float32, backend=backend)
    # Also where there is nothing to compute.
    layer.tensors["x"], layer.upstream = torch.zeros(0, 5, 5), torch.zeros(0, 5, 9)
    with pytest.raises(ValueError, match=f"category 2: found label {label}"):
        layer.evaluate(dtype=torch.float32, backend=backend)


@every_size
def test_labels_and_one_hot_matrices_are_the_same(samples):
    """Integer labels in any form, and one-hot matrices of any dtype."""
    layer = Layer(samples=samples, n_cats=(4,), activation="gelu")
    expected = layer.evaluate()
    labels = layer.categories[0]
    for category in (labels[:, 0], labels.int(), labels[:, 0].to(torch.uint8), labels.short()):
        layer.categories = [category]
        assert_identical(layer.evaluate(), expected)
    one_hot = nn.functional.one_hot(labels[:, 0], 4)
    for category in (one_hot, one_hot.int(), one_hot.bool(), one_hot.to(torch.uint8)):
        layer.categories = [category]
        # 1e-14: a product adds zeros, in an order of its own.
        assert_same(layer.evaluate(), expected, layer, 1e-14)
    layer.categories = [one_hot.double()]
    assert_same(layer.evaluate(), expected, layer, 1e-14)


@every_size
@either_precision
def test_more_categories_than_cells(samples, dtype, tolerance):
    """And a few cells that share one."""
    layer = Layer(samples=samples, n=7, n_cats=(50, 9, 8, 7, 6), use_batch_norm=True, dtype=dtype)
    layer.categories[0][3:6] = 44
    got = layer.evaluate(dtype=dtype)
    assert_same(got, layer.truth(), layer, tolerance)
    nobody = torch.ones(50, dtype=torch.bool)
    nobody[layer.categories[0].flatten()] = False
    assert (got[1]["weight"][:, 5:55][:, nobody] == 0).all()


def test_one_category():
    """One category is a column that everybody has: a second bias."""
    layer = Layer(n_cats=(1,), activation="gelu")
    out, grads, _ = layer.evaluate()
    torch.testing.assert_close(grads["weight"][:, -1], grads["bias"], rtol=1e-12, atol=0)
    layer.tensors["bias"] += layer.tensors["weight"][:, -1]
    layer.tensors["weight"][:, -1] = 0
    torch.testing.assert_close(layer.evaluate()[0], out, rtol=1e-12, atol=1e-12)


def test_no_one_hot_matrix_is_built():
    """Many categories: nothing of cells x categories, forwards or backwards."""
    n, n_cat, hidden = 256, 3000, 4
    layer = Layer(n=n, n_in=3, hidden=hidden, n_cats=(n_cat,), use_batch_norm=True)
    with Recorder() as recorder:
        layer.evaluate(backend="torch")
    assert recorder.largest == hidden * (3 + n_cat)  # the weight and its gradient


# ---------------------------------------------------------------------------------------------
# Running statistics


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.7, 1.0])
@every_size
@either_precision
def test_momentum(samples, momentum, dtype, tolerance):
    """Running statistics move once for each sample, whatever the momentum."""
    layer = Layer(
        samples=samples, use_batch_norm=True, momentum=momentum, activation="gelu", dtype=dtype
    )
    got, truth = layer.evaluate(dtype=dtype), layer.truth()
    assert_same(got, truth, layer, tolerance)
    moved = [not torch.equal(got[2][name], layer.running[name]) for name in layer.running]
    assert moved == [momentum > 0] * 2


@either_precision
def test_evaluation_leaves_the_running_statistics(dtype, tolerance):
    layer = Layer(use_batch_norm=True, training=False, dtype=dtype)
    _, _, running = layer.evaluate(dtype=dtype)
    assert all(torch.equal(t, layer.running[name]) for name, t in running.items())


@either_mode
@pytest.mark.parametrize("affine", [True, False])
@either_precision
def test_no_running_statistics(training, affine, dtype, tolerance):
    """Without them the batch's own are used, in evaluation too."""
    layer = Layer(
        use_batch_norm=True,
        track=False,
        affine=affine,
        training=training,
        activation="gelu",
        dtype=dtype,
    )
    assert_same(layer.evaluate(dtype=dtype), layer.truth(), layer, tolerance)
    training_mode = layer.evaluate(dtype=dtype, training=True)
    assert torch.equal(layer.evaluate(dtype=dtype, training=False)[0], training_mode[0])


@either_precision
def test_backward_after_the_statistics_moved_on(dtype, tolerance):
    """In evaluation the backward pass uses the statistics that the forward pass did."""
    layer = Layer(use_batch_norm=True, training=False, activation="gelu", dtype=dtype)
    expected = layer.evaluate(dtype=dtype)
    named, tensors, categories = layer.leaves(dtype)
    running = {name: t.clone() for name, t in layer.running.items()}
    out = covariate_linear(
        categories=categories, n_cats=layer.n_cats, **tensors, **running, **layer.options
    )
    for t in running.values():
        t.fill_(torch.nan)
    out.backward(layer.upstream)
    assert_identical((out, {name: t.grad for name, t in named.items()}, {}), (*expected[:2], {}))


@pytest.mark.parametrize("samples", [None, 2])
def test_one_cell(samples):
    """Fine unless batch norm is to be trained on it."""
    layer = Layer(samples=samples, n=1, use_batch_norm=True, training=False, activation="gelu")
    assert_same(layer.evaluate(), layer.truth(), layer, 1e-12)
    for options in ({"training": True}, {"training": False, "track": False}):
        layer = Layer(samples=samples, n=1, use_batch_norm=True, **options)
        with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
            layer.evaluate()
        assert "single cell" in str(raised.value)
    assert Layer(n=1, use_layer_norm=True).evaluate()[0].isfinite().all()


# ---------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize(
    "wanted",
    [
        ("x",),
        ("weight",),
        ("bias",),
        ("batch_norm_weight",),
        ("batch_norm_bias",),
        ("categories.2",),
        ("x", "bias", "batch_norm_bias"),
    ],
)
@either_precision
def test_subsets_of_gradients(wanted, dtype, tolerance):
    layer = Layer(use_batch_norm=True, use_layer_norm=True, dtype=dtype)
    out, every, running = layer.evaluate(dtype=dtype)
    expected = {name: g if name in wanted else None for name, g in every.items()}
    assert_identical(layer.evaluate(wanted=wanted, dtype=dtype), (out, expected, running))


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        # Forwards one for x and one for each matrix covariate; backwards one for x, for each soft
        # matrix, and three for the weight (one-hot labels need none).
        (None, 3 + 5),
        (("x",), 3 + 1),
        (("weight",), 3 + 3),
        (("categories.2",), 3 + 1),
        (("bias",), 3),
    ],
)
def test_gradients_of_others_are_not_computed(wanted, products):
    layer = Layer()
    with Recorder() as recorder:
        layer.evaluate(wanted=wanted, backend="torch")
    assert recorder.products == products


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@either_mode
def test_without_gradients(mode, training):
    """No graph; and training moves the running statistics all the same."""
    layer = Layer(use_batch_norm=True, training=training)
    expected = layer.evaluate()
    _, tensors, categories = layer.leaves(torch.float64)
    running = {name: t.clone() for name, t in layer.running.items()}
    with mode():
        out = covariate_linear(
            categories=categories, n_cats=layer.n_cats, **tensors, **running, **layer.options
        )
    assert not out.requires_grad
    assert_identical((out, {}, running), (expected[0], {}, expected[2]))


@every_size
@every_norm
@either_precision
def test_memory_layout_does_not_matter(norm, samples, dtype, tolerance):
    """Transposed, sliced and expanded inputs; and the same bits at every run."""
    layer = Layer(samples=samples, activation="gelu", dtype=dtype, **norm)
    expected = layer.evaluate(dtype=dtype)
    assert_identical(layer.evaluate(dtype=dtype), expected)

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    def run(how):
        named, tensors, categories = layer.leaves(dtype)
        running = {name: how(t.clone()) for name, t in layer.running.items()}
        out = covariate_linear(
            categories=[how(c) for c in categories],
            n_cats=layer.n_cats,
            **{name: how(t) for name, t in tensors.items()},
            **running,
            **layer.options,
        )
        out.backward(layer.upstream)
        return out.detach(), {name: t.grad for name, t in named.items()}, running

    for how in (transposed, sliced):
        assert_same(run(how), expected, layer, tolerance / 10)
    if samples is None:
        x = layer.tensors["x"][:1].expand(23, 5)
        layer.tensors["x"] = x.contiguous()
        expected = layer.evaluate(dtype=dtype)
        layer.tensors["x"] = x
        assert_same(run(lambda t: t), expected, layer, tolerance / 10)


@pytest.mark.parametrize("activation", ["gelu", "silu", "leaky_relu"])
def test_inputs_are_not_changed(activation):
    layer = Layer(use_batch_norm=True, use_layer_norm=True, activation=activation)
    before = {name: t.clone() for name, t in layer.tensors.items()}
    out = covariate_linear(
        categories=layer.categories,
        n_cats=layer.n_cats,
        **layer.tensors,
        **layer.running,
        **layer.options,
    )
    out.fill_(7)
    for name, t in layer.tensors.items():
        assert torch.equal(t, before[name]), name


@either_mode
@every_size
@every_activation
@every_norm
def test_gradcheck(norm, activation, samples, training):
    layer = Layer(
        samples=samples,
        n=5,
        n_in=2,
        hidden=4,
        training=training,
        momentum=0.0,
        activation=activation,
        activation_parameter=ACTIVATIONS[activation],
        **norm,
    )
    named, tensors, categories = layer.leaves(torch.float64)

    def function(*_):
        return covariate_linear(
            categories=categories,
            n_cats=layer.n_cats,
            **tensors,
            **layer.running,
            **layer.options,
        )

    assert torch.autograd.gradcheck(function, tuple(named.values()), fast_mode=True)


@every_norm
def test_double_backward_is_refused(norm):
    layer = Layer(**norm)
    named, tensors, categories = layer.leaves(torch.float64)
    out = covariate_linear(
        categories=categories, n_cats=layer.n_cats, **tensors, **layer.running, **layer.options
    )
    (grad,) = torch.autograd.grad(out.sum(), named["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@either_mode
def test_half_precision(half, training):
    """Half-precision tensors are computed with in float32; their gradients are half again."""
    layer = Layer(
        dtype=half, use_batch_norm=True, use_layer_norm=True, training=training, activation="gelu"
    )
    named, tensors, categories = layer.leaves(half)
    running = {name: t.clone() for name, t in layer.running.items()}
    out = covariate_linear(
        categories=categories, n_cats=layer.n_cats, **tensors, **running, **layer.options
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), layer.truth()[0], rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(t.grad.dtype == half for t in named.values())
    assert all(t.dtype == half for t in running.values())


def test_mixed_dtypes():
    """Parameters of one dtype and data of another: float64 of x or the weight decides."""
    layer = Layer(dtype=torch.float32, use_batch_norm=True)
    named, tensors, categories = layer.leaves(torch.float32)
    tensors["x"] = named["x"].detach().double()
    out = covariate_linear(
        categories=categories, n_cats=layer.n_cats, **tensors, **layer.running, **layer.options
    )
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, Layer.truth(layer)[0], rtol=1e-12, atol=1e-12)


@every_norm
def test_autocast(norm):
    """Autocast changes nothing: the operation chooses its own precision, backward as forward."""
    layer = Layer(dtype=torch.float32, **norm)
    expected = layer.evaluate(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer.evaluate(dtype=torch.float32)
    assert_identical(got, expected)


# ---------------------------------------------------------------------------------------------
# torch.library and torch.compile


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("norm", "samples", "training", "activation"),
    [
        ("plain", None, True, "relu"),
        ("plain", 3, True, "identity"),
        ("plain", None, True, "gelu"),
        ("batch", None, True, "relu"),
        ("batch", 3, True, "elu"),
        ("batch", 3, False, "silu"),
        ("layer", 3, True, "identity"),
        ("both", 3, True, "relu"),
    ],
)
def test_opcheck(norm, samples, training, activation, layout):
    layer = Layer(samples=samples, training=training, **NORMS[norm])
    if layout == "transposed":
        layer.tensors = {
            name: t.transpose(0, -1).contiguous().transpose(0, -1)
            for name, t in layer.tensors.items()
        }
        layer.categories = [c.t().contiguous().t() for c in layer.categories]
    named = {name: t.detach().requires_grad_() for name, t in layer.tensors.items()}
    labels, one_hot, soft = layer.categories
    categories = [labels[:, 0], one_hot.double(), soft.detach().requires_grad_()]
    x = named["x"] if samples else named["x"][None]
    affine = [named.get("batch_norm_weight"), named.get("batch_norm_bias")]
    bn, ln = (NORMS[norm].get(f"use_{kind}_norm", False) for kind in ("batch", "layer"))
    static = (bn, bn and training, 1e-3, ln, 1e-5, activation, 1.0, "auto")
    ops = torch.ops.decoder_fast
    head = (x, named["weight"], named["bias"], categories, layer.n_cats, *affine)
    running = (layer.running.get("running_mean"), layer.running.get("running_var"))
    torch.library.opcheck(ops.covariate_linear.default, (*head, *running, *static))
    with torch.no_grad():
        out, *kept = ops.covariate_linear(*head, *running, *static)
        head = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in head)
        head[3][2] = soft.detach()
    wanted = [*(name for name in named), "categories.2"]
    torch.library.opcheck(
        ops.covariate_linear_backward.default,
        (torch.randn_like(out), out, *kept, *head, *static, " ".join(wanted)),
    )


@pytest.mark.parametrize(
    ("norm", "samples", "training", "activation"),
    [
        ("plain", None, True, "relu"),
        ("batch", 3, True, "relu"),
        ("batch", None, False, "gelu"),
        ("both", None, True, "identity"),
        ("layer", 3, True, "leaky_relu"),
    ],
)
def test_compile(norm, samples, training, activation, dynamo):
    """Compiled without a break, for the last, smaller mini-batch too: the same bits."""
    compiled = torch.compile(covariate_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        for n in (23, 22, 6):
            layer = Layer(
                samples=samples,
                n=n,
                training=training,
                activation=activation,
                dtype=torch.float32,
                **NORMS[norm],
            )
            expected = layer.evaluate(dtype=torch.float32)
            assert_identical(layer.evaluate(compiled, torch.float32), expected)


def test_compile_frozen_weight(dynamo):
    layer = Layer(use_batch_norm=True, dtype=torch.float32)
    wanted = ("x", "categories.2")
    compiled = torch.compile(covariate_linear, fullgraph=True, backend="aot_eager")
    assert_identical(
        layer.evaluate(compiled, torch.float32, wanted=wanted),
        layer.evaluate(dtype=torch.float32, wanted=wanted),
    )


# ---------------------------------------------------------------------------------------------
# Bad input


def meta(*shape):
    return torch.ones(*shape, device="meta")


def labels(*values):
    return {"categories": [torch.tensor(values)[:, None], torch.eye(3)[[0, 1, 2, 0]]]}


def second(category):
    return {"categories": [torch.zeros(4, 1).long(), category]}


BAD = {
    "x 1-D": (dict(x=torch.ones(5)), ValueError, ["x has", "(5,)", "(cells, n_in)"]),
    "x dtype": (dict(x=torch.ones(4, 5).int()), TypeError, ["x has", "int32"]),
    "x columns": (dict(x=torch.ones(4, 6)), ValueError, ["weight", "(7, 10)", "(7, 11)"]),
    "weight 1-D": (dict(weight=torch.ones(7)), ValueError, ["weight", "(7,)", "(hidden units"]),
    "weight scalar": (dict(weight=torch.tensor(1.0)), ValueError, ["weight", "()"]),
    "weight columns": (
        dict(weight=torch.ones(7, 9)),
        ValueError,
        ["weight", "(7, 9)", "(7, 10)", "5 columns for x", "5 for the categories"],
    ),
    "weight dtype": (dict(weight=torch.ones(7, 10).int()), TypeError, ["weight", "int32"]),
    "weight device": (dict(weight=meta(7, 10)), ValueError, ["weight", "'meta'", "'cpu'"]),
    "bias shape": (dict(bias=torch.ones(1)), ValueError, ["bias", "(1,)", "(7,)"]),
    "bias dtype": (dict(bias=torch.ones(7).int()), TypeError, ["bias", "int32"]),
    "bias device": (dict(bias=meta(7)), ValueError, ["bias", "'meta'"]),
    "too few n_cats": (dict(n_cats=[2]), ValueError, ["2 categories", "1 numbers"]),
    "label too large": (labels(0, 1, 2, 0), ValueError, ["category 0", "label 2", "2 categories"]),
    "label negative": (labels(0, 1, -3, 0), ValueError, ["category 0", "label -3", "0..1"]),
    "fewer labels": (labels(0, 1, 0), ValueError, ["category 0", "(3, 1)", "(4, 1)"]),
    "float labels": (
        second(torch.ones(4, 1)),
        TypeError,
        ["category 1", "float32", "(4, 1)", "(4, 3) one-hot"],
    ),
    "boolean labels": (second(torch.ones(4, 1).bool()), TypeError, ["category 1", "bool"]),
    "matrix too wide": (
        second(torch.ones(4, 4).int()),
        ValueError,
        ["category 1", "(4, 4)", "(4, 3)"],
    ),
    "matrix of fewer cells": (second(torch.ones(3, 3)), ValueError, ["category 1", "(3, 3)"]),
    "category device": (second(meta(4, 3)), ValueError, ["category 1", "'meta'", "'cpu'"]),
    "batch norm weight": (
        dict(batch_norm_weight=torch.ones(6)),
        ValueError,
        ["batch_norm_weight", "(6,)", "(7,)"],
    ),
    "batch norm bias": (
        dict(batch_norm_bias=torch.ones(1, 7)),
        ValueError,
        ["batch_norm_bias", "(1, 7)", "(7,)"],
    ),
    "batch norm dtype": (
        dict(batch_norm_bias=torch.ones(7).int()),
        TypeError,
        ["batch_norm_bias", "int32"],
    ),
    "numpy": (dict(x=np.ones((4, 5))), TypeError, ["x is a numpy.ndarray", "as_tensor(x)"]),
    "numpy bias": (dict(bias=np.ones(7)), TypeError, ["bias is a numpy.ndarray"]),
    "numpy labels": (
        dict(categories=[np.zeros(4, int), torch.eye(3)[[0, 1, 2, 0]]]),
        TypeError,
        ["category 0 is a numpy.ndarray"],
    ),
    "running mean": (dict(running_mean=torch.ones(8)), ValueError, ["running_mean", "(8,)"]),
    "running var": (dict(running_var=torch.ones(8)), ValueError, ["running_var", "(8,)"]),
    "running device": (dict(running_mean=meta(7)), ValueError, ["running_mean", "'meta'"]),
    "one cell": (
        dict(
            x=torch.ones(1, 5),
            categories=[torch.tensor([0]), torch.tensor([1])],
            training=True,
        ),
        ValueError,
        ["more than 1 value", "(1, 7)", "single cell"],
    ),
    "activation": (dict(activation="tanh"), ValueError, ["activation", "'tanh'", "'relu'"]),
    "backend": (dict(backend="cuda"), ValueError, ["'cuda'", "'auto'", "'torch'"]),
}


@pytest.mark.parametrize(("change", "kind", "parts"), BAD.values(), ids=BAD)
def test_bad_input(change, kind, parts):
    arguments = {
        "x": torch.ones(4, 5),
        "weight": torch.ones(7, 10),
        "bias": torch.ones(7),
        "categories": [torch.tensor([[0], [1], [0], [0]]), torch.eye(3)[[0, 1, 2, 0]]],
        "n_cats": [2, 3],
        "use_batch_norm": True,
        "batch_norm_weight": torch.ones(7),
        "batch_norm_bias": torch.zeros(7),
        "running_mean": torch.zeros(7),
        "running_var": torch.ones(7),
    }
    with pytest.raises(kind) as raised:
        covariate_linear(**(arguments | change))
    for part in parts:
        assert part in str(raised.value)


def test_backend_that_cannot_run(missing_backend):
    with pytest.raises(RuntimeError) as raised:
        Layer().evaluate(backend=missing_backend)
    reason = choose(OPERATION, device=torch.device("cpu")).reasons.get(missing_backend, "")
    for part in (repr(missing_backend), OPERATION, reason, "backend='auto'"):
        assert part in str(raised.value)
