"""One epoch of ``SCVI.train``, stock and fused, on a simulated atlas."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings

import scvi

from decoder_fast import fuse
from decoder_fast.datasets import simulate_atlas

from .timing import interleaved

#: Cells, genes, batches, cells a mini-batch, likelihood.
Case = tuple[int, int, int, int, str]
CASES: tuple[Case, ...] = (
    (2_000, 2_000, 16, 128, "zinb"),
    (2_000, 4_000, 16, 128, "nb"),
    (4_096, 8_000, 16, 1_024, "zinb"),
    (4_096, 2_000, 2_000, 1_024, "nb"),
)


def cases(quick: bool) -> tuple[Case, ...]:
    """The atlases; one small one when in a hurry."""
    return CASES[:1] if quick else CASES


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Time whole epochs, data loading included."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cells, genes, batches, batch_size, likelihood = case
    adata = simulate_atlas(n_cells=cells, n_genes=genes, n_batches=batches, seed=0)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    models = {
        "stock eager": scvi.model.SCVI(adata, gene_likelihood=likelihood),
        "ours": fuse(scvi.model.SCVI(adata, gene_likelihood=likelihood)),
    }

    def epoch(model: scvi.model.SCVI) -> None:
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
                {name: lambda model=model: epoch(model) for name, model in models.items()},
                repeats=min(repeats, 5),
            )
        finally:
            os.chdir(here)
    return {
        "shape": f"{cells:,} cells x {genes:,} genes, {batches} batches, mini-batches of "
        f"{batch_size}, {likelihood}",
        "what": "SCVI.train, one epoch",
        **seconds,
    }
