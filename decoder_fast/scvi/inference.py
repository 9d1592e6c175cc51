"""Posterior expression of fused models: only what is asked for, and means as they accumulate.

scvi-tools' methods decode samples x cells x genes, and take the genes, cells or means that were
asked for from there. Those here ask the same modules for the same random numbers, but have lazy
outputs (:mod:`decoder_fast.scvi.lazy`) compute the genes and the samples of cells that are wanted,
and add up samples rather than keep them. What they do not cover goes on to scvi-tools' own methods.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from scvi.model.base import RNASeqMixin
from scvi.utils import track
from torch import Tensor

from .decoder import joined
from .distributions import CellsLikelihood
from .lazy import LazyExpanded, real, rows, samples
from .module import FusedModule


def private(module: str, name: str) -> Any:
    """Return what scvi-tools has for itself; None where it has come to be elsewhere."""
    try:
        return getattr(importlib.import_module(f"scvi.{module}"), name, None)
    except ImportError:
        return None


_batch_codes = private("model._utils", "_get_batch_code_from_category")
_DistributionConcatenator = private("distributions._utils", "DistributionConcatenator")

_NUMBERS = (int, float, np.integer, np.floating)

#: Elements that are computed at a time, if it is more than one sample or cell.
MOST_ELEMENTS = 1 << 20


def arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> types.SimpleNamespace:
    """Return the arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return types.SimpleNamespace(**bound.arguments)


class FusedMethod:
    """A method of a fused model in the place of its class's own, which answers the rest."""

    name: str
    options: str  # all that are known here: scvi-tools may come to have others
    __wrapped__: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, types.MethodType(getattr(type(model), self.name), model))

    def __reduce__(self) -> Any:
        return type(self), (self.model,)

    def __repr__(self) -> str:
        return f"<fused {self.__wrapped__!r}>"

    @classmethod
    def replaces(cls, model: Any) -> bool:
        """Whether the model's own method is the one that this one knows."""
        own = getattr(type(model), cls.name, None)
        return own is not None and own is getattr(RNASeqMixin, cls.name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, or have scvi-tools answer."""
        said = self.covered(*args, **kwargs)
        if said is None:
            return self.__wrapped__(*args, **kwargs)
        with torch.inference_mode():
            return self.answer(self.model, said)

    @property
    def model(self) -> Any:
        """The model whose method this is."""
        return self.__wrapped__.__self__  # type: ignore[attr-defined]

    def covered(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the user said, defaults included; None if scvi-tools is to answer."""
        if not isinstance(self.model.module, FusedModule):
            return None
        said = arguments(self.__wrapped__, *args, **kwargs)
        known = vars(said).keys() == set(self.options.split())
        return said if known and self.covers(self.model, said) else None

    def covers(self, model: Any, said: Any) -> bool:
        """Whether what the user said is for :meth:`answer`, and valid."""
        raise NotImplementedError

    def answer(self, model: Any, said: Any) -> Any:
        """Answer."""
        raise NotImplementedError


class FusedNormalizedExpression(FusedMethod):
    """``get_normalized_expression``, where it is about several samples of a cell."""

    name = "get_normalized_expression"
    options = (
        "adata indices transform_batch gene_list library_size n_samples n_samples_overall weights "
        "batch_size return_mean return_numpy silent dataloader data_loader_kwargs "
        "importance_weighting_kwargs"
    )

    def covers(self, model: Any, said: Any) -> bool:
        """Whether means over samples, or samples of any cells, are wanted."""
        weighted = said.weights == "importance"
        if (
            _batch_codes is None
            or not (said.weights in (None, "uniform") or weighted)
            or not (said.library_size == "latent" or isinstance(said.library_size, _NUMBERS))
            or not isinstance(said.n_samples, int)
        ):
            return False
        if said.n_samples_overall is None:
            # Of one sample, and of all samples, lazy outputs compute no more than is wanted.
            loads = said.adata is None or said.dataloader is None
            return said.n_samples > 1 and bool(said.return_mean) and loads
        # The cells are counted before they are loaded.
        counted = said.dataloader is None and not said.data_loader_kwargs
        if weighted and not self._weighs(model, said):
            return False
        return said.n_samples == 1 and counted

    def _weighs(self, model: Any, said: Any) -> bool:
        """Whether importance weights are those that :class:`CellsLikelihood` is for."""
        return (
            _DistributionConcatenator is not None
            and type(model).get_importance_weights is RNASeqMixin.get_importance_weights
            and getattr(model.module, "gene_likelihood", None) in ("nb", "zinb")
            # scvi-tools refuses several batches, and other sizes change its weights.
            and np.size(said.transform_batch) == 1
            and said.library_size in (1, "latent")
        )

    def answer(self, model: Any, said: Any) -> Any:
        """Average over the samples of each cell, or take some samples of any cells."""
        asked = _Asked(model, said)
        if said.n_samples_overall is None:
            n_cells = None if asked.index is None else len(asked.index)
            means = _Cells(n_cells)
            for per_batch in asked.decoded(said.n_samples):
                of_batches = (_mean_of_samples(part, asked.genes) for part in per_batch)
                means.add(functools.reduce(Tensor.add_, of_batches).div_(len(asked.batches)))
            values = means.joined()
            if not asked.latent:
                values *= said.library_size
        else:
            values = self.draw(model, asked).of_genes(asked.genes)
        if said.return_numpy or asked.index is None:
            return values
        columns = asked.adata.var_names
        columns = columns if asked.genes is None else columns[asked.genes]
        return pd.DataFrame(values, columns=columns, index=asked.index)

    def drawn(self, *args: Any, **kwargs: Any) -> DrawnExpression:
        """Return samples of any cells, for a call that is :meth:`covered`."""
        with torch.inference_mode():
            return self.draw(self.model, _Asked(self.model, self.covered(*args, **kwargs)))

    def draw(self, model: Any, asked: _Asked) -> DrawnExpression:
        """Decode and draw ``n_samples_overall`` samples of any cells."""
        said = asked.said
        assert asked.index is not None
        n_cells = len(asked.index)
        n_samples = said.n_samples_overall // len(asked.indices) + 1  # of a mask its length
        mini_batches, p = asked.decoded(n_samples), None
        if said.weights == "importance":
            (batch,) = asked.batches
            kept = _Weighted(model, n_samples)
            for tensors in asked.loader:
                kept.add(tensors, batch, asked.latent)
            p = kept.weights(asked.adata, asked.indices, said.importance_weighting_kwargs)
            mini_batches = (iter([expression]) for expression in kept.expressions)
        # scvi-tools draws after it has decoded all samples of all cells. Nothing else draws
        # from NumPy meanwhile, so that the same are drawn here before, and decoded alone.
        drawn = np.random.choice(n_samples * n_cells, said.n_samples_overall, p=p)  # noqa: NPY002
        factor = 1 if asked.latent else said.library_size
        return DrawnExpression(mini_batches, drawn, n_cells, len(asked.batches), factor)


class _Asked:
    """What normalised expression is asked of: cells, batches, genes (None: all)."""

    def __init__(self, model: Any, said: Any) -> None:
        self.model, self.said = model, said
        self.loader, self.batches, self.index, self.genes = said.dataloader, [None], None, None
        self.latent = said.library_size == "latent"
        if self.loader is not None:
            return
        self.adata = adata = model._validate_anndata(said.adata)
        self.indices = np.arange(adata.n_obs) if said.indices is None else said.indices
        self.loader = model._make_data_loader(
            adata=adata,
            indices=self.indices,
            batch_size=said.batch_size,
            **(said.data_loader_kwargs or {}),
        )
        manager = model.get_anndata_manager(adata, required=True)
        self.batches = _batch_codes(manager, said.transform_batch)
        if said.gene_list is not None:
            self.genes = np.flatnonzero(adata.var_names.isin(said.gene_list))
        self.index = adata.obs_names[self.indices]

    def decoded(self, n_samples: int) -> Iterator[Iterator[Tensor]]:
        """For each mini-batch, expression under each of the batches."""
        for tensors in self.loader:
            yield (
                _normalized(_decoded(self.model, tensors, n_samples, batch)[1], self.latent)
                for batch in track(self.batches, disable=self.said.silent)
            )


class FusedLikelihoodParameters(FusedMethod):
    """``get_likelihood_parameters``, of the likelihoods for which scvi-tools has it."""

    name = "get_likelihood_parameters"
    options = "adata indices n_samples give_mean batch_size dataloader data_loader_kwargs"

    def covers(self, model: Any, said: Any) -> bool:
        """Whether the likelihood is a (zero-inflated) negative binomial."""
        loads = said.adata is None or said.dataloader is None
        known = getattr(model.module, "gene_likelihood", None) in ("nb", "zinb")
        return known and loads and isinstance(said.n_samples, int)

    def answer(self, model: Any, said: Any) -> dict[str, np.ndarray]:
        """Compute mean counts, dropout probabilities and inverse dispersions."""
        loader, n_cells = said.dataloader, None
        if loader is None:
            adata = model._validate_anndata(said.adata)
            loader = model._make_data_loader(
                adata=adata,
                indices=said.indices,
                batch_size=said.batch_size,
                **said.data_loader_kwargs,
            )
            names = adata.obs_names
            n_cells = len(names if said.indices is None else names[np.asarray(said.indices)])
        parameters = {"mean": "mu", "dropout": "zi_logits", "dispersions": "theta"}
        if model.module.gene_likelihood == "nb":
            del parameters["dropout"]
        cells = {name: _Cells(n_cells) for name in parameters}
        for tensors in loader:
            _, outputs = model.module.forward(
                tensors=tensors, inference_kwargs={"n_samples": said.n_samples}, compute_loss=False
            )
            raw = vars(outputs["px"])  # by its attributes they would be computed
            for name, parameter in parameters.items():
                then = torch.sigmoid if name == "dropout" else _same
                if said.give_mean and said.n_samples > 1:
                    cells[name].add(_mean_of_samples(raw[parameter], then=then))
                else:
                    cells[name].add(then(real(raw[parameter])))
        return {name: parts.joined() for name, parts in cells.items()}


def _decoded(model: Any, tensors: Any, n_samples: int, batch: Any) -> tuple[Any, Any]:
    """Infer a mini-batch; return what was inferred, and the distribution decoded from it."""
    inferred, generated = model.module.forward(
        tensors=tensors,
        inference_kwargs={"n_samples": n_samples},
        generative_kwargs=model._get_transform_batch_gen_kwargs(batch),
        compute_loss=False,
    )
    return inferred, generated["px"]


def _normalized(px: Any, latent: bool) -> Tensor:
    """Expression, (S, N, G) or (N, G): lazy, if the model has lazy outputs."""
    return px if isinstance(px, Tensor) else px.get_normalized("mu" if latent else "scale")


class _Weighted:
    """Decoded cells, kept as hidden units until their importance weights are known."""

    def __init__(self, model: Any, n_samples: int) -> None:
        self.model = model
        self.n_samples = n_samples
        self.expressions: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.posteriors = _DistributionConcatenator()
        self.decoded: list[Any] = []

    def add(self, tensors: Any, batch: Any, latent: bool) -> None:
        """Decode a mini-batch."""
        inferred, px = _decoded(self.model, tensors, self.n_samples, batch)
        self.expressions.append(_normalized(px, latent))
        self.latents.append(inferred["z"].cpu())
        self.posteriors.store_distribution(inferred["qz"])
        self.decoded.append(px)

    def weights(self, adata: Any, indices: Any, options: Any) -> Any:
        """Have scvi-tools weigh all samples of all cells."""
        axis = 1 if self.n_samples > 1 else 0
        px: Any = CellsLikelihood.of(self.decoded)
        if px is None:
            stored = _DistributionConcatenator()
            for one in self.decoded:
                stored.store_distribution(one)
            px = stored.get_concatenated_distributions(axis=axis)
        return self.model.get_importance_weights(
            adata,
            indices,
            qz=self.posteriors.get_concatenated_distributions(axis=0),
            px=px,
            zs=torch.cat(self.latents, axis),
            **options,
        )


def _of_genes(value: Tensor, genes: np.ndarray | None) -> Tensor:
    return real(value) if genes is None else value[..., genes]


def _n_genes(value: Tensor, genes: np.ndarray | None) -> int:
    return value.shape[-1] if genes is None else len(genes)


def _same(values: Tensor) -> Tensor:
    return values


def _mean_of_samples(
    value: Tensor,
    genes: np.ndarray | None = None,
    then: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """Mean of ``then(value[..., genes])`` over the first dimension."""
    n_samples, n_cells = value.shape[:2]
    if isinstance(value, LazyExpanded) and value.source.dim() < 3:  # the same in every sample
        n_samples = 1
    step = max(1, MOST_ELEMENTS // max(1, n_cells * _n_genes(value, genes)))
    parts = (
        samples(value, start, min(start + step, n_samples)) for start in range(0, n_samples, step)
    )
    sums = (then(_of_genes(part, genes)).sum(0) for part in parts)
    return functools.reduce(Tensor.add_, sums).div_(n_samples)


class DrawnExpression:
    """Expression of the drawn rows of (samples x cells, genes), in the order of drawing.

    Of lazy outputs only the hidden units of those rows are kept.

    Parameters
    ----------
    mini_batches
        For each mini-batch of cells, the expression under each of ``n_batches`` batches, of
        which the mean is taken.
    drawn
        Rows, (n_drawn,).
    n_cells
        Number of cells.
    n_batches
        Number of batches.
    factor
        What expression is multiplied by.
    """

    def __init__(
        self,
        mini_batches: Iterator[Iterator[Tensor]],
        drawn: np.ndarray,
        n_cells: int,
        n_batches: int,
        factor: float,
    ) -> None:
        self.n_drawn, self.factor = len(drawn), factor
        sample, cell = np.divmod(drawn, n_cells)
        parts: list[list[Tensor]] = [[] for _ in range(n_batches)]
        which, start, n_rows = np.empty(len(drawn), np.int64), 0, 0
        for expressions in mini_batches:
            for k, expression in enumerate(expressions):
                n_here = expression.shape[-2]
                (places,) = np.nonzero((cell >= start) & (cell < start + n_here))
                here = sample[places] * n_here + cell[places] - start
                here, there = np.unique(here, return_inverse=True)  # each is decoded once
                which[places] = n_rows + there
                parts[k].append(rows(expression, torch.from_numpy(here).to(expression.device)))
            start, n_rows = start + n_here, n_rows + len(here)
        #: Of each batch, the rows that were drawn; which of them comes where.
        self.batches = [joined(of_batch) for of_batch in parts]
        self.which = torch.from_numpy(which).to(self.batches[0].device)

    @torch.inference_mode()
    def of_genes(self, genes: np.ndarray | None) -> np.ndarray:
        """Compute those of some genes, (n_drawn, n_genes)."""
        n_rows, n_genes = len(self.batches[0]), _n_genes(self.batches[0], genes)
        step = max(1, MOST_ELEMENTS // max(1, n_genes))
        if n_rows <= step:
            step = max(1, len(self.which))  # all at once: a softmax keeps its normalisers
        out = torch.empty(len(self.which), n_genes, dtype=self.batches[0].dtype)
        for start in range(0, len(self.which), step):
            which = self.which[start : start + step]
            batches = self.batches
            if genes is None or n_rows > step:  # fresh: what is computed here is changed in place
                needed, which = which.unique(return_inverse=True)
                batches = [rows(batch, needed) for batch in batches]
            parts = (_of_genes(batch, genes) for batch in batches)
            mean = functools.reduce(Tensor.add_, parts).div_(len(batches)).mul_(self.factor)
            out[start : start + step] = mean.index_select(0, which)
        return out.numpy()


class _Cells:
    """An array of all cells, put together of mini-batches; in its place, if their number is known.

    Parameters
    ----------
    n_cells
        Number of cells, the last dimension but one, or None.
    """

    def __init__(self, n_cells: int | None) -> None:
        self.n_cells = n_cells
        self.parts: list[np.ndarray] = []
        self.whole: np.ndarray | None = None
        self.n_seen = 0

    def add(self, part: Tensor) -> None:
        """Add the cells of one mini-batch."""
        array = part.cpu().numpy()
        if self.n_cells is None:
            self.parts.append(array)
            return
        if self.whole is None:
            shape = (*array.shape[:-2], self.n_cells, array.shape[-1])
            self.whole = np.empty(shape, array.dtype)
        stop = self.n_seen + array.shape[-2]
        self.whole[..., self.n_seen : stop, :] = array
        self.n_seen = stop

    def joined(self) -> np.ndarray:
        """All cells."""
        if self.whole is None:
            return np.concatenate(self.parts, axis=-2)
        return self.whole[..., : self.n_seen, :]
