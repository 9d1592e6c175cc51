"""Covariates at the size of an atlas: 11,108 batches in two hidden layers, stock and fused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

scvi = pytest.importorskip("scvi", reason="scvi-tools is what the bridge leads to")

from decoder_fast import fuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402

SCVI = scvi.model.SCVI
N_BATCHES = 11_108  # of the CELLxGENE Census' human model
CELLS = 256  # a mini-batch
TRAIN = {
    "max_epochs": 1,
    "batch_size": CELLS,
    "train_size": 0.2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
}
OPTIONS = [
    {},
    {"encode_covariates": True},
    {"use_observed_lib_size": False},
    {"dispersion": "gene-batch"},
]

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore"),  # of Lightning's advice on tiny models
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def atlas():
    adata = simulate_atlas(n_cells=N_BATCHES, n_genes=30, n_batches=2, seed=0)
    adata.obs["batch"] = [f"{i:05}" for i in range(N_BATCHES)]
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


def make(adata, **options):
    scvi.settings.seed = 0
    model = SCVI(adata, n_hidden=16, n_layers=2, gene_likelihood="nb", **options)
    if not options.get("use_observed_lib_size", True):
        model.module.library_log_vars.fill_(1.0)  # in batches of one cell it is 0
    return model


def state(model):
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def assert_near(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].double(), b[name].double()
        assert (x - y).norm() <= tolerance * x.norm() + 1e-6, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training(atlas, options):
    results = []
    for change in (lambda model: model, fuse):
        model = change(make(atlas, **options))
        before = state(model)
        model.train(**TRAIN)
        results.append((state(model), model.history["elbo_train"].to_numpy(float)))
    stock, ours = results
    assert_near(stock[0], ours[0], 1e-3)  # 9 steps, each of which rounds
    assert ours[1] == pytest.approx(stock[1], rel=1e-5)
    for layer in (0, 1):
        name = f"decoder.px_decoder.fc_layers.Layer {layer}.0.weight"
        expected, moved = ((after[name] - before[name])[:, -N_BATCHES:] for after, _ in results)
        assert (moved - expected).norm() < 1e-2 * expected.norm()  # small steps of large weights


class OneHots(TorchDispatchMode):
    """Records what makes a tensor of cells x batches, forward or backward."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                rows, columns = sorted(tensor.shape)
                if rows == CELLS and columns >= N_BATCHES:
                    self.made.add(str(func))
        return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tensor_of_cells_x_batches(atlas, options):
    for fused in (False, True):
        model = make(atlas, **options)
        model = fuse(model) if fused else model
        manager, cells = model.adata_manager, np.arange(CELLS)
        loader = scvi.dataloaders.AnnDataLoader(manager, indices=cells, batch_size=CELLS)
        (tensors,) = loader
        with OneHots() as one_hots:
            model.module(tensors)[2].loss.backward()
        assert bool(one_hots.made) is not fused, one_hots.made


def test_a_state_dict_goes_both_ways(atlas):
    stock, ours = make(atlas), fuse(make(atlas))
    ours.train(**TRAIN)
    stock.module.load_state_dict(ours.module.state_dict())
    again = fuse(make(atlas))
    again.module.load_state_dict(stock.module.state_dict())
    batch = torch.tensor([[0], [N_BATCHES - 1], [N_BATCHES // 2]])
    inputs = (torch.randn(3, 10), torch.full((3, 1), 3.0), batch)
    expected, *others = (m.module.eval().decoder("gene", *inputs) for m in (stock, ours, again))
    for got in others:
        for a, b in zip(expected, got, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="11108"):
        ours.module.decoder("gene", inputs[0], inputs[1], batch + 1)


def test_surgery(atlas):
    """Two batches more: their columns learn, the 11,108 others and the rest stay bit for bit."""
    reference = make(atlas)
    query = atlas[:CELLS].copy()
    query.obs["batch"] = ["new", "newer"] * (CELLS // 2)
    SCVI.prepare_query_anndata(query, reference)
    results = []
    for change in (lambda model: model, fuse):
        scvi.settings.seed = 0
        model = change(SCVI.load_query_data(query, change(reference), accelerator="cpu"))
        before = state(model)
        model.train(**TRAIN, plan_kwargs={"weight_decay": 0.0})
        after = state(model)
        results.append(after)
        for layer in (0, 1):
            name = f"decoder.px_decoder.fc_layers.Layer {layer}.0.weight"
            assert after[name].shape[1] == (10, 16)[layer] + N_BATCHES + 2
            assert torch.equal(before[name][:, :-2], after[name][:, :-2])
            assert not torch.equal(before[name][:, -2:], after[name][:, -2:])
        assert {k for k, p in model.module.named_parameters() if p.requires_grad} >= {name}
        head = "decoder.px_scale_decoder.0.weight"
        assert torch.equal(before[head], after[head])
    assert_near(*results)
