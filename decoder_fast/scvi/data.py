"""CSR counts all the way: the data splitters and loaders of fused models."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anndata
import torch
from scipy import sparse
from scvi import dataloaders
from torch import Tensor
from torch.utils.data import default_convert

from .lazy import LazyCounts, version
from .module import canonical, is_compiled, is_csr

#: Of scvi-tools 1.5.
_ANNBATCH: Any = getattr(dataloaders, "AnnbatchDataModule", ())
_SPARSE = (sparse.spmatrix, sparse.sparray, anndata.abc.CSRDataset, anndata.abc.CSCDataset)


class _FusedSplitter:
    """What the data splitters of fused models share: CSR counts are handed over as CSR."""

    trainer: Any

    def __init__(self, *args: Any, load_sparse_tensor: bool = False, **kwargs: Any) -> None:
        # FusedTrain has read what the user said of it; here it may be only scvi-tools' default.
        super().__init__(*args, **kwargs)

    def train_dataloader(self) -> Any:
        """Create the loader of the training set."""
        return self._in_csr(super().train_dataloader())  # type: ignore[misc]

    def val_dataloader(self) -> Any:
        """Create the loader of the validation set."""
        return self._in_csr(super().val_dataloader())  # type: ignore[misc]

    def test_dataloader(self) -> Any:
        """Create the loader of the test set."""
        return self._in_csr(super().test_dataloader())  # type: ignore[misc]

    def _in_csr(self, loader: Any) -> Any:
        """Have a loader hand over CSR tensors, if there is CSR to hand over and a place for it."""
        if loader is not None and self.trainer.strategy.root_device.type != "mps":  # it has no CSR
            # SCANVI's second loader, of labelled cells, is for its classifier alone.
            _keep_csr(loader.dataloaders[0] if hasattr(loader, "dataloaders") else loader)
        return loader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put CSR tensors in canonical order, while they are on the CPU."""
        return _each(batch, canonical)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Show CSR tensors as dense, where scvi-tools' splitter makes them dense."""
        return _each(batch, self._shown)

    def _shown(self, csr: Tensor) -> Tensor:
        """Show a CSR tensor as dense, the CSR at hand as its ``csr``."""
        counts = LazyCounts.of(csr)
        if not is_compiled(self.trainer.lightning_module.module):
            return counts
        # torch.compile's graphs would break at a lazy tensor, but let an attribute pass.
        dense = counts.materialise()
        dense.csr, dense.version = csr, version(dense)  # type: ignore[attr-defined]
        return dense


def _each(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the CSR tensors of a mini-batch, or of each of a list of them."""
    if not isinstance(batch, dict):
        return [_each(part, function) for part in batch]
    return {key: function(value) if is_csr(value) else value for key, value in batch.items()}


def _keep_csr(loader: Any) -> None:
    """Have a loader's dataset hand over CSR counts, in memory or on disk, as CSR tensors.

    Not to a ``collate_fn`` or from a ``sampler`` of the user's own, which may want dense arrays.
    """
    if loader.batch_size is not None or loader.collate_fn is not default_convert:
        return
    dataset = loader.dataset.dataset
    stored = [data for data in dataset.data.values() if isinstance(data, _SPARSE)]
    # scvi-tools makes CSR tensors of csr_matrix alone, and anndata can be told to read others.
    kinds: tuple[type, ...] = (sparse.csr_matrix,)
    if not anndata.settings.use_sparse_array_on_read:
        kinds += (anndata.abc.CSRDataset,)
    if stored and all(isinstance(data, kinds) for data in stored):
        _silence_torch_about_csr()
        dataset.load_sparse_tensor = True


@contextmanager
def csr_batches(datamodule: Any) -> Iterator[None]:
    """Have scvi-tools' data module of annbatch (zarr on disk) not make CSR mini-batches dense."""
    if not isinstance(datamodule, _ANNBATCH):
        yield
        return
    make = datamodule.on_before_batch_transfer

    def on_before_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
        trainer, x = datamodule.trainer, batch["X"]
        if sparse.issparse(x) and x.format == "csr":
            crow, col, values = map(torch.from_numpy, (x.indptr, x.indices, x.data))
            x = torch.sparse_csr_tensor(crow, col, values, size=x.shape, check_invariants=False)
        compiled = is_compiled(trainer.lightning_module.module)
        if is_csr(x) and trainer.strategy.root_device.type != "mps" and not compiled:
            batch = {**batch, "X": LazyCounts.of(canonical(x.float()))}
        return make(batch, dataloader_idx)

    _silence_torch_about_csr()
    with replaced(datamodule, on_before_batch_transfer=on_before_batch_transfer):
        yield


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give something attributes of its own for a while."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(before)


class FusedAnnDataLoader(dataloaders.AnnDataLoader):
    """scvi-tools' data loader, for inference: CSR counts are shown as dense, never made so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What is asked for by name is handed over as it is.
        self._as_asked = bool(kwargs.get("iter_ndarray") or kwargs.get("load_sparse_tensor"))
        if not self._as_asked:
            _keep_csr(self)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch if self._as_asked else _each(batch, lambda t: LazyCounts.of(canonical(t)))


class FusedDataSplitter(_FusedSplitter, dataloaders.DataSplitter):
    """scvi-tools' data splitter, handing over CSR counts as CSR."""


class FusedSemiSupervisedDataSplitter(_FusedSplitter, dataloaders.SemiSupervisedDataSplitter):
    """scvi-tools' data splitter, handing over CSR counts as CSR."""


FUSED_SPLITTERS: dict[type, type] = {
    dataloaders.DataSplitter: FusedDataSplitter,
    dataloaders.SemiSupervisedDataSplitter: FusedSemiSupervisedDataSplitter,
}


@functools.cache
def _silence_torch_about_csr() -> None:
    """Have torch say now what it says once a process: CSR is in beta, and goes unchecked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), size=(0, 1))
