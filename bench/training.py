"""One epoch of ``SCVI.train``, stock and fused, on a simulated atlas."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator

import scvi
import torch

from decoder_fast import fuse
from decoder_fast.datasets import simulate_atlas

from .timing import interleaved


def rows() -> Iterator[dict[str, object]]:
    """Time whole epochs, data loading included."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for cells, genes, batches, batch_size, likelihood in (
        (2_000, 2_000, 16, 128, "zinb"),
        (2_000, 4_000, 16, 128, "nb"),
        (4_096, 8_000, 16, 1_024, "zinb"),
        (4_096, 2_000, 2_000, 1_024, "nb"),
    ):
        adata = simulate_atlas(n_cells=cells, n_genes=genes, n_batches=batches, seed=0)
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        scvi.settings.seed = 0
        models = {
            "stock eager": scvi.model.SCVI(adata, gene_likelihood=likelihood),
            "ours": fuse(scvi.model.SCVI(adata, gene_likelihood=likelihood)),
        }

        def epoch(model: scvi.model.SCVI, batch_size: int = batch_size) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.train(
                    max_epochs=1,
                    batch_size=batch_size,
                    train_size=1.0,
                    accelerator="cpu",
                    enable_progress_bar=False,
                    logger=False,
                )

        here = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # Lightning leaves its logs in the current folder
            try:
                seconds = interleaved(
                    {name: lambda m=model: epoch(m) for name, model in models.items()}, repeats=5
                )
            finally:
                os.chdir(here)
        yield {
            "shape": f"{cells:,} cells x {genes:,} genes, {batches} batches, mini-batches of "
            f"{batch_size}, {likelihood}",
            "what": f"SCVI.train, one epoch, {torch.get_num_threads()} thread(s)",
            **seconds,
        }
