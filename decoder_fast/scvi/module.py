"""The module of a fused model: its own class, the decoder's outputs lazy."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import choose
from ..ops._common import canonical_csr
from .decoder import lazy_outputs
from .distributions import fuse_distributions, reconstruction_loss
from .lazy import LazyCounts, LazyOneHots


class FusedModule:
    """Mark of the classes that :func:`fused_module_class` makes."""

    _stock_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle cannot find it by name.
        return _restore, (self._stock_class,), self.__dict__


def _restore(stock_class: type) -> Any:
    cls: Any = fused_module_class(stock_class)
    return cls.__new__(cls)


# Models that compute their likelihood in a method which is handed the decoder's outputs:
# the method, and its likelihood.
_LOSS_METHODS: dict[str, Callable[[Any], str]] = {
    "get_reconstruction_loss_expression": lambda module: module.gene_likelihood,  # MULTIVAE
    "reconstruction_loss": lambda module: "zinb",  # ContrastiveVAE
}


def takes_csr(module: nn.Module) -> bool:
    """Whether the fused likelihood of a module gets the counts as the loader handed them over."""
    return isinstance(module, FusedModule) and not any(
        hasattr(module, name) for name in _LOSS_METHODS
    )


def is_csr(value: Any) -> bool:
    """Whether something is a CSR tensor."""
    return isinstance(value, Tensor) and value.layout is torch.sparse_csr


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped a module."""
    return hasattr(module, "_orig_mod")


def canonical(csr: Tensor) -> Tensor:
    """Sort the columns of a CSR tensor within its rows and sum duplicates, if it needs that."""
    backend = choose("csr_linear", device=csr.device).backend
    parts = canonical_csr(csr, backend)
    if parts[2].data_ptr() == csr.values().data_ptr():
        return csr
    return torch.sparse_csr_tensor(*parts, size=csr.shape, check_invariants=False)


def _has_no_one_hots(module: Any) -> bool:
    """Whether ``generative`` is known to make no one-hot matrix: looking out for it costs time."""
    by_gene = getattr(module, "dispersion", None) in ("gene", "gene-cell")
    return by_gene and getattr(module, "use_observed_lib_size", False)


@functools.cache
def fused_module_class(stock_class: type) -> type:
    """Make the subclass of a module's class in which the decoder's outputs are lazy."""

    @torch.compiler.disable
    @functools.wraps(stock_class.generative)  # type: ignore[attr-defined]
    def generative(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = lazy_outputs.set(True)
        try:
            with contextlib.nullcontext() if _has_no_one_hots(self) else LazyOneHots():
                outputs = stock_class.generative(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            lazy_outputs.reset(token)
        return fuse_distributions(outputs)

    @functools.wraps(stock_class.forward)  # type: ignore[attr-defined]
    def forward(self: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        # A data module of the user's own may hand over CSR.
        if takes_csr(self) and isinstance(tensors, dict):
            tensors = {
                key: LazyCounts.of(canonical(value)) if is_csr(value) else value
                for key, value in tensors.items()
            }
        return stock_class.forward(self, tensors, *args, **kwargs)  # type: ignore[attr-defined]

    @functools.wraps(stock_class.inference)  # type: ignore[attr-defined]
    def inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        one_hots = getattr(self, "encode_covariates", False) and not torch.compiler.is_compiling()
        with LazyOneHots() if one_hots else contextlib.nullcontext():
            return stock_class.inference(self, *args, **kwargs)  # type: ignore[attr-defined]

    @torch.compiler.disable
    @functools.wraps(stock_class.loss)  # type: ignore[attr-defined]
    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock_class.loss(self, *args, **kwargs)  # type: ignore[attr-defined]

    methods: dict[str, Any] = {
        "forward": forward,
        "inference": inference,
        "generative": generative,
        "loss": loss,
    }
    for name, likelihood in _LOSS_METHODS.items():
        if callable(stock := getattr(stock_class, name, None)):
            static = isinstance(inspect.getattr_static(stock_class, name), staticmethod)
            methods[name] = _fused_loss_method(stock, likelihood, static)
    return type(  # type: ignore[call-overload,no-any-return]
        f"Fused{stock_class.__name__}",
        (FusedModule, stock_class),
        {"_stock_class": stock_class, "__doc__": stock_class.__doc__, **methods},
    )


def _fused_loss_method(
    stock: Callable[..., Tensor], likelihood: Callable[[Any], str], static: bool
) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def method(self: Any, x: Tensor, px_rate: Tensor, px_r: Tensor, px_dropout: Tensor) -> Tensor:
        loss = reconstruction_loss(x, likelihood(self), px_rate, px_r, px_dropout)
        if loss is not None:
            return loss
        args = (x, px_rate, px_r, px_dropout)
        return stock(*args) if static else stock(self, *args)

    return method
