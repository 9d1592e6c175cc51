"""softmax_library's Triton kernels: on a GPU, else in Triton's interpreter.

Tiles are made so small that rows, genes and hidden units exceed them everywhere with a remainder.
"""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import reference64
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference64 import assert_accurate, error
from torch.utils._python_dispatch import TorchDispatchMode

from decoder_fast.functional import softmax_library

OPERATION = "softmax_library"
ACTIVATIONS = ("softmax", "softplus")
ROUTES = ("whole", "long", "few")
#: Relative error of a product whose factors are rounded as the setting says, and sums of products.
PRODUCT_ERROR = {"highest": 1e-6, "high": 2e-3, "medium": 2e-2}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")


@pytest.fixture(autouse=True)
def kernels(monkeypatch, triton_device):
    """The kernels' module, its tiles small."""
    from decoder_fast.triton_kernels import softmax_library as module

    monkeypatch.setattr(module, "MAX_WHOLE", 40)
    monkeypatch.setattr(module, "_FEW_TILE", 64)
    monkeypatch.setattr(module, "_LONG", {"TILE": 64, "STAGES": 3, "num_warps": 2})
    monkeypatch.setattr(module, "_LONG_BACKWARD", {"TILE": 64, "STAGES": 3, "num_warps": 2})
    head = {"ROWS": 16, "GENES": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(module, "_HEAD", head)
    monkeypatch.setattr(module, "_PROGRAMS", 6)
    return module


@pytest.fixture
def take(monkeypatch, kernels):
    """Make rows of any length and number take one route."""

    def take(route):
        monkeypatch.setattr(kernels, "MAX_WHOLE", 10**9 if route == "whole" else 0)
        monkeypatch.setattr(kernels, "FEW_ROWS", 10**9 if route == "few" else 0)

    return take


@pytest.fixture
def precision(monkeypatch):
    """Set the precision of products for one test; in the interpreter, round as tensor cores do."""
    before = torch.get_float32_matmul_precision()
    if not torch.cuda.is_available():
        interpreter.round_products(monkeypatch)
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def sample(device, *shape, library=None, seed=0):
    """Logits, log library sizes, and an upstream gradient for each output, some of it zero."""
    generator = torch.Generator().manual_seed(seed)
    library = (*shape[:-1], 1) if library is None else library
    logits = 3 * torch.randn(shape, generator=generator)
    library = torch.randn(library, generator=generator) + 6
    upstream = [torch.randn(shape, generator=generator) * size for size in (1, 1e-3)]
    for u in upstream:
        u[u.abs() < 0.3 * u.abs().mean()] = 0
    return logits.to(device), library.to(device), [u.to(device) for u in upstream]


def evaluate(function, tensors, upstream, dtype=torch.float32, *arguments, **options):
    """Outputs, and the gradients of all tensors."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves, *arguments, **options)
    grads = torch.autograd.grad(outputs, leaves, [u.to(dtype) for u in upstream])
    return *outputs, *grads


def triton(*tensors, **options):
    return softmax_library(*tensors, backend="triton", **options)


NAMES = ("px_scale", "px_rate", "logits", "library")


def check(logits, library, upstream, scale_activation):
    """Outputs and gradients against the truth, and against plain torch in float32."""
    options = {"scale_activation": scale_activation}
    tensors = (logits, library)
    got = evaluate(triton, tensors, upstream, **options)
    plain = evaluate(softmax_library, tensors, upstream, backend="torch", **options)
    truth = evaluate(reference64.scale_and_rate, tensors, upstream, torch.float64, scale_activation)
    for name, value, right, other in zip(NAMES, got, truth, plain, strict=True):
        assert value.shape == right.shape
        assert_accurate(name, value, right, other, 1e-6)
    return got


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "library"),
    [((5, 190), (5, 1)), ((2, 3, 128), (2, 3, 1)), ((2, 3, 150), (3, 1)), ((4, 1), (1, 1))],
)
@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_accuracy(triton_device, take, route, scale_activation, shape, library):
    """Also: the same bits at every run, and a library's gradient of its own shape."""
    take(route)
    problem = sample(triton_device, *shape, library=library)
    first = check(*problem, scale_activation)
    again = evaluate(triton, problem[:2], problem[2], scale_activation=scale_activation)
    assert all(map(torch.equal, first, again))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(3, 20_001), (4, 2_000)])
@pytest.mark.parametrize("few_rows", [0, 512])
def test_tiles_as_shipped(triton_device, monkeypatch, shape, few_rows):
    monkeypatch.undo()
    from decoder_fast.triton_kernels import softmax_library as module

    monkeypatch.setattr(module, "FEW_ROWS", few_rows)
    check(*sample(triton_device, *shape), "softmax")


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 65), (3, 31), (0, 5), (2, 0, 70), (3, 0), (1, 1, 33), (2, 2, 97)]),
    few=st.booleans(),
    scale_activation=st.sampled_from(ACTIVATIONS),
    used=st.sampled_from([(1, 1), (1, 0), (0, 1), (-1, 1)]),
    seed=st.integers(0, 100),
)
def test_fuzz(triton_device, kernels, shape, few, scale_activation, used, seed):
    """About the widths of tiles, and without cells, samples or genes; zero and other gradients."""
    kernels.FEW_ROWS = 512 if few else 0
    logits, library, upstream = sample(triton_device, *shape, seed=seed)
    upstream = [sign * u for sign, u in zip(used, upstream, strict=True)]
    if shape[-1]:
        check(logits, library, upstream, scale_activation)
        return
    *outputs, d_logits, d_library = evaluate(
        triton, (logits, library), upstream, scale_activation=scale_activation
    )
    assert all(t.shape == logits.shape for t in (*outputs, d_logits))
    assert d_library.shape == library.shape and not d_library.any()


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_not_a_number_stays_in_its_row(triton_device, take, route, scale_activation):
    take(route)
    logits = torch.zeros(3, 150, device=triton_device)
    logits[1, 133] = torch.nan
    outputs = triton(logits, torch.ones_like(logits[:, :1]), scale_activation=scale_activation)
    for output in outputs:
        assert output[1, 133].isnan()
        assert output[1].isnan().all() == (scale_activation == "softmax")
        assert output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_extremes(triton_device, take, route, scale_activation):
    """Huge, equal and infinite logits, empty cells, the largest library sizes: as their limits."""
    take(route)
    logits = torch.full((6, 70), -1e4)
    logits[0, :2] = torch.tensor([1e4, 0.0])
    logits[1] = 7
    logits[3, 60:] = torch.linspace(80, 200, 10)
    logits[4] = torch.arange(70) * 1.25 - 57.5  # exact differences
    logits[5, :69] = -torch.inf
    library = torch.tensor([[3.0], [3.0], [-torch.inf], [-40.0], [88.6], [-95.0]])
    leaves = [t.to(triton_device).requires_grad_() for t in (logits, library)]
    scale, rate = triton(*leaves, scale_activation=scale_activation)
    truth = reference64.scale_and_rate(logits.double(), library.double(), scale_activation)
    for got, right in zip((scale, rate), truth, strict=True):
        right = right.float()  # where that overflows, so may the result
        # an exponential loses a rounding of float32 for each unit of its argument, here up to 90
        torch.testing.assert_close(got.cpu(), right, rtol=1e-5, atol=1e-38)
    assert (rate[2] == 0).all()
    if scale_activation == "softmax":
        torch.testing.assert_close(scale[1].cpu(), torch.full((70,), 1 / 70))
    loss = scale[:4].sum() + rate[:4].square().sum()
    assert all(g[:4].isfinite().all() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("used", [0, 1])
def test_subsets(triton_device, take, used, route, scale_activation):
    """One output's gradient alone, wanted by one input alone."""
    take(route)
    logits, library, upstream = sample(triton_device, 3, 150)
    zeroed = [u if k == used else torch.zeros_like(u) for k, u in enumerate(upstream)]
    *_, d_logits, d_library = evaluate(
        triton, (logits, library), zeroed, scale_activation=scale_activation
    )
    for wanted, expected in ((0, d_logits), (1, d_library)):
        leaves = [logits.clone(), library.clone()]
        leaves[wanted].requires_grad_()
        triton(*leaves, scale_activation=scale_activation)[used].backward(upstream[used])
        torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-6, atol=1e-8)
        assert leaves[1 - wanted].grad is None


@pytest.mark.parametrize("route", ROUTES)
def test_memory_layout_does_not_matter(triton_device, take, route):
    """Upstream gradients and inputs that are expanded, transposed or sliced."""
    take(route)
    logits, library, (upstream, _) = sample(triton_device, 2, 2, 67)
    library = library[:1, :1]
    laid_out = {
        "one number": upstream[:1, :1, :1].expand(2, 2, 67),
        "by gene": upstream[:1, :1].expand(2, 2, 67),
        "by cell": upstream[:1, :, :1].expand(2, 2, 67),
        "transposed": upstream.transpose(0, 2).contiguous().transpose(0, 2),
        "samples last": upstream.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.cat([upstream[..., :1], upstream], 2)[..., 1:],
        "every other": torch.repeat_interleave(upstream, 2, 2)[..., ::2],
    }
    for how, u in laid_out.items():
        expected = evaluate(triton, (logits, library), (u.contiguous(), u.contiguous()))
        inputs = (torch.cat([logits, logits], 2)[..., :67], library.expand(2, 2, 1))
        *outputs, d_logits, d_library = evaluate(triton, inputs, (u, u))
        got = *outputs, d_logits, d_library.sum_to_size(library.shape)
        for name, value, right in zip(NAMES, got, expected, strict=True):
            torch.testing.assert_close(
                value,
                right,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m: f"{how}, {name}: {m}",  # noqa: B023
            )


def test_outputs_are_separate_and_writable(triton_device):
    logits, library, upstream = sample(triton_device, 3, 150)
    scale, rate = triton(logits, library)
    before = rate.clone()
    scale *= 0
    assert torch.equal(rate, before)
    *_, expected, _ = evaluate(triton, (logits, library), (torch.zeros_like(logits), upstream[1]))
    leaf = logits.clone().requires_grad_()
    _, rate = triton(leaf, library)
    rate *= 2
    rate.backward(upstream[1] / 2)
    torch.testing.assert_close(leaf.grad, expected)


# From hidden units


def head(device, *lead, genes=53, hidden=20, seed=0):
    """Hidden units, log library sizes, weight and bias, and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    _, library, upstream = sample(device, *lead, genes, seed=seed)
    tensors = [
        torch.randn(*lead, hidden, generator=generator),
        torch.randn(genes, hidden, generator=generator) * (3 / hidden**0.5),
        torch.randn(genes, generator=generator),
    ]
    units, weight, bias = (t.to(device) for t in tensors)
    return (units, library, weight, bias), upstream


HEAD_NAMES = ("px_scale", "px_rate", "hidden", "library", "weight", "bias")


def from_hidden(function):
    def run(hidden, library, weight, bias=None, **options):
        return function(hidden, library, weight=weight, bias=bias, **options)

    return run


def rounded(tensor, setting):
    """As tensor cores take a factor of a product."""
    if setting == "highest":
        return tensor
    to = {"high": interpreter.round_to_tf32, "medium": interpreter.round_to_bf16}[setting]
    return torch.from_numpy(np.asarray(to(tensor.cpu().numpy()))).to(tensor.device)


def head_truth(tensors, upstream, scale_activation, setting):
    """Outputs and gradients in float64, logits from factors rounded as the setting says."""
    hidden, library, weight, *bias = tensors
    factors = [rounded(t, setting).double().flatten(0, -2) for t in (hidden, weight)]
    logits = (factors[0] @ factors[1].t()).view(*hidden.shape[:-1], weight.shape[0])
    logits = logits + bias[0].double() if bias else logits
    *outputs, d_logits, d_library = evaluate(
        reference64.scale_and_rate, (logits, library), upstream, torch.float64, scale_activation
    )
    flat = d_logits.flatten(0, -2)
    grads = [
        (d_logits @ weight.double()),
        d_library,
        flat.t() @ hidden.double().flatten(0, -2),
        *([flat.sum(0)] if bias else []),
    ]
    return *outputs, *grads


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("lead", "hidden", "with_bias", "scale_activation"),
    [
        ((19,), 20, True, "softmax"),
        ((19,), 32, False, "softplus"),
        ((2, 11), 37, True, "softmax"),
        ((1,), 7, True, "softmax"),
        ((3,), 130, True, "softmax"),
        ((3, 2), 5, False, "softplus"),
    ],
)
@pytest.mark.parametrize("setting", PRODUCT_ERROR)
def test_from_hidden(triton_device, precision, setting, lead, hidden, with_bias, scale_activation):
    """Outputs as exact as their rounded factors allow, and gradients of all inputs."""
    tensors, upstream = head(triton_device, *lead, hidden=hidden)
    tensors = tensors if with_bias else tensors[:3]
    precision(setting)
    options = {"scale_activation": scale_activation}
    got = evaluate(from_hidden(triton), tensors, upstream, **options)
    again = evaluate(from_hidden(triton), tensors, upstream, **options)
    assert all(map(torch.equal, got, again))
    if triton_device.type == "cuda" or hidden > 128:
        # the vendor's products, and how a GPU rounds to tf32, are not this project's to say
        truth = head_truth(tensors, upstream, scale_activation, "highest")
        limit = 3 * PRODUCT_ERROR[setting]
    else:
        truth = head_truth(tensors, upstream, scale_activation, setting)
        limit = 2e-6
    for name, value, right in zip(HEAD_NAMES, got, truth, strict=False):
        assert value.shape == right.shape
        assert error(value, right) <= limit, (name, error(value, right))


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_from_hidden_no_worse_than_torch(triton_device, precision, setting):
    """In strict float32 within twice plain torch's error; the interpreter's tf32 is as exact."""
    tensors, upstream = head(triton_device, 19, genes=101, hidden=64)
    tensors = [rounded(t, "high") for t in tensors]  # then tf32 products are exact
    truth = head_truth(tensors, upstream, "softmax", "highest")
    plain = evaluate(from_hidden(softmax_library), tensors, upstream, backend="torch")
    precision(setting)
    got = evaluate(from_hidden(triton), tensors, upstream)
    names = HEAD_NAMES if setting == "highest" or triton_device.type == "cpu" else HEAD_NAMES[:2]
    for name, value, right, other in zip(names, got, truth, plain, strict=False):
        assert_accurate(name, value, right, other, 5e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_from_hidden_subsets(triton_device, precision, setting, wanted):
    precision(setting)
    tensors, upstream = head(triton_device, 5)
    expected = evaluate(from_hidden(triton), tensors, upstream)[2:]
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    outputs = from_hidden(triton)(*leaves)
    torch.autograd.backward(outputs, upstream)
    for k, (leaf, grad) in enumerate(zip(leaves, expected, strict=True)):
        assert torch.equal(leaf.grad, grad) if k in wanted else leaf.grad is None


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_from_hidden_memory_layout(triton_device, precision, setting):
    """Hidden units of some of the cells, a transposed weight, one library size for all."""
    precision(setting)
    (hidden, library, weight, bias), upstream = head(triton_device, 2, 9)
    whole = torch.cat([hidden, hidden], 1)
    expected = evaluate(from_hidden(triton), (hidden, library[:1, :1], weight, bias), upstream)
    with torch.no_grad():
        got = triton(
            whole[:, :9],
            library[:1, :1].expand(2, 9, 1),
            weight=weight.t().contiguous().t(),
            bias=torch.stack([bias, bias], 1)[:, 0],
        )
    for value, right in zip(got, expected, strict=False):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 53, 20), (3, 0, 20), (3, 53, 0)])
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_from_hidden_of_nothing(triton_device, precision, setting, shape):
    """No cells, no genes, no hidden units: the bias alone is left of the logits."""
    precision(setting)
    n, genes, hidden = shape
    tensors, upstream = head(triton_device, n, genes=genes, hidden=max(1, hidden))
    tensors = [tensors[0][:, :hidden], tensors[1], tensors[2][:, :hidden], tensors[3]]
    got = evaluate(from_hidden(triton), tensors, upstream)
    truth = evaluate(from_hidden(softmax_library), tensors, upstream, backend="torch")
    for value, right in zip(got, truth, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


class Made(TorchDispatchMode):
    """Remembers the memory of at least so many numbers that operations make."""

    def __init__(self, numel, *inputs):
        super().__init__()
        self.numel = numel
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.large = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("set_", "copy_"):  # the interpreter's own copies
            return out
        for t in out if isinstance(out, (tuple, list)) else (out,):
            memory = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if memory is not None and memory.nbytes() >= 4 * self.numel:
                if memory.data_ptr() not in self.inputs:
                    self.large[memory.data_ptr()] = memory  # kept, lest its place be taken
        return out


@pytest.mark.parametrize("scale_activation", ACTIVATIONS)
@pytest.mark.parametrize(("setting", "hidden"), [("highest", 20), ("high", 20), ("high", 130)])
def test_logits_have_no_memory_of_their_own(
    triton_device, precision, setting, hidden, scale_activation
):
    """The forward pass makes the two outputs, the backward pass one gradient of that size."""
    precision(setting)
    n, genes = 19, 151
    tensors, upstream = head(triton_device, n, genes=genes, hidden=hidden)
    wanted = [tensors[k].requires_grad_() for k in (0, 1, 3)]  # the weight may be as large
    with Made(n * genes, *tensors) as forward:
        outputs = from_hidden(triton)(*tensors, scale_activation=scale_activation)
    assert len(forward.large) == 2
    with Made(n * genes, *tensors, *outputs, *upstream) as backward:
        torch.autograd.grad(outputs, wanted, upstream)
    assert len(backward.large) == 1


def test_products_by_setting(kernels, precision):
    """Tensor cores, and a hidden layer that fits a tile, or the vendor's library."""
    fused = {}
    for setting in PRODUCT_ERROR:
        precision(setting)
        fused[setting] = [kernels.is_fused(n) for n in (1, 128, 129)]
    assert fused["highest"] == [False] * 3
    assert fused["medium"] == [True, True, False]


@pytest.mark.parametrize(
    ("rows", "genes", "forward", "backward"),
    [
        (128, 2_000, ["_whole_rows"], ["_whole_rows_backward"]),
        (1_024, 8_000, ["_whole_rows"], ["_whole_rows_backward"]),
        (4_096, 62_710, ["_long_rows"], ["_long_rows_backward"]),
        (
            128,
            115_554,
            ["_tile_statistics", "_combine", "_tiles"],
            ["_tile_sums", "_tiles_backward"],
        ),
    ],
)
def test_routes_of_real_shapes(monkeypatch, rows, genes, forward, backward):
    """What would be launched: it fills 132 multiprocessors as far as there are rows."""
    monkeypatch.undo()
    from decoder_fast.triton_kernels import softmax_library as module

    launched = []

    def record(kernel, grid, *args, **options):
        launched.append((kernel.fn.__name__, grid))

    monkeypatch.setattr(module, "launch", record)
    logits = torch.empty(rows, genes, device="meta")
    library = torch.empty(rows, 1, device="meta")
    scale, _ = module.forward(logits, library, "softmax")
    assert [name for name, _ in launched] == forward
    assert launched[0][1][0] == rows
    launched.clear()
    d_logits, d_library = module.backward(logits, logits, scale, library, "softmax", True, True)
    assert [name for name, _ in launched] == backward
    assert d_logits.shape == logits.shape and d_library.shape == library.shape


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_compile_and_opcheck(triton_device, precision, dynamo, setting):
    """torch.compile without a break, within a function, from logits and from hidden units."""
    precision(setting)
    tensors, upstream = head(triton_device, 5)
    compiled = torch.compile(
        lambda *leaves: [2 * t for t in from_hidden(triton)(*leaves)],
        fullgraph=True,
        backend="aot_eager" if triton_device.type == "cpu" else "inductor",
    )
    expected = evaluate(from_hidden(triton), tensors, [2 * u for u in upstream])
    got = evaluate(compiled, tensors, upstream)
    for value, right, factor in zip(got, expected, (2, 2, 1, 1, 1, 1), strict=True):
        torch.testing.assert_close(value, factor * right, rtol=1e-6, atol=1e-7)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.decoder_fast.softmax_library.default, (*leaves, "softmax", "triton")
    )


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_autocast(triton_device, precision, setting):
    precision(setting)
    tensors, upstream = head(triton_device, 5)
    expected = evaluate(from_hidden(triton), tensors, upstream)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        got = evaluate(from_hidden(triton), tensors, upstream)
    for value, right in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, right)


@on_gpu
@pytest.mark.parametrize("setting", ["highest", "high"])
@pytest.mark.parametrize("route", ROUTES)
def test_cuda_graph(triton_device, take, precision, route, setting):
    """Forward and backward captured, and replayed on other values."""
    take(route)
    precision(setting)
    tensors, upstream = head(triton_device, 19)
    leaves = [t.clone().requires_grad_() for t in tensors]

    def step():
        outputs = from_hidden(triton)(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others, _ = head(triton_device, 19, seed=1)
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    expected = evaluate(from_hidden(triton), others, upstream)
    for value, right in zip(captured, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-7)


@on_gpu
def test_other_stream(triton_device, precision):
    """Ordered with the work of the stream that is current, not of the default one."""
    precision("high")
    tensors, upstream = head(triton_device, 19)
    expected = evaluate(from_hidden(triton), tensors, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        later = [t.clone() for t in tensors]
        got = evaluate(from_hidden(triton), later, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device(triton_device, precision):
    precision("high")
    tensors, upstream = head(triton_device, 19)
    expected = evaluate(from_hidden(triton), tensors, upstream)
    there = torch.device("cuda", 1)
    got = evaluate(
        from_hidden(triton), [t.to(there) for t in tensors], [u.to(there) for u in upstream]
    )
    for value, right in zip(got, expected, strict=True):
        assert value.device == there
        torch.testing.assert_close(value.to(right.device), right, rtol=1e-5, atol=1e-6)
