"""The modules against scvi-tools' own: what a drop-in must keep."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from decoder_fast import DecoderSCVI, FCLayers
from decoder_fast import nn as fast_nn

scvi_nn = pytest.importorskip("scvi.nn", reason="scvi-tools is the reference of the modules")

N, S, G, L = 37, 3, 83, 7
N_CATS = [5, 1, 3]
KWARGS = {"n_input": L, "n_output": G, "n_cat_list": N_CATS, "n_hidden": 19}


def pair(seed=0, use_fused=True, **kwargs):
    """Stock decoder and ours, from one seed."""
    options = KWARGS | kwargs
    torch.manual_seed(seed)
    stock = scvi_nn.DecoderSCVI(**options)
    torch.manual_seed(seed)
    ours = DecoderSCVI(**options, use_fused=use_fused)
    return stock, ours


def inputs(three_d=False, soft=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(*((S, N, L) if three_d else (N, L)), generator=g)
    library = torch.randn(N, 1, generator=g) + 3
    first = torch.randint(0, 5, (N, 1), generator=g)
    last = torch.randint(0, 3, (N, 1), generator=g)
    if soft:
        first = nn.functional.one_hot(first[:, 0], 5)
        last = torch.softmax(torch.randn(N, 3, generator=g), -1)
    return z, library, (first, torch.zeros(N, 1, dtype=torch.long), last)


def run(module, z, library, cats, dispersion="gene-cell", seed=3):
    """Outputs, and the gradients of a random projection of them."""
    z = z.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(dispersion, z, library, *cats)
    g = torch.Generator().manual_seed(seed)
    present = [t for t in out if t is not None]
    loss = sum((t * torch.randn(t.shape, generator=g).to(t.dtype)).sum() for t in present)
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return out, grads | {"z": z.grad}


def assert_same(stock, ours, scale=1.0):
    """Equal to rounding, relative to the largest element or to ``scale`` if that is larger."""
    assert (stock is None) == (ours is None)
    if stock is not None:
        assert stock.shape == ours.shape and stock.dtype == ours.dtype
        scale = max(stock.abs().max().item(), scale) if stock.numel() else 1.0
        unit = 1e-12 if stock.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours, stock, rtol=0, atol=unit * scale)


GRID = list(
    itertools.product((False, True), (False, True), (False, True), ("softmax", "softplus"), (1, 2))
)


@pytest.mark.parametrize("use_fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("three_d", [False, True], ids=["2d", "3d"])
@pytest.mark.parametrize(("batch_norm", "layer_norm", "inject", "activation", "layers"), GRID)
def test_outputs_gradients_and_buffers(
    batch_norm, layer_norm, inject, activation, layers, three_d, use_fused
):
    stock, ours = pair(
        use_fused=use_fused,
        use_batch_norm=batch_norm,
        use_layer_norm=layer_norm,
        inject_covariates=inject,
        scale_activation=activation,
        n_layers=layers,
    )
    stock, ours = stock.double(), ours.double()  # an error of the algebra cannot hide in float32
    for soft, training in itertools.product((False, True), (True, False)):
        z, library, cats = inputs(three_d, soft)
        z, library = z.double(), library.double()
        cats = tuple(c.double() if c.is_floating_point() else c for c in cats)
        results = [run(m.train(training), z, library, cats) for m in (stock, ours)]
        (stock_out, stock_grads), (out, grads) = results
        for a, b in zip(stock_out, out, strict=True):
            assert_same(a, b)
        assert stock_grads.keys() == grads.keys()
        largest = max(g.abs().max().item() for g in stock_grads.values())
        for name, grad in stock_grads.items():
            # One that is zero by algebra (a bias before batch norm) is the others' rounding.
            assert_same(grad, grads[name], largest)
        # The running statistics: one move for each sample of a 3-D input.
        for (name, a), (_, b) in zip(stock.named_buffers(), ours.named_buffers(), strict=True):
            if a.is_floating_point():
                assert_same(a, b)
            else:
                assert torch.equal(a, b), name


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_cont": 2},
        {"bias": False},
        {"use_activation": False},
        {"activation_fn": nn.LeakyReLU},
        {"activation_fn": nn.ELU},
        {"activation_fn": nn.GELU},
        {"activation_fn": nn.SiLU},
        {"activation_fn": nn.Softsign},  # one that the operation does not know
        {"dropout_rate": 0.0},
        {"n_layers": 3, "inject_covariates": False},
        {"n_cat_list": None},
        {"n_cat_list": (1, 1)},
    ],
    ids=str,
)
def test_fclayers_arguments(kwargs, use_fused):
    options = {"n_in": L, "n_out": 11, "n_cat_list": N_CATS, "n_layers": 2, "n_hidden": 13}
    options |= {"use_layer_norm": True, "dropout_rate": 0.0} | kwargs
    torch.manual_seed(0)
    stock = scvi_nn.FCLayers(**options)
    torch.manual_seed(0)
    ours = FCLayers(**options, use_fused=use_fused).double()
    stock.double()
    assert list(stock.state_dict()) == list(ours.state_dict())
    _, _, cats = inputs()
    cont = torch.randn(N, 2).double() if "n_cont" in kwargs else None
    for x in (torch.randn(N, L).double(), torch.randn(S, N, L).double()):
        a, b = stock(x, *cats, cont=cont), ours(x, *cats, cont=cont)
        assert_same(a, b)
        probe = torch.randn_like(a)
        for module, out in ((stock, a), (ours, b)):
            module.zero_grad()
            (out * probe).sum().backward()
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            assert_same(p.grad, q.grad)


def test_dropout_of_hidden_layers_draws_the_same_numbers():
    options = {"n_in": L, "n_out": 11, "n_cat_list": N_CATS, "dropout_rate": 0.4}
    torch.manual_seed(0)
    stock = scvi_nn.FCLayers(**options)
    torch.manual_seed(0)
    ours = FCLayers(**options)
    z, _, cats = inputs()
    torch.manual_seed(7)
    a = stock(z, *cats)
    torch.manual_seed(7)
    assert_same(a, ours(z, *cats))


def test_same_seed_same_weights_same_keys():
    stock, ours = pair(use_batch_norm=True, use_layer_norm=True, n_layers=2)
    a, b = stock.state_dict(), ours.state_dict()
    assert list(a) == list(b)
    assert "px_decoder.fc_layers.Layer 0.1.running_mean" in b
    assert all(torch.equal(a[k], b[k]) for k in a)
    # Both ways, through torch.save too.
    for source, target in ((stock, DecoderSCVI), (ours, scvi_nn.DecoderSCVI)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        other = target(**KWARGS, use_batch_norm=True, use_layer_norm=True, n_layers=2)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in source.state_dict().items())


def test_copies_and_pickles():
    _, ours = pair(use_batch_norm=True)
    z, library, cats = inputs()
    ours.eval()
    expected = ours("gene", z, library, *cats)[2]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other("gene", z, library, *cats)[2], expected)


@pytest.mark.parametrize("dispersion", fast_nn.DISPERSIONS)
def test_tuple(dispersion):
    stock, ours = pair()
    z, library, cats = inputs()
    out = ours(dispersion, z, library, *cats)
    assert (out[1] is None) == (dispersion != "gene-cell")
    for a, b in zip(stock(dispersion, z, library, *cats), out, strict=True):
        assert_same(a, b)
    scale, _, rate, _ = out
    assert scale.data_ptr() != rate.data_ptr()
    with torch.no_grad():  # get_normalized_expression scales px_scale in place
        before = rate.clone()
        scale *= 2
        assert torch.equal(rate, before)


@pytest.mark.parametrize(
    ("shape", "three_d"),
    [((N, 1), False), ((1, 1), False), ((S, N, 1), True), ((N, 1), True), ((1, 1), True)],
)
def test_library_shapes(shape, three_d):
    stock, ours = pair()
    z, _, cats = inputs(three_d)
    library = torch.randn(shape)
    assert_same(stock("gene", z, library, *cats)[2], ours("gene", z, library, *cats)[2])


def test_trailing_and_ignored_covariates():
    stock, ours = pair()
    z, library, (first, _, last) = inputs()
    expected = stock("gene", z, library, first, None, last)[2]
    for extra in ((), (None,), (torch.full((N, 1), 99),)):
        assert_same(expected, ours("gene", z, library, first, None, last, *extra)[2])


def test_labels_of_other_integer_dtypes():
    _, ours = pair()
    z, library, cats = inputs()
    expected = ours("gene", z, library, *cats)[2]
    small = [c.to(torch.int32) for c in cats]
    assert torch.equal(ours("gene", z, library, *small)[2], expected)


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda z, lib, c: (z, lib, (c[0], c[1])), ValueError, ["got 2", "3"]),
        (lambda z, lib, c: (z, lib, (None, c[1], c[2])), ValueError, ["covariate 0", "5 cat"]),
        (lambda z, lib, c: (z, lib, (c[0] + 3, *c[1:])), ValueError, ["category 0", "5 c", "0..4"]),
        (lambda z, lib, c: (z, lib, (c[0] - 9, *c[1:])), ValueError, ["category 0", "-9", "5 cat"]),
        (lambda z, lib, c: (z, lib, (c[0].float(), *c[1:])), TypeError, ["float32", "category 0"]),
    ],
    ids=["too few", "None", "too large", "negative", "float labels"],
)
def test_bad_covariates(change, error, words, use_fused):
    _, ours = pair(use_fused=use_fused)
    z, library, cats = inputs()
    cats = (cats[0].clamp(0, 3), *cats[1:])
    cats[0][0] = 0
    cats[0][1] = 4
    with pytest.raises(error) as caught:
        ours("gene", *change(z, library, cats)[:2], *change(z, library, cats)[2])
    for word in words:
        assert word in str(caught.value)


def test_wrong_number_of_covariate_rows():
    _, ours = pair()
    z, library, cats = inputs()
    with pytest.raises(ValueError, match=r"category 0 has shape \(5, 1\)"):
        ours("gene", z, library, cats[0][:5], *cats[1:])


def test_unknown_options():
    with pytest.raises(ValueError, match=r"scale_activation='relu'.*softmax"):
        DecoderSCVI(L, G, scale_activation="relu")
    with pytest.raises(TypeError, match="dropout_rate"):
        DecoderSCVI(L, G, dropout_rate=0.1)
    with pytest.raises(TypeError):
        DecoderSCVI(L, G, None, 1, 128, True, False, False, "softmax", True)  # by position
    _, ours = pair()
    z, library, cats = inputs()
    with pytest.raises(ValueError, match=r"dispersion='genes'.*'gene-batch'"):
        ours("genes", z, library, *cats)
    x = torch.ones(N, G)
    px_r = torch.zeros(G)
    with pytest.raises(ValueError, match=r"likelihood='negbin'.*'zinb'"):
        ours.reconstruction_loss(x, z, library, *cats, likelihood="negbin", px_r=px_r)
    with pytest.raises(ValueError, match=r"dispersion='gene' needs px_r"):
        ours.reconstruction_loss(x, z, library, *cats)
    with pytest.raises(ValueError, match=r"gene-cell.*must be None"):
        ours.reconstruction_loss(x, z, library, *cats, dispersion="gene-cell", px_r=px_r)
    with pytest.raises(ValueError, match=r"gene-batch.*needs px_r_index"):
        ours.reconstruction_loss(x, z, library, *cats, dispersion="gene-batch", px_r=px_r)
    with pytest.raises(ValueError, match=r"'gene' has one px_r"):
        ours.reconstruction_loss(
            x, z, library, *cats, px_r=px_r, px_r_index=torch.zeros(N, dtype=torch.long)
        )


@pytest.mark.parametrize("use_fused", [True, False])
def test_batch_norm_refuses_a_single_cell(use_fused):
    stock, ours = pair(use_fused=use_fused, use_batch_norm=True)
    z, library, cats = inputs()
    one = (z[:1], library[:1], *(c[:1] for c in cats))
    for module in (stock, ours):
        with pytest.raises(ValueError, match="more than 1 value"):
            module("gene", *one)
        module.eval()
    assert_same(stock("gene", *one)[2], ours("gene", *one)[2])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_no_cells(batch_norm):
    stock, ours = pair(use_batch_norm=batch_norm)
    z, library, cats = inputs()
    none = (z[:0], library[:0], *(c[:0] for c in cats))
    stock.eval()
    for a, b in zip(stock("gene-cell", *none), ours.eval()("gene-cell", *none), strict=True):
        assert a.shape == b.shape == (0, G)
    loss = ours.reconstruction_loss(torch.ones(0, G), *none, px_r=torch.zeros(G))
    assert loss.shape == (0,)
    loss.sum().backward()


# --- reconstruction_loss -------------------------------------------------------------------------


def stock_loss(stock, x, z, library, cats, likelihood, dispersion, px_r, index):
    """The loss as scvi-tools' VAE computes it."""
    from scvi.distributions import (
        NegativeBinomial,
        Normal,
        Poisson,
        ZeroInflatedNegativeBinomial,
    )

    scale, r, rate, dropout = stock(dispersion, z, library, *cats)
    if dispersion in ("gene-batch", "gene-label"):
        one_hot = nn.functional.one_hot(index, px_r.shape[1])
        r = nn.functional.linear(one_hot.to(px_r.dtype), px_r)
    elif dispersion == "gene":
        r = px_r
    theta = None if r is None else torch.exp(r)
    px = {
        "zinb": lambda: ZeroInflatedNegativeBinomial(
            mu=rate, theta=theta, zi_logits=dropout, scale=scale
        ),
        "nb": lambda: NegativeBinomial(mu=rate, theta=theta, scale=scale),
        "poisson": lambda: Poisson(rate=rate, scale=scale),
        "normal": lambda: Normal(rate, theta, normal_mu=scale),
    }[likelihood]()
    return -px.log_prob(x).sum(-1)


def counts(seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.rand(N, G, generator=g) * 2, generator=g) * (
        torch.rand(N, G, generator=g) < 0.2
    )


def dispersion_arguments(dispersion):
    g = torch.Generator().manual_seed(9)
    index = torch.randint(0, 4, (N,), generator=g)
    if dispersion == "gene-cell":
        return {}
    if dispersion == "gene":
        return {"px_r": torch.randn(G, generator=g).double().requires_grad_()}
    px_r = torch.randn(G, 4, generator=g).double().requires_grad_()
    return {"px_r": px_r, "px_r_index": index}


@pytest.mark.parametrize("use_fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("three_d", [False, True], ids=["2d", "3d"])
@pytest.mark.parametrize("activation", ["softmax", "softplus"])
@pytest.mark.parametrize("dispersion", fast_nn.DISPERSIONS)
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_reconstruction_loss(likelihood, dispersion, activation, three_d, use_fused):
    stock, ours = pair(use_fused=use_fused, use_batch_norm=True, scale_activation=activation)
    stock, ours = stock.double(), ours.double()
    z, library, cats = inputs(three_d)
    z, library = z.double(), library.double()
    x = counts().double()
    arguments = dispersion_arguments(dispersion)
    results = []
    for module in (stock, ours):
        module.zero_grad(set_to_none=True)
        px_r = arguments.get("px_r")
        if px_r is not None:
            px_r.grad = None
        if module is stock:
            index = arguments.get("px_r_index")
            loss = stock_loss(stock, x, z, library, cats, likelihood, dispersion, px_r, index)
        else:
            given = {} if likelihood == "poisson" else arguments
            loss = ours.reconstruction_loss(
                x, z, library, *cats, likelihood=likelihood, dispersion=dispersion, **given
            )
        weight = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2)).double()
        (loss * weight).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((loss.detach(), grads, None if px_r is None else px_r.grad))
    assert_same(results[0][0], results[1][0])
    largest = max(g.abs().max().item() for g in results[0][1].values() if g is not None)
    for name, grad in results[0][1].items():
        assert_same(grad, results[1][1][name], largest)
    if likelihood != "poisson":
        assert_same(results[0][2], results[1][2])


def test_unused_heads_have_no_gradient():
    """Zeros instead of None would let Adam's weight decay move them."""
    _, ours = pair()
    z, library, cats = inputs()
    px_r = torch.zeros(G, requires_grad=True)
    before = ours.px_r_decoder.weight.detach().clone()
    optimizer = torch.optim.Adam([*ours.parameters(), px_r], weight_decay=0.1)
    loss = ours.reconstruction_loss(counts(), z, library, *cats, likelihood="nb", px_r=px_r)
    loss.mean().backward()
    assert ours.px_dropout_decoder.weight.grad is None
    assert ours.px_r_decoder.weight.grad is None and ours.px_r_decoder.bias.grad is None
    assert ours.px_scale_decoder[0].weight.grad is not None
    optimizer.step()
    assert torch.equal(before, ours.px_r_decoder.weight)


def test_frozen_parameters_and_hooks():
    stock, ours = pair(use_batch_norm=True, n_layers=2)
    z, library, cats = inputs()
    x, px_r = counts(), torch.zeros(G)
    seen = []
    for module in (stock, ours):
        for head in (module.px_scale_decoder, module.px_dropout_decoder, module.px_r_decoder):
            head.requires_grad_(False)
        module.px_decoder.set_online_update_hooks()
        module.px_decoder.fc_layers[0][0].weight.register_hook(lambda g: seen.append(g.shape))
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.momentum = 0  # as surgery sets it after construction
    stock_loss(stock, x, z, library, cats, "zinb", "gene", px_r, None).mean().backward()
    ours.reconstruction_loss(x, z, library, *cats, px_r=px_r).mean().backward()
    assert len(seen) == 2
    for (name, p), (_, q) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert_same(p.grad, q.grad)
        if "Layer" in name and name.endswith(".0.weight"):
            assert q.grad[:, :-8].abs().max() == 0 and q.grad[:, -8:].abs().max() > 0
    assert ours.px_decoder.fc_layers[0][1].running_mean.abs().max() == 0


def test_parameters_are_read_at_the_call():
    """PoissonVI replaces the scale head's bias; packed copies of weights would go stale."""
    stock, ours = pair()
    z, library, cats = inputs()
    x, px_r = counts(), torch.zeros(G)
    first = ours.reconstruction_loss(x, z, library, *cats, px_r=px_r)
    bias = torch.randn(G)
    for module in (stock, ours):
        module.px_scale_decoder[-2].bias = nn.Parameter(bias.clone())
    second = ours.reconstruction_loss(x, z, library, *cats, px_r=px_r)
    assert not torch.allclose(first, second)
    assert_same(stock_loss(stock, x, z, library, cats, "zinb", "gene", px_r, None), second)


def test_loss_is_fresh_and_may_be_changed_in_place():
    _, ours = pair()
    z, library, cats = inputs()
    px_r = torch.zeros(G, requires_grad=True)
    loss = ours.reconstruction_loss(counts(), z, library, *cats, px_r=px_r)
    loss += 1
    loss.mean().backward()
    assert px_r.grad is not None


def test_double_backward_is_refused():
    _, ours = pair()
    z, library, cats = inputs()
    z.requires_grad_()
    loss = ours.reconstruction_loss(counts(), z, library, *cats, px_r=torch.zeros(G)).sum()
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_inference_mode_and_no_grad():
    _, ours = pair(use_batch_norm=True)
    ours.eval()
    z, library, cats = inputs()
    px_r = torch.zeros(G)
    expected = ours.reconstruction_loss(counts(), z, library, *cats, px_r=px_r).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = ours.reconstruction_loss(counts(), z, library, *cats, px_r=px_r)
            assert not loss.requires_grad
            assert torch.equal(loss, expected)
            out = ours("gene-cell", z, library, *cats)
            assert not any(t.requires_grad for t in out)


@pytest.mark.parametrize("three_d", [False, True])
def test_autocast(three_d):
    """Autocast changes nothing of the losses: the operations choose their own precision."""
    _, ours = pair(use_batch_norm=True)
    ours.eval()
    z, library, cats = inputs(three_d)
    px_r = torch.zeros(G, requires_grad=True)
    expected = ours.reconstruction_loss(counts(), z, library, *cats, px_r=px_r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.reconstruction_loss(counts(), z.bfloat16(), library, *cats, px_r=px_r)
        out = ours("gene", z, library, *cats)
    assert out[0].dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)  # z was rounded to bfloat16
    loss.mean().backward()


def test_compile_fullgraph():
    _, ours = pair(use_batch_norm=True, n_layers=2)
    z, library, cats = inputs()
    x, px_r = counts(), torch.zeros(G, requires_grad=True)

    def step(module, x, z, library, cats):
        out = module("gene-cell", z, library, *cats)
        loss = module.reconstruction_loss(x, z, library, *cats, px_r=px_r)
        return loss, sum(t.sum() for t in out)

    reference = copy.deepcopy(ours)
    expected = step(reference, x, z, library, cats)
    (expected[0].sum() + expected[1]).backward()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(ours, x, z, library, cats)
    (got[0].sum() + got[1]).backward()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
    for (_, p), (_, q) in zip(reference.named_parameters(), ours.named_parameters(), strict=True):
        assert_same(p.grad, q.grad)
    for (_, p), (_, q) in zip(reference.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(q, p)


def test_training_result_of_a_standalone_decoder():
    """Thirty steps of Adam from one seed: the same parameters, to float32 noise."""
    stock, ours = pair(use_batch_norm=True, n_layers=2)
    z, library, cats = inputs()
    x = counts()
    finals = []
    for module in (stock, ours):
        px_r = torch.zeros(G, requires_grad=True)
        optimizer = torch.optim.Adam([*module.parameters(), px_r], lr=1e-3, eps=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            if module is stock:
                loss = stock_loss(stock, x, z, library, cats, "zinb", "gene", px_r, None)
            else:
                loss = ours.reconstruction_loss(x, z, library, *cats, px_r=px_r)
            loss.mean().backward()
            optimizer.step()
        finals.append([*module.state_dict().values(), px_r.detach()])
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


# --- what can be asked of it ---------------------------------------------------------------------


def test_explain():
    _, ours = pair()
    z, *_ = inputs()
    explanation = ours.explain(z, likelihood="nb")
    assert [choice.operation for _, choice in explanation] == [
        *("covariate_linear", "softmax_library", "count_nll")
    ]
    text = repr(explanation)  # a notebook's last line
    assert "reconstruction_loss, nb" in text and "not triton" in text and "on 'cpu'" in text
    eager = DecoderSCVI(L, G, use_fused=False).explain(z)
    assert all(choice.backend == "eager" for _, choice in eager)
    assert "use_fused=False" in str(eager)
    with pytest.raises(ValueError, match="likelihood"):
        ours.explain(z, likelihood="gamma")


@pytest.mark.parametrize("use_fused", [True, False])
def test_what_is_not_a_latent_representation(use_fused):
    """The error speaks of what the user gave."""
    decoder = DecoderSCVI(L, G, n_cat_list=[3], use_fused=use_fused)
    z, library, cats = torch.zeros(5, L + 1), torch.zeros(5, 1), torch.zeros(5, 1).long()
    words = rf"z has shape \(5, {L + 1}\), expected \(cells, {L}\) or \(samples, cells, {L}\)"
    with pytest.raises(ValueError, match=words):
        decoder("gene", z, library, cats)
    with pytest.raises(ValueError, match=words):
        decoder.reconstruction_loss(torch.ones(5, G), z, library, cats, px_r=torch.zeros(G))
    with pytest.raises(ValueError, match=words):
        decoder.explain(z)
    with pytest.raises(TypeError, match=r"z is a numpy\.ndarray"):
        decoder("gene", z.numpy(), library, cats)
    with pytest.raises(TypeError, match="dispersion is a Tensor, expected one of 'gene'"):
        decoder(z, library, cats)
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\), expected \(cells, 4\)"):
        FCLayers(4, 6, use_fused=use_fused)(torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("change", "step", "words"),
    [
        (lambda d: d.px_decoder.fc_layers[0][0].register_forward_hook(print), 0, "hooks"),
        (lambda d: d.px_scale_decoder.append(nn.Identity()), 1, "px_scale_decoder"),
        (lambda d: d.px_r_decoder.register_forward_pre_hook(print), 1, "hooks"),
        (
            lambda d: nn.SyncBatchNorm.convert_sync_batchnorm(d.px_decoder),
            0,
            "SyncBatchNorm",
        ),
    ],
)
def test_what_cannot_be_fused_runs_eagerly_and_says_so(change, step, words):
    _, ours = pair(use_batch_norm=True)
    change(ours)
    z, *_ = inputs()
    choice = ours.explain(z)[step][1]
    assert choice.backend == "eager" and words in str(choice)


def test_hooks_of_submodules_fire():
    """A forward hook on a layer must not be skipped by the fast path."""
    stock, ours = pair()
    z, library, cats = inputs()
    fired = []
    ours.px_decoder.fc_layers[0][0].register_forward_hook(lambda *_: fired.append(1))
    ours.px_scale_decoder[0].register_forward_hook(lambda *_: fired.append(2))
    assert_same(stock("gene", z, library, *cats)[2], ours("gene", z, library, *cats)[2])
    x, px_r = counts(), torch.zeros(G)
    loss = ours.reconstruction_loss(x, z, library, *cats, px_r=px_r)
    assert fired == [1, 2, 1, 2]
    assert_same(stock_loss(stock, x, z, library, cats, "zinb", "gene", px_r, None), loss)


def test_covariates_are_not_one_hot_encoded(monkeypatch):
    """At 11,108 batches the one-hot product is most of a stock decoder's work."""
    _, ours = pair()
    z, library, cats = inputs()

    def fail(*_):
        raise AssertionError("one_hot was called")

    monkeypatch.setattr(nn.functional, "one_hot", fail)
    ours("gene", z, library, *cats)
    with pytest.raises(AssertionError, match="one_hot"):
        DecoderSCVI(**KWARGS, use_fused=False)("gene", z, library, *cats)
