"""The decoder of a fused model, and its lazy outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import scvi.nn as scvi_nn
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nn as fast
from .lazy import LazyCheck, LazyExp, LazyTensor, broadcast, real

#: Whether decoders answer with lazy outputs: inside a fused module.
lazy_outputs: ContextVar[bool] = ContextVar("decoder_fast_lazy_outputs", default=False)


class Decoded:
    """What one call of a decoder computed (hidden units), and what it can compute from them."""

    def __init__(self, decoder: fast.DecoderSCVI, hidden: Tensor, library: Tensor) -> None:
        self.decoder = decoder
        self.hidden = hidden
        self.library = library

    @functools.cached_property
    def _scale_and_rate(self) -> tuple[Tensor, Tensor]:
        return self.decoder._scale_and_rate(self.hidden, self.library)

    @functools.cached_property
    def _normaliser(self) -> Tensor | None:
        return self.decoder._hidden_normaliser(self.hidden)

    def compute(self, output: str, genes: Tensor | None = None) -> Tensor:
        """Compute one of the decoder's outputs; without gradients it may be of some genes only."""
        if output in ("px_r", "px_dropout"):
            head = getattr(self.decoder, f"{output}_decoder")
            if genes is None:
                return head(self.hidden)
            bias = None if head.bias is None else head.bias[genes]
            return F.linear(self.hidden, head.weight[genes], bias)
        if genes is None and torch.is_grad_enabled():
            return self._scale_and_rate[("px_scale", "px_rate").index(output)]
        # Nothing here is kept for a backward pass: the one output, and in place.
        normaliser = None if genes is None else self._normaliser
        scale = self.decoder._hidden_scale(self.hidden, genes, normaliser)
        return scale if output == "px_scale" else scale.mul_(self.library.exp())

    def samples(self, start: int, stop: int) -> Decoded:
        """Return the part of it that belongs to some of the Monte-Carlo samples."""
        library = self.library
        if library.dim() == 3 and library.shape[0] != 1:
            library = library[start:stop]
        return Decoded(self.decoder, self.hidden[start:stop], library)

    def rows(self, index: Tensor) -> Decoded:
        """Return some of its rows, which are cells, or cells of one sample after another."""
        library = self.library.expand(*self.hidden.shape[:-1], 1)
        hidden, library = (t.flatten(0, -2)[index] for t in (self.hidden, library))
        return Decoded(self.decoder, hidden, library)

    def cells(self, start: int, length: int) -> Decoded:
        """Return the part of it that belongs to some of the cells."""
        library = self.library
        if library.shape[-2] != 1:
            library = library.narrow(-2, start, length)
        return Decoded(self.decoder, self.hidden.narrow(-2, start, length), library)


class LazyOutput(LazyTensor):
    """One output of a decoder."""

    decoded: Decoded
    output: str  # its name
    whole: LazyOutput | None  # of which this is a slice of cells
    start: int

    @classmethod
    def of(cls, decoded: Decoded, output: str) -> LazyOutput:
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
        if func in (torch.split, Tensor.split) and args and args[0] is self:
            return self._split(*args[1:], **kwargs)
        if func is Tensor.__getitem__ and args[0] is self:
            return self._of_genes(args[1])
        if self._holds(func, args):
            return LazyCheck(
                self.shape, torch.bool, self.device, comparison=lambda: func(*map(real, args))
            )
        return broadcast(func, args)

    def _holds(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether ``func`` is a comparison that is true of all numbers that this output can be."""
        if func in (Tensor.__ge__, Tensor.ge) and args[0] is self:
            # a rate is exp(.) * softmax(.)
            is_rate = self.output in ("px_scale", "px_rate")
            return is_rate and isinstance(args[1], (int, float)) and args[1] == 0
        return func in (Tensor.__eq__, Tensor.eq) and args[0] is args[1] is self

    def _of_genes(self, index: Any) -> Any:
        """Compute ``self[..., genes]`` alone, where ``genes`` is a mask or a list."""
        if self._value is not None or self._grad_enabled:
            return NotImplemented
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis):
            return NotImplemented
        if not isinstance(index[1], (list, np.ndarray, Tensor)):  # a slice is a view
            return NotImplemented
        genes = torch.arange(self.shape[-1], device=self.device)[index[1]]
        return self.decoded.compute(self.output, genes) if genes.dim() == 1 else NotImplemented

    def samples(self, start: int, stop: int) -> Tensor:
        """Return some of the Monte-Carlo samples, lazily."""
        return LazyOutput.of(self.decoded.samples(start, stop), self.output)

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows, lazily."""
        return LazyOutput.of(self.decoded.rows(index), self.output)

    def _split(self, sizes: Any, dim: int = 0) -> Any:
        if dim % self.dim() != self.dim() - 2 or not isinstance(sizes, (list, tuple)):
            return NotImplemented
        if sum(sizes) != self.shape[-2] or min(sizes, default=0) < 0:
            return NotImplemented  # torch says what is wrong
        parts, start = [], 0
        for length in sizes:
            part = LazyOutput.of(self.decoded.cells(start, length), self.output)
            part.whole, part.start = self, start
            parts.append(part)
            start += length
        return tuple(parts)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of several, (n, G) each, as one: lazy, if all are one decoder's output."""
    outputs = [part for part in parts if isinstance(part, LazyOutput)]
    if len(outputs) < len(parts) or len({(p.decoded.decoder, p.output) for p in outputs}) > 1:
        return parts[0] if len(parts) == 1 else torch.cat([real(part) for part in parts])
    hidden = torch.cat([part.decoded.hidden for part in outputs])
    library = torch.cat([part.decoded.library for part in outputs])
    return LazyOutput.of(Decoded(outputs[0].decoded.decoder, hidden, library), outputs[0].output)


def _has_backward_hooks(module: torch.nn.Module) -> bool:
    """Whether torch will want real outputs of a module, to follow gradients through it."""
    everywhere = torch.nn.modules.module
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


class FusedFCLayers(fast.FCLayers, scvi_nn.FCLayers):
    """:class:`decoder_fast.FCLayers` that scvi-tools' surgery recognises as its own."""


class FusedDecoderSCVI(fast.DecoderSCVI, scvi_nn.DecoderSCVI):
    """:class:`decoder_fast.DecoderSCVI` in the place of scvi-tools' own."""

    def forward(  # type: ignore[override]
        self, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Decode; inside a fused module, to lazy tensors."""
        if (
            not lazy_outputs.get()
            or self._unfused_heads() is not None
            or _has_backward_hooks(self)
            or z.dim() not in (2, 3)
            or library.dim() not in (2, z.dim())
            or library.shape[-1] != 1
        ):
            return super().forward(dispersion, z, library, *cat_list)
        decoded = Decoded(self, self.px_decoder(z, *cat_list), library)
        return (
            LazyOutput.of(decoded, "px_scale"),
            LazyOutput.of(decoded, "px_r") if dispersion == "gene-cell" else None,
            LazyOutput.of(decoded, "px_rate"),
            LazyOutput.of(decoded, "px_dropout"),
        )
