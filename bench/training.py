"""One epoch of ``SCVI.train``, stock and fused, on a simulated atlas."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import scvi
import torch
from anndata import AnnData

from decoder_fast import fuse
from decoder_fast.datasets import simulate_atlas

from .fresh import fresh, peak_extra_bytes
from .timing import interleaved

#: Cells, genes, batches, cells a mini-batch, likelihood, options of the model.
Case = tuple[int, int, int, int, str, dict[str, object]]
CASES: tuple[Case, ...] = (
    (2_000, 2_000, 16, 128, "zinb", {}),
    (4_096, 4_000, 16, 128, "nb", {}),
    (4_096, 8_000, 16, 1_024, "zinb", {}),
    (2_048, 20_000, 16, 1_024, "zinb", {}),
    # the Census model of CELLxGENE, with mini-batches and cells for a small machine
    (4_096, 8_000, 11_108, 256, "nb", {"n_layers": 2, "n_latent": 50}),
)


def cases(quick: bool) -> tuple[Case, ...]:
    """The atlases; one small one when in a hurry."""
    return CASES[:1] if quick else CASES


@contextmanager
def alternatives(
    adata: AnnData, batch_size: int, likelihood: str, options: dict[str, object]
) -> Iterator[dict[str, Callable[[], None]]]:
    """Stock and fused models of some data: for each a function that runs an epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    stock, ours = (scvi.model.SCVI(adata, gene_likelihood=likelihood, **options) for _ in "ab")
    fuse(ours)

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
            yield {"stock eager": lambda: epoch(stock), "ours": lambda: epoch(ours)}
        finally:
            os.chdir(here)


@contextmanager
def models(case: Case) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """What a case is, and its alternatives."""
    cells, genes, batches, batch_size, likelihood, options = case
    adata = simulate_atlas(n_cells=cells, n_genes=genes, n_batches=batches, seed=0)
    shape = (
        f"{cells:,} cells x {genes:,} genes, {adata.X.nnz / cells / genes:.0%} non-zero, "
        f"{batches:,} batches, mini-batches of {batch_size:,}, {likelihood}"
    )
    with alternatives(adata, batch_size, likelihood, options) as epochs:
        yield shape, epochs


def _peak(case: Case, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    with models(case) as (_, epochs):
        return peak_extra_bytes(epochs[name])


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Time whole epochs, data loading included, and measure the peak memory of the first one."""
    with models(case) as (shape, epochs):
        seconds = interleaved(epochs, repeats=min(repeats, 5))
    peaks = {name: fresh(_peak, case, name, torch.get_num_threads()) for name in seconds}
    return {
        "shape": shape,
        "what": "SCVI.train, one epoch",
        **seconds,
        "peak extra bytes": peaks,
    }
