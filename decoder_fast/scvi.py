"""The bridge to scvi-tools: ``fuse(model)``, ``unfuse(model)`` and ``with fused(model)``.

Fusing changes classes and nothing else. The model's decoder becomes a :class:`FusedDecoderSCVI` and
the module that owns it a subclass of its own class, both in place: parameters, buffers, hooks and
optimizers stay as they are, and a saved model knows nothing of it.

In a fused module the decoder's outputs are lazy (:mod:`decoder_fast.lazy`), and the distributions
that the model builds from them answer ``log_prob(x).sum(-1)`` by
:meth:`decoder_fast.DecoderSCVI.hidden_loss`. The losses of the models are their own.

A fused model's ``train`` has its data splitter hand over CSR counts as CSR: the module sees them as
dense (:class:`decoder_fast.lazy.LazyCounts`), the fused likelihood takes the CSR.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from scipy import sparse
from torch import Tensor, nn

from . import nn as fast
from .lazy import (
    LazyCounts,
    LazyExp,
    LazyExpanded,
    LazyOneHots,
    LazyRows,
    LazyTensor,
    broadcast,
    real,
    summed_dim,
)

try:
    import scvi.nn as scvi_nn
    from scvi import dataloaders
    from scvi import distributions as scvi_distributions
except ImportError as error:
    raise ImportError(
        "decoder_fast.scvi needs scvi-tools, which is not installed or does not import "
        f"({error}): pip install 'decoder-fast[scvi]'"
    ) from error

__all__ = ["FusedDecoderSCVI", "FusedFCLayers", "fuse", "fused", "unfuse"]

_lazy_outputs: ContextVar[bool] = ContextVar("decoder_fast_lazy_outputs", default=False)
_Model = TypeVar("_Model")


class _Decoded:
    """What one call of a decoder computed (hidden units), and what it can compute from them."""

    def __init__(self, decoder: fast.DecoderSCVI, hidden: Tensor, library: Tensor) -> None:
        self.decoder = decoder
        self.hidden = hidden
        self.library = library

    @functools.cached_property
    def _scale_and_rate(self) -> tuple[Tensor, Tensor]:
        return self.decoder._scale_and_rate(self.hidden, self.library)

    def compute(self, output: str) -> Tensor:
        """Compute one of the decoder's outputs."""
        if output == "px_dropout":
            return self.decoder.px_dropout_decoder(self.hidden)
        if output == "px_r":
            return self.decoder.px_r_decoder(self.hidden)
        return self._scale_and_rate[("px_scale", "px_rate").index(output)]

    def cells(self, start: int, length: int) -> _Decoded:
        """Return the part of it that belongs to some of the cells."""
        library = self.library
        if library.shape[-2] != 1:
            library = library.narrow(-2, start, length)
        return _Decoded(self.decoder, self.hidden.narrow(-2, start, length), library)


class LazyOutput(LazyTensor):
    """One output of a decoder."""

    decoded: _Decoded
    output: str  # its name
    whole: LazyOutput | None  # of which this is a slice of cells
    start: int

    @classmethod
    def of(cls, decoded: _Decoded, output: str) -> LazyOutput:
        """Make one from what the decoder computed."""
        hidden, weight = decoded.hidden, decoded.decoder.px_r_decoder.weight
        shape = (*hidden.shape[:-1], weight.shape[0])
        return cls(
            shape, weight.dtype, hidden.device, decoded=decoded, output=output, whole=None, start=0
        )

    def compute(self) -> Tensor:
        """Compute the values."""
        if self.whole is not None:
            return self.whole.materialise().narrow(-2, self.start, self.shape[-2])
        return self.decoded.compute(self.output)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Stay lazy where models and distributions only pass outputs on."""
        if func is torch.exp and self.output == "px_r":
            return LazyExp.of(self)
        if func in (torch.split, Tensor.split) and args[0] is self:
            return self._split(*args[1:], **kwargs)
        if func in (Tensor.__ge__, Tensor.ge) and args[1] == 0 and self.output != "px_r":
            # Distributions check that a rate is not negative; this one is exp(.) * softmax(.).
            return torch.ones((), dtype=torch.bool, device=self.device)
        if func in (Tensor.__eq__, Tensor.eq) and args[0] is args[1] is self:
            return torch.ones((), dtype=torch.bool, device=self.device)
        return broadcast(func, args)

    def _split(self, sizes: Any, dim: int = 0) -> Any:
        if dim % self.dim() != self.dim() - 2 or not isinstance(sizes, (list, tuple)):
            return NotImplemented
        parts, start = [], 0
        for length in sizes:
            part = LazyOutput.of(self.decoded.cells(start, length), self.output)
            part.whole, part.start = self, start
            parts.append(part)
            start += length
        return tuple(parts)


class FusedFCLayers(fast.FCLayers, scvi_nn.FCLayers):
    """:class:`decoder_fast.FCLayers` that scvi-tools' surgery recognises as its own."""


class FusedDecoderSCVI(fast.DecoderSCVI, scvi_nn.DecoderSCVI):
    """:class:`decoder_fast.DecoderSCVI` in the place of scvi-tools' own."""

    def forward(  # type: ignore[override]
        self, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Decode; inside a fused module, to lazy tensors."""
        if (
            not _lazy_outputs.get()
            or self._unfused_heads() is not None
            or z.dim() not in (2, 3)
            or library.dim() not in (2, z.dim())
            or library.shape[-1] != 1
        ):
            return super().forward(dispersion, z, library, *cat_list)
        decoded = _Decoded(self, self.px_decoder(z, *cat_list), library)
        return (
            LazyOutput.of(decoded, "px_scale"),
            LazyOutput.of(decoded, "px_r") if dispersion == "gene-cell" else None,
            LazyOutput.of(decoded, "px_rate"),
            LazyOutput.of(decoded, "px_dropout"),
        )


def _dispersion(theta: Tensor) -> dict[str, Any] | None:
    """Trace ``theta = exp(px_r)`` to the arguments of ``hidden_loss``; None if it cannot be."""
    while isinstance(theta, LazyExpanded):
        theta = theta.source
    if isinstance(theta, LazyExp):
        px_r = theta.source
        if isinstance(px_r, LazyRows) and px_r.labels.dim() == 1:
            return {"dispersion": "gene-batch", "px_r": px_r.table, "px_r_index": px_r.labels}
        if isinstance(px_r, LazyOutput) and px_r.output == "px_r":
            return {"dispersion": "gene-cell", "px_r": None, "px_r_index": None}
        return None
    if theta.dim() == 1 and not isinstance(theta, LazyTensor):
        return {"dispersion": "gene", "px_r": theta.log(), "px_r_index": None}
    return None


def _reconstruction_loss(
    x: Tensor, likelihood: str, mean: Any, theta: Any, zi_logits: Any
) -> Tensor | None:
    """Compute the loss of each cell from lazy parameters; None if they cannot be traced back."""
    if not isinstance(mean, LazyOutput) or mean.output != "px_rate":
        return None
    decoded = mean.decoded
    if likelihood == "zinb" and not (
        isinstance(zi_logits, LazyOutput)
        and zi_logits.output == "px_dropout"
        and zi_logits.decoded.decoder is decoded.decoder
        and zi_logits.decoded.hidden.data_ptr() == decoded.hidden.data_ptr()
    ):
        return None
    if x.dim() != 2 or x.shape != mean.shape[-2:]:
        return None
    if likelihood == "poisson":
        dispersion: dict[str, Any] | None = {
            "dispersion": "gene",
            "px_r": None,
            "px_r_index": None,
        }
    else:
        dispersion = _dispersion(theta)
    if dispersion is None:
        return None
    return decoded.decoder.hidden_loss(
        getattr(x, "csr", x), decoded.hidden, decoded.library, likelihood=likelihood, **dispersion
    )


class LazyLogProb(LazyTensor):
    """Log-likelihood of each element; its sum over genes is one fused operation."""

    distribution: Any
    x: Tensor
    fused: Callable[[], Tensor]

    def compute(self) -> Tensor:
        """Compute the values."""
        return self.distribution.elementwise_log_prob(self.x)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Sum over genes by the fused operation."""
        if summed_dim(func, args, kwargs) != self.dim() - 1:
            return NotImplemented
        return -self.fused()


class _Parameter:
    """A parameter of a distribution that may be lazy, and that nobody outside sees lazy."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            return real(instance.__dict__[self.name])
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


class _FusedDistribution:
    """What the distributions of a fused module share."""

    likelihood: str
    _names: tuple[str, str | None, str | None]  # of mean, theta and dropout logits

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of each element, computed only if more than its sum is asked for."""
        raw = self.__dict__
        mean, theta, zi_logits = (None if n is None else raw.get(n) for n in self._names)
        if not isinstance(mean, LazyOutput) or value.shape != mean.shape[-2:]:
            return self.elementwise_log_prob(value)

        def fused() -> Tensor:
            loss = _reconstruction_loss(value, self.likelihood, mean, theta, zi_logits)
            return -self.elementwise_log_prob(value).sum(-1) if loss is None else loss

        return LazyLogProb(
            tuple(mean.shape), mean.dtype, mean.device, distribution=self, x=value, fused=fused
        )

    def elementwise_log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of each element as scvi-tools computes it."""
        if value.layout != torch.strided:
            value = value.to_dense()
        return super().log_prob(value)  # type: ignore[misc]


class FusedNegativeBinomial(_FusedDistribution, scvi_distributions.NegativeBinomial):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "nb"
    _names = ("mu", "theta", None)
    mu, theta, scale = _Parameter(), _Parameter(), _Parameter()


class FusedZeroInflatedNegativeBinomial(
    _FusedDistribution, scvi_distributions.ZeroInflatedNegativeBinomial
):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "zinb"
    _names = ("mu", "theta", "zi_logits")
    mu, theta, scale, zi_logits = _Parameter(), _Parameter(), _Parameter(), _Parameter()


class FusedPoisson(_FusedDistribution, scvi_distributions.Poisson):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "poisson"
    _names = ("rate", None, None)
    rate, scale = _Parameter(), _Parameter()


class FusedNormal(_FusedDistribution, scvi_distributions.Normal):
    """scvi-tools' distribution, its likelihood fused."""

    likelihood = "normal"
    _names = ("loc", "scale", None)
    loc, scale, normal_mu = _Parameter(), _Parameter(), _Parameter()


_FUSED_DISTRIBUTIONS: dict[type, type] = {
    cls.__mro__[2]: cls
    for cls in (
        FusedNegativeBinomial,
        FusedZeroInflatedNegativeBinomial,
        FusedPoisson,
        FusedNormal,
    )
}


def _fuse_distributions(outputs: Any) -> Any:
    """Give the distributions among a generative model's outputs their fused class, in place."""
    if isinstance(outputs, dict):
        for value in outputs.values():
            fused_class = _FUSED_DISTRIBUTIONS.get(type(value))
            if fused_class is not None and any(
                isinstance(v, LazyTensor) for v in value.__dict__.values()
            ):
                value.__class__ = fused_class
    return outputs


class _FusedModule:
    """Mark of the classes that :func:`_fused_module_class` makes."""

    _stock_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle cannot find it by name.
        return _restore, (self._stock_class,), self.__dict__


def _restore(stock_class: type) -> Any:
    cls: Any = _fused_module_class(stock_class)
    return cls.__new__(cls)


# Models that compute their likelihood in a method which is handed the decoder's outputs:
# the method, and its likelihood.
_LOSS_METHODS: dict[str, Callable[[Any], str]] = {
    "get_reconstruction_loss_expression": lambda module: module.gene_likelihood,  # MULTIVAE
    "reconstruction_loss": lambda module: "zinb",  # ContrastiveVAE
}


def _takes_csr(module: nn.Module) -> bool:
    """Whether the fused likelihood of a module gets the counts as the loader handed them over."""
    return isinstance(module, _FusedModule) and not any(
        hasattr(module, name) for name in _LOSS_METHODS
    )


@functools.cache
def _fused_module_class(stock_class: type) -> type:
    """Make the subclass of a module's class in which the decoder's outputs are lazy."""

    @torch.compiler.disable
    @functools.wraps(stock_class.generative)  # type: ignore[attr-defined]
    def generative(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _lazy_outputs.set(True)
        try:
            with LazyOneHots():
                outputs = stock_class.generative(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            _lazy_outputs.reset(token)
        return _fuse_distributions(outputs)

    @torch.compiler.disable
    @functools.wraps(stock_class.loss)  # type: ignore[attr-defined]
    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock_class.loss(self, *args, **kwargs)  # type: ignore[attr-defined]

    methods: dict[str, Any] = {"generative": generative, "loss": loss}
    for name, likelihood in _LOSS_METHODS.items():
        if callable(stock := getattr(stock_class, name, None)):
            static = isinstance(inspect.getattr_static(stock_class, name), staticmethod)
            methods[name] = _fused_loss_method(stock, likelihood, static)
    return type(  # type: ignore[call-overload,no-any-return]
        f"Fused{stock_class.__name__}",
        (_FusedModule, stock_class),
        {"_stock_class": stock_class, "__doc__": stock_class.__doc__, **methods},
    )


def _fused_loss_method(
    stock: Callable[..., Tensor], likelihood: Callable[[Any], str], static: bool
) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def method(self: Any, x: Tensor, px_rate: Tensor, px_r: Tensor, px_dropout: Tensor) -> Tensor:
        loss = _reconstruction_loss(x, likelihood(self), px_rate, px_r, px_dropout)
        if loss is not None:
            return loss
        args = (x, px_rate, px_r, px_dropout)
        return stock(*args) if static else stock(self, *args)

    return method


class _FusedSplitter:
    """What the data splitters of fused models share: CSR counts are handed over as CSR."""

    trainer: Any

    def __init__(self, *args: Any, load_sparse_tensor: bool = False, **kwargs: Any) -> None:
        # _FusedTrain has read what the user said of it; here it may be only scvi-tools' default.
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


class _FusedTrain:
    """``model.train`` of a fused model: that of its class, with a data splitter that keeps CSR."""

    __wrapped__: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, types.MethodType(type(model).train, model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        train = self.__wrapped__
        model: Any = train.__self__  # type: ignore[attr-defined]
        splitter = _FUSED_SPLITTERS.get(getattr(model, "_data_splitter_cls", object))
        if splitter is None or not _takes_csr(model.module):
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


def _modules(model: Any) -> nn.Module:
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a scvi-tools model (with a .module) or a torch module, got "
            f"{type(model).__name__}"
        )
    return module


def _swap(module: nn.Module, classes: dict[type, type]) -> None:
    for part in module.modules():
        if (other := classes.get(type(part))) is not None:
            part.__class__ = other  # type: ignore[assignment]


def fuse(model: _Model) -> _Model:
    """Make a scvi-tools model decode and train through decoder_fast, in place.

    Works before and after training. Results are those of the stock model to float32 rounding; a
    saved model loads in stock scvi-tools. ``load``, ``load_query_data`` and ``from_scvi_model``
    build a stock model: fuse it again.

    Counts that AnnData holds as a ``scipy.sparse.csr_matrix`` (in memory, indices sorted, without
    duplicates) are trained on in CSR: no dense mini-batch is built for the likelihood, and the
    encoder is given ``log1p`` of the non-zeros. ``model.train(load_sparse_tensor=False)`` turns
    that off. Dense mini-batches remain for MULTIVI and ContrastiveVI, for a ``datamodule`` of the
    user's own, on MPS, and where a module is fused instead of its model.

    Parameters
    ----------
    model
        A scvi-tools model, or its ``module``, that has a ``scvi.nn.DecoderSCVI``: SCVI, SCANVI,
        PoissonVI, JointEmbeddingSCVI and others train through the fused likelihood, as do MULTIVI
        and ContrastiveVI; AUTOZI and ResolVI, whose likelihoods differ, get the fused decoder.

    Returns
    -------
    The same model.

    Raises
    ------
    TypeError
        If it is not a model, or has no ``scvi.nn.DecoderSCVI`` of scvi-tools' own class.
    """
    module = _modules(model)
    parts = list(module.modules())
    for part in parts:
        if type(part) is scvi_nn.DecoderSCVI:
            _swap(part, {scvi_nn.DecoderSCVI: FusedDecoderSCVI, scvi_nn.FCLayers: FusedFCLayers})
    if not any(isinstance(part, FusedDecoderSCVI) for part in parts):
        decoders = {type(m).__name__ for n, m in module.named_modules() if "decoder" in n}
        raise TypeError(
            f"{type(model).__name__} has no scvi.nn.DecoderSCVI to fuse "
            f"(its decoders: {', '.join(sorted(decoders)) or 'none'})"
        )
    for owner in parts:
        owns = any(isinstance(child, FusedDecoderSCVI) for child in owner.children())
        # Pyro's modules have another life cycle (and no generative to speak of): decoder only.
        has_loss = hasattr(owner, "generative") and hasattr(owner, "loss")
        if owns and has_loss and not _is_fused(owner):
            owner.__class__ = _fused_module_class(type(owner))  # type: ignore[arg-type]
    if module is not model and hasattr(type(model), "train") and "train" not in vars(model):
        model.train = _FusedTrain(model)  # type: ignore[attr-defined]
    return model


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, (_FusedModule, FusedDecoderSCVI))


def unfuse(model: _Model) -> _Model:
    """Give a fused model back its stock classes, in place.

    Parameters
    ----------
    model
        A scvi-tools model or its ``module``; one that is not fused is left as it is.

    Returns
    -------
    The same model.

    Raises
    ------
    TypeError
        If it is not a model.
    """
    module = _modules(model)
    for part in module.modules():
        if isinstance(part, _FusedModule):
            part.__class__ = part._stock_class  # type: ignore[assignment]
    _swap(
        module,
        {FusedDecoderSCVI: scvi_nn.DecoderSCVI, FusedFCLayers: scvi_nn.FCLayers},
    )
    if isinstance(vars(model).get("train"), _FusedTrain):
        del model.train  # type: ignore[attr-defined]
    return model


@contextlib.contextmanager
def fused(model: _Model) -> Iterator[_Model]:
    """Fuse a model for the length of a ``with`` block; one that was fused already stays so.

    Parameters
    ----------
    model
        As in :func:`fuse`.

    Yields
    ------
    The same model.
    """
    was_fused = any(_is_fused(part) for part in _modules(model).modules())
    fuse(model)
    try:
        yield model
    finally:
        if not was_fused:
            unfuse(model)
