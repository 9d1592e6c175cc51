"""Posterior expression of fused models: only what is asked for, and means as they accumulate.

scvi-tools' methods decode samples x cells x genes, and take the genes, cells or means that were
asked for from there. Those here ask the same modules for the same random numbers, but have lazy
outputs (:mod:`decoder_fast.lazy`) compute the genes and the samples of cells that are wanted, and
add up samples rather than keep them. What they do not cover goes on to scvi-tools' own methods.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from scvi.distributions._utils import DistributionConcatenator
from scvi.model.base import RNASeqMixin
from scvi.utils import track
from torch import Tensor

from ..lazy import LazyExpanded, real, rows, samples
from .distributions import CellsLikelihood
from .module import FusedModule

_NUMBERS = (int, float, np.integer, np.floating)

#: Elements that are computed at a time, if it is more than one sample or cell.
_MOST_ELEMENTS = 1 << 20


class FusedMethod:
    """A method of a fused model in the place of its class's own, which answers the rest."""

    name: str
    options: str  # all that are known here: scvi-tools may come to have others
    __wrapped__: Callable[..., Any]

    def __init__(self, model: Any) -> None:
        functools.update_wrapper(self, types.MethodType(getattr(type(model), self.name), model))

    def __reduce__(self) -> Any:
        return type(self), (self.__wrapped__.__self__,)  # type: ignore[attr-defined]

    @classmethod
    def replaces(cls, model: Any) -> bool:
        """Whether the model's own method is the one that this one knows."""
        own = getattr(type(model), cls.name, None)
        return own is not None and own is getattr(RNASeqMixin, cls.name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer, or have scvi-tools answer."""
        stock = self.__wrapped__
        model: Any = stock.__self__  # type: ignore[attr-defined]
        if isinstance(model.module, FusedModule):
            bound = inspect.signature(stock).bind(*args, **kwargs)
            bound.apply_defaults()
            said = types.SimpleNamespace(**bound.arguments)
            if vars(said).keys() == set(self.options.split()) and self.covers(model, said):
                with torch.inference_mode():
                    return self.answer(model, said)
        return stock(*args, **kwargs)

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
            not (said.weights in (None, "uniform") or weighted)
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
            type(model).get_importance_weights is RNASeqMixin.get_importance_weights
            and getattr(model.module, "gene_likelihood", None) in ("nb", "zinb")
            # scvi-tools refuses several batches, and other sizes change its weights.
            and np.size(said.transform_batch) == 1
            and said.library_size in (1, "latent")
        )

    def answer(self, model: Any, said: Any) -> Any:
        """Average over the samples of each cell, or take some samples of any cells."""
        loader, batches, index, genes = said.dataloader, [None], None, None
        if loader is None:
            # Not before it is needed: scvi-tools may come to have it elsewhere.
            from scvi.model._utils import _get_batch_code_from_category

            adata = model._validate_anndata(said.adata)
            indices = np.arange(adata.n_obs) if said.indices is None else said.indices
            loader = model._make_data_loader(
                adata=adata,
                indices=indices,
                batch_size=said.batch_size,
                **(said.data_loader_kwargs or {}),
            )
            manager = model.get_anndata_manager(adata, required=True)
            batches = _get_batch_code_from_category(manager, said.transform_batch)
            if said.gene_list is not None:
                genes = np.flatnonzero(adata.var_names.isin(said.gene_list))
            index = adata.obs_names[indices]
        latent = said.library_size == "latent"

        def decoded(n_samples: int) -> Iterator[Iterator[Tensor]]:
            """For each mini-batch, expression under each of the batches."""
            for tensors in loader:
                yield (
                    _normalized(_decoded(model, tensors, n_samples, batch)[1], latent)
                    for batch in track(batches, disable=said.silent)
                )

        if said.n_samples_overall is None:
            means = _Cells(None if index is None else len(index))
            for per_batch in decoded(said.n_samples):
                of_batches = (_mean_of_samples(expression, genes) for expression in per_batch)
                means.add(functools.reduce(Tensor.add_, of_batches).div_(len(batches)))
            values = means.joined()
        else:
            assert index is not None
            n_samples = said.n_samples_overall // len(indices) + 1
            mini_batches, p = decoded(n_samples), None
            if said.weights == "importance":
                (batch,) = batches
                kept = _Weighted(model, n_samples)
                for tensors in loader:
                    kept.add(tensors, batch, latent)
                p = kept.weights(adata, indices, said.importance_weighting_kwargs)
                mini_batches = (iter([expression]) for expression in kept.expressions)
            # scvi-tools draws after it has decoded all samples of all cells. Nothing else draws
            # from NumPy meanwhile, so that the same are drawn here before, and decoded alone.
            drawn = np.random.choice(n_samples * len(index), said.n_samples_overall, p=p)  # noqa: NPY002
            values = _sum_of_batches(mini_batches, drawn, len(index), genes)
            values /= len(batches)
        if not latent:
            values *= said.library_size
        if said.return_numpy or index is None:
            return values
        columns = adata.var_names if genes is None else adata.var_names[genes]
        return pd.DataFrame(values, columns=columns, index=index)


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
            n_cells = len(names if said.indices is None else names[said.indices])
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


FUSED_METHODS: tuple[type[FusedMethod], ...] = (
    FusedNormalizedExpression,
    FusedLikelihoodParameters,
)


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
        self.posteriors = DistributionConcatenator()
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
            stored = DistributionConcatenator()
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
    step = max(1, _MOST_ELEMENTS // max(1, n_cells * _n_genes(value, genes)))
    parts = (
        samples(value, start, min(start + step, n_samples)) for start in range(0, n_samples, step)
    )
    sums = (then(_of_genes(part, genes)).sum(0) for part in parts)
    return functools.reduce(Tensor.add_, sums).div_(n_samples)


def _sum_of_batches(
    mini_batches: Iterator[Iterator[Tensor]],
    drawn: np.ndarray,
    n_cells: int,
    genes: np.ndarray | None,
) -> np.ndarray:
    """Sum over batches of the drawn rows of (samples x cells, genes), in the order of drawing."""
    sample, cell = np.divmod(drawn, n_cells)
    out = torch.zeros(0)
    start = 0
    for per_batch in mini_batches:
        for expression in per_batch:
            n_here, n_genes = expression.shape[-2], _n_genes(expression, genes)
            if out.dim() == 1:
                out = torch.zeros(len(drawn), n_genes, dtype=expression.dtype)
            (places,) = np.nonzero((cell >= start) & (cell < start + n_here))
            here = sample[places] * n_here + cell[places] - start
            here, which = np.unique(here, return_inverse=True)  # each is decoded once
            step = max(1, _MOST_ELEMENTS // max(1, n_genes))
            for low in range(0, len(here), step):
                index = torch.from_numpy(here[low : low + step]).to(expression.device)
                part = _of_genes(rows(expression, index), genes).cpu()
                wanted = (which >= low) & (which < low + step)
                out[places[wanted]] += part[which[wanted] - low]
        start += n_here
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
