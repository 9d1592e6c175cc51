"""The bridge to scvi-tools: ``fuse(model)``, ``unfuse(model)`` and ``with fused(model)``.

Fusing changes classes and nothing else. The model's decoder becomes a :class:`FusedDecoderSCVI` and
the module that owns it a subclass of its own class, both in place: parameters, buffers, hooks and
optimizers stay as they are, and a saved model knows nothing of it.

In a fused module the decoder's outputs are lazy (:mod:`decoder_fast.scvi.lazy`), and the
distributions that the model builds from them answer ``log_prob(x).sum(-1)`` by the fused likelihood
of :class:`decoder_fast.DecoderSCVI`. The losses of the models are their own.

A fused model's ``train`` has its data splitter hand over CSR counts as CSR: the module sees them as
dense (:class:`decoder_fast.scvi.lazy.LazyCounts`), the fused likelihood takes the CSR. Its methods
of posterior expression (:mod:`decoder_fast.scvi.inference`) compute the genes and samples wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

try:
    import scvi.nn as scvi_nn
    from scvi.dataloaders import AnnDataLoader
except ImportError as error:
    raise ImportError(
        "decoder_fast.scvi needs scvi-tools, which is not installed or does not import "
        f"({error}): pip install scvi-tools"
    ) from error

from .data import FusedAnnDataLoader
from .decoder import FusedDecoderSCVI, FusedFCLayers
from .differential import FusedDifferentialExpression
from .inference import FusedLikelihoodParameters, FusedMethod, FusedNormalizedExpression
from .module import FusedModule, fused_module_class, takes_csr
from .training import FusedTrain

__all__ = ["FusedDecoderSCVI", "FusedFCLayers", "fuse", "fused", "unfuse"]

_Model = TypeVar("_Model")

_FUSED_METHODS: tuple[type[FusedMethod], ...] = (
    FusedNormalizedExpression,
    FusedLikelihoodParameters,
    FusedDifferentialExpression,
)


def _modules(model: Any) -> nn.Module:
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if module is None and hasattr(model, "train") and hasattr(model, "module"):
        raise ValueError(
            f"this {type(model).__name__} has no module before train(datamodule=...) makes it: "
            "fuse it afterwards, or give its constructor the data module's registry"
        )
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

    Counts that AnnData holds as a ``scipy.sparse.csr_matrix``, in memory or on disk
    (``backed="r"``), stay CSR from there to the loss, in training and in inference: no dense
    mini-batch is built, the encoder's first layer multiplies the non-zeros alone (on CPUs), and
    duplicates are summed. So do, in training, zarr stores read by annbatch (``AnnbatchDataModule``
    of scvi-tools 1.5) and CSR tensors of a ``datamodule`` of the user's own.
    ``model.train(load_sparse_tensor=False)`` turns that off. Dense mini-batches remain for CSC, for
    MULTIVI and ContrastiveVI, on MPS, and where a module is fused instead of its model.

    Adam and AdamW are torch's fused ones (on CPU and CUDA, in full precision); an
    ``optimizer_creator`` of the user's own stays.

    ``model.train(cuda_graph=True)`` records a whole training step (forward, backward, optimizer) on
    an NVIDIA GPU and replays it for every mini-batch of the same size; the last, smaller one of an
    epoch runs as usual. A recorded step does not check its latents for NaN. Where steps cannot be
    recorded, a warning says why and training goes on without.

    What is asked of it later decodes the genes and samples that are asked for, and no others:
    ``get_normalized_expression`` (and with it ``differential_expression``) and
    ``get_likelihood_parameters`` add samples up instead of keeping them. The random numbers are
    those of the stock model.

    Parameters
    ----------
    model
        A scvi-tools model, or its ``module``, that has a ``scvi.nn.DecoderSCVI``: SCVI, SCANVI,
        PoissonVI, JointEmbeddingSCVI and others train through the fused likelihood, as do MULTIVI
        and ContrastiveVI; AUTOZI and ResolVI, whose likelihoods differ, get the fused decoder.

    Returns
    -------
    object
        The same model.

    Raises
    ------
    TypeError
        If it is not a model, or has no ``scvi.nn.DecoderSCVI`` of scvi-tools' own class.
    ValueError
        If the model gets its module from a data module only when it is trained.
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
            owner.__class__ = fused_module_class(type(owner))  # type: ignore[arg-type]
    if module is not model:
        if hasattr(type(model), "train") and "train" not in vars(model):
            model.train = FusedTrain(model)  # type: ignore[attr-defined]
        if takes_csr(module) and getattr(model, "_data_loader_cls", None) is AnnDataLoader:
            model._data_loader_cls = FusedAnnDataLoader  # type: ignore[attr-defined]
        for method in _FUSED_METHODS:
            if method.replaces(model) and method.name not in vars(model):
                setattr(model, method.name, method(model))
    return model


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, (FusedModule, FusedDecoderSCVI))


def unfuse(model: _Model) -> _Model:
    """Give a fused model back its stock classes, in place.

    Parameters
    ----------
    model
        A scvi-tools model or its ``module``; one that is not fused is left as it is.

    Returns
    -------
    object
        The same model.

    Raises
    ------
    TypeError, ValueError
        If it is not a model, or has no module yet.
    """
    module = _modules(model)
    for part in module.modules():
        if isinstance(part, FusedModule):
            part.__class__ = part._stock_class  # type: ignore[assignment]
    _swap(
        module,
        {FusedDecoderSCVI: scvi_nn.DecoderSCVI, FusedFCLayers: scvi_nn.FCLayers},
    )
    if isinstance(vars(model).get("train"), FusedTrain):
        del model.train  # type: ignore[attr-defined]
    if vars(model).get("_data_loader_cls") is FusedAnnDataLoader:
        del model._data_loader_cls  # type: ignore[attr-defined]
    for name in [name for name, value in vars(model).items() if isinstance(value, FusedMethod)]:
        delattr(model, name)
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
    object
        The same model.

    Raises
    ------
    TypeError, ValueError
        As :func:`fuse`.
    """
    was_fused = any(_is_fused(part) for part in _modules(model).modules())
    fuse(model)
    try:
        yield model
    finally:
        if not was_fused:
            unfuse(model)
