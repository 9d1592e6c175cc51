"""CSR counts all the way: the data splitters of fused models, and their ``train``."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from scipy import sparse
from scvi import dataloaders
from torch import Tensor

from ..lazy import LazyCounts
from .module import takes_csr


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
        if loader is None or self.trainer.strategy.root_device.type == "mps":  # it has no CSR
            return loader
        # SCANVI's second loader, of labelled cells, is for its classifier alone.
        first = loader.dataloaders[0] if hasattr(loader, "dataloaders") else loader
        dataset = first.dataset.dataset
        stored = [data for data in dataset.data.values() if sparse.issparse(data)]
        # scvi-tools makes CSR tensors of csr_matrix alone; LazyCounts takes no duplicates.
        if stored and all(
            isinstance(data, sparse.csr_matrix) and data.has_canonical_format for data in stored
        ):
            _silence_torch_about_csr()
            dataset.load_sparse_tensor = True
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Show CSR tensors as dense, where scvi-tools' splitter makes them dense."""
        if isinstance(batch, dict):
            return {key: self._shown(value) for key, value in batch.items()}
        return [self.on_after_batch_transfer(part, dataloader_idx) for part in batch]

    def _shown(self, value: Any) -> Any:
        """Show one CSR tensor as dense, the CSR at hand as its ``csr``; leave others alone."""
        if not isinstance(value, Tensor) or value.layout is not torch.sparse_csr:
            return value
        counts = LazyCounts.of(value)
        if not hasattr(self.trainer.lightning_module.module, "_orig_mod"):
            return counts
        # torch.compile's graphs would break at a lazy tensor, but let an attribute pass.
        dense = counts.materialise()
        dense.csr = value  # type: ignore[attr-defined]
        return dense


class FusedDataSplitter(_FusedSplitter, dataloaders.DataSplitter):
    """scvi-tools' data splitter, handing over CSR counts as CSR."""


class FusedSemiSupervisedDataSplitter(_FusedSplitter, dataloaders.SemiSupervisedDataSplitter):
    """scvi-tools' data splitter, handing over CSR counts as CSR."""


_FUSED_SPLITTERS: dict[type, type] = {
    cls.__mro__[2]: cls for cls in (FusedDataSplitter, FusedSemiSupervisedDataSplitter)
}


@functools.cache
def _silence_torch_about_csr() -> None:
    """Have torch say now what it says once a process: CSR is in beta, and goes unchecked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), size=(0, 1))


class FusedTrain:
    """``model.train`` of a fused model: that of its class, with a data splitter that keeps CSR."""

    __wrapped__: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, types.MethodType(type(model).train, model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model."""
        train = self.__wrapped__
        model: Any = train.__self__  # type: ignore[attr-defined]
        splitter = _FUSED_SPLITTERS.get(getattr(model, "_data_splitter_cls", object))
        if splitter is None or not takes_csr(model.module):
            return train(*args, **kwargs)
        said = {**inspect.signature(train).bind(*args, **kwargs).arguments, **kwargs}
        options = dict(said.get("datasplitter_kwargs") or {})
        wanted = options.pop("load_sparse_tensor", said.get("load_sparse_tensor", True))
        # Not every model's train and data splitter know the option.
        kwargs.pop("load_sparse_tensor", None)
        if "datasplitter_kwargs" in kwargs:
            kwargs["datasplitter_kwargs"] = options
        if not wanted:
            return train(*args, **kwargs)
        model._data_splitter_cls = splitter
        try:
            return train(*args, **kwargs)
        finally:
            del model._data_splitter_cls
