"""Counts in zarr stores, read by annbatch: CSR from disk to the loss."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is what the bridge leads to")

from decoder_fast import fuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402
from decoder_fast.scvi import data  # noqa: E402
from decoder_fast.scvi.lazy import LazyCounts  # noqa: E402

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def atlas():
    return simulate_atlas(n_cells=200, n_genes=90, n_batches=3, n_cell_types=3, seed=0)


@pytest.fixture
def shown(monkeypatch):
    """What the encoders were given: whether each mini-batch was lazy."""
    seen = []
    stock = scvi.nn.Encoder.forward

    @functools.wraps(stock)
    def forward(self, x, *args):
        seen.append(isinstance(x, LazyCounts))
        return stock(self, x, *args)

    monkeypatch.setattr(scvi.nn.Encoder, "forward", forward)
    return seen


@pytest.mark.parametrize("to", ["torch", None])
def test_training_from_zarr(atlas, tmp_path, shown, to):
    annbatch = pytest.importorskip("annbatch", reason="it needs Python 3.12")
    if not data._ANNBATCH:
        pytest.skip("annbatch came with scvi-tools 1.5")
    atlas.write_zarr(tmp_path / "atlas.zarr")
    collection = annbatch.DatasetCollection(tmp_path / "collection.zarr", mode="w")
    collection.add_adatas([tmp_path / "atlas.zarr"], shuffle=False)
    results, kinds = [], []
    for change in (lambda model: model, fuse):
        loader = annbatch.Loader(
            chunk_size=16, preload_nchunks=4, batch_size=32, preload_to_gpu=False, to=to
        )
        module = data._ANNBATCH(
            loader.use_collection(collection),
            batch_key="batch",
            chunk_size=16,
            preload_nchunks=4,
            preload_to_gpu=False,
        )
        scvi.settings.seed = 0
        model = change(scvi.model.SCVI(registry=module.registry, n_hidden=32))
        model.train(
            datamodule=module,
            max_epochs=2,
            batch_size=32,
            accelerator="cpu",
            enable_progress_bar=False,
            shuffle_set_split=False,
        )
        kinds.append(set(shown))
        shown.clear()
        results.append(model.history["elbo_train"].to_numpy(dtype=float))
        assert "on_before_batch_transfer" not in vars(module)
    assert kinds[1] == {True} and True not in kinds[0]
    np.testing.assert_allclose(*results, rtol=1e-4)


class DataModule:
    """Makes mini-batches dense as scvi-tools' data module of annbatch does."""

    def __init__(self, device="cpu", compiled=False):
        module = SimpleNamespace(**({"_orig_mod": None} if compiled else {}))
        self.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(module=module),
            strategy=SimpleNamespace(root_device=torch.device(device)),
        )

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x = batch["X"]
        if isinstance(x, torch.Tensor) and x.is_sparse_csr:
            x = x.to_dense().float()
        elif isinstance(x, torch.Tensor):
            x = x.float()
        else:
            x = torch.from_numpy(x.toarray()).float()
        return {"X": x, "size": x.sum(dim=1, keepdim=True)}


@pytest.mark.parametrize("form", ["scipy", "scipy, csc", "torch", "int32", "unsorted"])
@pytest.mark.parametrize("where", ["cpu", "mps", "compiled"])
def test_batches_of_a_data_module(atlas, monkeypatch, form, where):
    monkeypatch.setattr(data, "_ANNBATCH", DataModule)
    module = DataModule("mps" if where == "mps" else "cpu", where == "compiled")
    x = atlas.X[:32].astype(np.float32)
    dense = x.toarray()
    if form == "scipy, csc":
        x = x.tocsc()
    elif form != "scipy":
        x = torch.from_numpy(dense).to_sparse_csr()
        if form == "int32":
            x = torch.sparse_csr_tensor(
                x.crow_indices(), x.col_indices(), x.values().int(), size=x.shape
            )
        elif form == "unsorted":
            col, values = x.col_indices().clone(), x.values().clone()
            col[:2], values[:2] = col[:2].flip(0), values[:2].flip(0)
            x = torch.sparse_csr_tensor(x.crow_indices(), col, values, size=x.shape)
    with data.csr_batches(module):
        batch = module.on_before_batch_transfer({"X": x}, 0)
    assert isinstance(batch["X"], LazyCounts) == (where == "cpu" and form != "scipy, csc")
    assert batch["X"].dtype == torch.float32
    np.testing.assert_array_equal(batch["X"].numpy(force=True), dense)
    np.testing.assert_allclose(batch["size"], dense.sum(1, keepdims=True), rtol=1e-6)
    assert not isinstance(batch["size"], LazyCounts)
    assert "on_before_batch_transfer" not in vars(module)
    plain = module.on_before_batch_transfer({"X": x}, 0)
    assert not isinstance(plain["X"], LazyCounts)


def test_another_data_module():
    with data.csr_batches(None), data.csr_batches(SimpleNamespace()):
        pass
