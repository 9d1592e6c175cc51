"""Differential expression of fused models: a block of genes at a time.

scvi-tools samples the expression of all genes in two groups of cells, pairs the samples, and
compares them gene by gene, in several arrays of samples x genes. Here the samples are kept as
hidden units, and scvi-tools' own comparison gets the genes of one block after another.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.model.base import DifferentialComputation

from .data import replaced
from .inference import (
    MOST_ELEMENTS,
    DrawnExpression,
    FusedMethod,
    FusedNormalizedExpression,
    arguments,
    private,
)

_estimate_pseudocounts = private("model.base._differential", "estimate_pseudocounts_offset")
_estimate_delta = private("model.base._differential", "estimate_delta")

#: Options of the comparison that are known here: scvi-tools may come to have others.
_OPTIONS = (
    "idx1 idx2 mode batchid1 batchid2 use_observed_batches n_samples_overall use_permutation "
    "m_permutation change_fn m1_domain_fn delta pseudocounts threshold_counts test_mode "
    "cred_interval_lvls"
)


class FusedDifferentialExpression(FusedMethod):
    """``differential_expression`` with :class:`FusedDifferentialComputation`."""

    name = "differential_expression"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have scvi-tools answer, with another class for its computations."""
        if private("model.base._de_core", "DifferentialComputation") is not DifferentialComputation:
            return self.__wrapped__(*args, **kwargs)
        core = importlib.import_module("scvi.model.base._de_core")
        with replaced(core, DifferentialComputation=FusedDifferentialComputation):
            return self.__wrapped__(*args, **kwargs)


class FusedDifferentialComputation(DifferentialComputation):
    """scvi-tools' computations; of fused models' expression a block of genes at a time."""

    def get_bayes_factors(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Compare two groups of cells: as scvi-tools, of which the arguments are."""
        stock = super().get_bayes_factors
        said = arguments(stock, *args, **kwargs)
        if not self._covers(said):
            return stock(*args, **kwargs)
        if self.representation_fn is not None:
            said.idx1 = self.filter_outlier_cells(said.idx1)
            said.idx2 = self.filter_outlier_cells(said.idx2)
        groups = [
            _Group(self, selection, batchid, said)
            for selection, batchid in ((said.idx1, said.batchid1), (said.idx2, said.batchid2))
        ]
        state = np.random.get_state()  # noqa: NPY002
        compare = functools.partial(self._compare, stock, said, groups, state)
        if said.mode == "change" and said.pseudocounts is None:
            said.pseudocounts = self._pseudocounts(said, compare)
        after = None
        if said.mode == "change" and said.delta is None:
            said.m1_domain_fn, said.delta = self._domain(compare)
            after = np.random.get_state()  # noqa: NPY002
        blocks = list(compare(np.arange(self.adata.n_vars)))
        if after is not None:
            np.random.set_state(after)  # noqa: NPY002
        return {
            name: np.concatenate([block[name] for block in blocks]) if np.ndim(value) else value
            for name, value in blocks[0].items()
        }

    def _covers(self, said: Any) -> bool:
        """Whether no gene's answer depends on other genes, but by what is estimated of all."""
        if vars(said).keys() != set(_OPTIONS.split()):
            return False
        if _estimate_pseudocounts is None or _estimate_delta is None:
            return False
        expression = getattr(self.model_fn, "func", None)
        if not isinstance(expression, FusedNormalizedExpression):
            return False
        if expression.covered(self.adata, n_samples_overall=1, **self.model_fn.keywords) is None:
            return False
        own = said.change_fn not in (None, "log-fold") or said.m1_domain_fn is not None
        own |= np.ndim(said.pseudocounts) > 0
        return said.mode == "vanilla" or not own

    def _compare(
        self,
        stock: Callable[..., dict[str, Any]],
        said: Any,
        groups: list[_Group],
        state: Any,
        genes: np.ndarray,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Have scvi-tools compare the groups' samples of some genes, block by block."""
        n_samples = max(len(group.batch) for group in groups)
        if said.use_permutation and said.m_permutation is not None:
            n_samples = max(n_samples, said.m_permutation)
        step = max(1, MOST_ELEMENTS // n_samples)
        for start in range(0, len(genes), step):
            block = genes[start : start + step]
            scales = (group.scales(block) for group in groups)
            np.random.set_state(state)  # noqa: NPY002  (the same pairs of samples in every block)
            with (
                replaced(
                    self,
                    representation_fn=None,
                    scale_sampler=lambda scales=scales, **_: next(scales),
                ),
                warnings.catch_warnings(),
            ):
                if start:
                    warnings.simplefilter("ignore")  # they were said of the first block
                yield stock(**{**vars(said), **options})

    def _pseudocounts(self, said: Any, compare: Callable[..., Iterator[Any]]) -> Any:
        """Estimate pseudocounts as scvi-tools does: from all genes that are not expressed."""
        x = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        zero_a, zero_b = (
            np.asarray(np.mean(x[cells], 0)).flatten() < said.threshold_counts
            for cells in (said.idx1, said.idx2)
        )
        genes = np.flatnonzero(zero_a | zero_b)
        largest: dict[str, Any] = {}

        def keep_largest(a: Any, b: Any, pseudocounts: Any) -> Any:
            largest["now"] = np.stack([a.max(0), b.max(0)])
            return np.zeros((1, a.shape[1]))

        of_genes = [
            largest["now"] for _ in compare(genes, change_fn=keep_largest, pseudocounts=1.0)
        ]
        maxima = np.zeros((2, self.adata.n_vars), np.float32)
        if of_genes:
            maxima = maxima.astype(of_genes[0].dtype)
            maxima[:, genes] = np.concatenate(of_genes, axis=1)
        return _estimate_pseudocounts(
            scales_a=maxima[:1], scales_b=maxima[1:], where_zero_a=zero_a, where_zero_b=zero_b
        )

    def _domain(self, compare: Callable[..., Iterator[Any]]) -> tuple[Callable[..., Any], float]:
        """Estimate the least change that counts, as scvi-tools does: from all genes' means.

        Twice, at random: once to compare, and once to say.
        """
        means: list[np.ndarray] = []

        def keep_mean(samples: Any) -> Any:
            means.append(samples.mean(0))
            return np.zeros((2, *samples.shape), dtype=bool)

        for _ in compare(np.arange(self.adata.n_vars), m1_domain_fn=keep_mean, delta=1.0):
            pass
        delta, said = (_estimate_delta(lfc_means=np.concatenate(means)) for _ in range(2))
        return lambda samples: (samples >= delta, samples < -delta), said


class _Group:
    """Samples of a group of cells, kept as hidden units."""

    def __init__(self, computation: Any, selection: Any, batchid: Any, said: Any) -> None:
        self.drawn: list[DrawnExpression] = []
        model_fn, self.n_genes = computation.model_fn, computation.adata.n_vars

        def draw(*args: Any, **kwargs: Any) -> np.ndarray:
            self.drawn.append(model_fn.func.drawn(*args, **model_fn.keywords, **kwargs))
            return np.empty((self.drawn[-1].n_drawn, 0))

        with replaced(computation, model_fn=draw):
            sampled = computation.scale_sampler(
                selection=selection,
                batchid=batchid,
                use_observed_batches=said.use_observed_batches,
                n_samples_overall=said.n_samples_overall,
            )
        self.batch = sampled["batch"]

    def scales(self, genes: np.ndarray) -> dict[str, np.ndarray]:
        """Return what ``scale_sampler`` does, of some genes."""
        some = None if len(genes) == self.n_genes else genes
        return {
            "scale": np.concatenate([drawn.of_genes(some) for drawn in self.drawn]),
            "batch": self.batch,
        }
