"""Parity, shown: SCVI trained on counts from one seed, stock and fused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="scvi-tools is what is trained")

from decoder_fast import fuse  # noqa: E402
from decoder_fast.datasets import demo_counts, simulate_atlas  # noqa: E402

EPOCHS = 20


def real_or_simulated_counts():
    """Two thousand cells and genes of real counts where there are any, else simulated ones."""
    import os

    if os.environ.get("DECODER_FAST_DATA"):
        adata, source = demo_counts()
    else:
        adata, source = simulate_atlas(n_cells=2000, n_genes=2000, seed=3), "simulated counts"
    print(source)
    total = np.asarray(adata.X.sum(0)).ravel()
    genes = np.sort(np.argsort(total)[-2000:])
    cells = np.random.default_rng(0).permutation(adata.n_obs)[:2000]
    adata = adata[cells, genes].copy()
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def train(adata, change, epochs):
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
    model = change(scvi.model.SCVI(adata))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
    elbo = model.history["elbo_train"].to_numpy(dtype=float).ravel()
    parameters = {k: v.detach().double() for k, v in model.module.named_parameters()}
    return elbo, parameters, model.get_latent_representation().astype(float)


def one_rounding_away(model):
    """Move every parameter by about one unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.module.parameters():
            p.mul_(1 + 6e-8 * torch.randn(p.shape, generator=generator).sign())
    return model


def in_another_order(order):
    """Give a model of reordered genes the parameters that it would have had in the old order."""

    def change(model):
        with torch.no_grad():
            for p in model.module.parameters():
                for dim in range(p.dim()):
                    if p.shape[dim] == len(order):
                        p.copy_(p.index_select(dim, torch.as_tensor(order)))
        return model

    return change


def distance(a, b):
    return (a - b).norm().item()


# What float32 noise amounts to is measured, not assumed: stock is trained once more, with its
# initial parameters moved by one rounding, or with its genes, and so its sums, in another order.
# Fused may be as far from stock as four times that. (With another order of genes, stock can end up
# 0.14 of the latent space's spread away from itself, or 4e-7: training amplifies rounding.)


@pytest.mark.filterwarnings("ignore")
def test_one_epoch_moves_every_parameter_alike(tmp_path, monkeypatch):
    """Later, Adam makes whole steps of what is rounding: units without a gradient part company."""
    monkeypatch.chdir(tmp_path)
    adata = real_or_simulated_counts()
    _, parameters, _ = train(adata.copy(), lambda model: model, 1)
    _, noisy, _ = train(adata.copy(), one_rounding_away, 1)
    _, fused, _ = train(adata.copy(), fuse, 1)
    for name, value in parameters.items():
        floor = 1e-6 * value.norm().item()
        assert distance(fused[name], value) <= 4 * distance(noisy[name], value) + floor, name


@pytest.mark.filterwarnings("ignore")
def test_twenty_epochs_stock_and_fused(tmp_path, monkeypatch):
    """The same training: every epoch's ELBO to 1e-3, and the latent space to float32 noise."""
    monkeypatch.chdir(tmp_path)
    adata = real_or_simulated_counts()
    elbo, _, latent = train(adata.copy(), lambda model: model, EPOCHS)
    fused_elbo, _, fused_latent = train(adata.copy(), fuse, EPOCHS)
    noisy_latents = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(adata.n_vars)
        noisy_latents.append(train(adata[:, order].copy(), in_another_order(order), EPOCHS)[2])

    assert len(elbo) == EPOCHS and elbo[-1] < elbo[0]
    np.testing.assert_allclose(fused_elbo, elbo, rtol=1e-3)
    spread = np.linalg.norm(latent - latent.mean(0))
    noise = max(np.linalg.norm(noisy - latent) / spread for noisy in noisy_latents)
    difference = np.linalg.norm(fused_latent - latent) / spread
    print(f"latent space: fused {difference:.2e}, noise {noise:.2e}")
    assert difference <= 4 * noise + 1e-6


def test_command_line_trains_on_csr(tmp_path, monkeypatch):
    """Counts that a file holds in CSR reach the likelihood in CSR."""
    from decoder_fast import cli
    from decoder_fast import nn as fast_nn

    layouts = set()
    original = fast_nn.count_nll

    def spy(x, *args, **kwargs):
        layouts.add(x.layout)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(fast_nn, "count_nll", spy)
    monkeypatch.chdir(tmp_path)
    simulate_atlas(n_cells=150, n_genes=40, n_batches=2, n_cell_types=2, seed=0).write_h5ad(
        "counts.h5ad"
    )
    command = ["train", "counts.h5ad", "--batch-key", "batch", "--max-epochs", "2", "--out", "run"]
    assert cli.main(command) == 0
    assert layouts == {torch.sparse_csr}
