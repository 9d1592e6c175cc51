"""An epoch of ``SCVI.train`` on counts that stay in an h5ad file: time, memory by file size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import anndata
import torch

from decoder_fast.datasets import simulate_atlas

from .fresh import fresh, peak_extra_bytes
from .timing import interleaved
from .training import alternatives

#: Cells, genes; mini-batches of 128. Memory is to be the same for both.
Case = tuple[int, int]
CASES: tuple[Case, ...] = ((5_000, 8_000), (40_000, 8_000))


def cases(quick: bool) -> tuple[Case, ...]:
    """The files; the smaller when in a hurry."""
    return CASES[:1] if quick else CASES


def _write(case: Case, file: str) -> None:
    cells, genes = case
    simulate_atlas(n_cells=cells, n_genes=genes, n_batches=16, seed=0).write_h5ad(file)


def _peak(file: str, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    with alternatives(anndata.read_h5ad(file, backed="r"), 128, "zinb", {}) as epochs:
        return peak_extra_bytes(epochs[name])


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Time whole epochs from the file, and measure the peak memory of the first one."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "atlas.h5ad"))
        fresh(_write, case, file)
        size = Path(file).stat().st_size
        with alternatives(anndata.read_h5ad(file, backed="r"), 128, "zinb", {}) as epochs:
            seconds = interleaved(epochs, repeats=min(repeats, 3))
        peaks = {name: fresh(_peak, file, name, torch.get_num_threads()) for name in seconds}
    return {
        "shape": f"{case[0]:,} cells x {case[1]:,} genes ({size / 1e6:.0f} MB), mini-batches of "
        "128, zinb",
        "what": "SCVI.train from disk, one epoch",
        **seconds,
        "peak extra bytes": peaks,
    }
