"""What users ask of a trained SCVI model, stock and fused: time, and peak of the extra memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scvi
import torch

from decoder_fast import fuse
from decoder_fast.datasets import simulate_atlas

from .fresh import fresh, peak_extra_bytes
from .timing import interleaved

NAMES = ("stock eager", "ours")
SAMPLES = 25
FEW_GENES = 200
IMPORTANCE = "mean of 500 samples weighted by the likelihood of 64 cells"
#: Largest difference from stock's answer, by the largest element.
TOLERANCE = 1e-4
#: Of weighted samples some are others, where their drawing lies within a rounding of a weight.
TOLERANCE_OF_DRAWS = 2e-2

#: What is asked, and how.
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    f"expression of {FEW_GENES} genes, {SAMPLES} samples": lambda model: (
        model.get_normalized_expression(
            n_samples=SAMPLES,
            gene_list=list(model.adata.var_names[:FEW_GENES]),
            return_numpy=True,
        )
    ),
    f"expression of all genes, {SAMPLES} samples": lambda model: model.get_normalized_expression(
        n_samples=SAMPLES, return_numpy=True
    ),
    "expression of 500 samples of any cells": lambda model: model.get_normalized_expression(
        n_samples_overall=500, return_numpy=True
    ),
    IMPORTANCE: lambda model: model.get_normalized_expression(
        **{"indices": np.arange(model.adata.n_obs), "n_samples_overall": 500},
        **{"weights": "importance", "max_cells": 64, "return_numpy": True},
        **{"n_mc_samples": 2 * SAMPLES, "n_mc_samples_per_pass": SAMPLES},
    ).mean(0),
    "differential expression": lambda model: model.differential_expression(
        **{"idx1": np.arange(model.adata.n_obs) % 2 == 0, "mode": "change", "silent": True}
    )["scale1"].sort_index(),
    f"likelihood parameters, means of {SAMPLES} samples": lambda model: (
        model.get_likelihood_parameters(n_samples=SAMPLES, give_mean=True)["mean"]
    ),
    f"marginal log-likelihood, {SAMPLES} samples": lambda model: model.get_marginal_ll(
        n_mc_samples=SAMPLES, n_mc_samples_per_pass=SAMPLES, return_mean=False
    ),
    "reconstruction error": lambda model: model.get_reconstruction_error(return_mean=False)[
        "reconstruction_loss"
    ],
}


@dataclass(frozen=True)
class Case:
    """A question to a model of so many cells and genes."""

    cells: int
    genes: int
    question: str


CASES = (
    Case(5_000, 20_000, next(iter(QUESTIONS))),
    *(Case(1_024, 4_000, question) for question in QUESTIONS),
    Case(5_000, 4_000, "expression of 500 samples of any cells"),
    Case(1_024, 20_000, "differential expression"),
)


def cases(quick: bool) -> tuple[Case, ...]:
    """The questions; the first, of fewer cells and genes, when in a hurry."""
    return CASES[1:2] if quick else CASES


def _models(case: Case, names: tuple[str, ...]) -> dict[str, Any]:
    adata = simulate_atlas(n_cells=case.cells, n_genes=case.genes, n_batches=4, seed=0)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    models = {}
    for name in names:
        scvi.settings.seed = 0
        model = scvi.model.SCVI(adata)
        model.is_trained_ = True  # how well does not matter here
        model.module.eval()
        models[name] = fuse(model) if name == "ours" else model
    return models


def _ask(case: Case, model: Any) -> Any:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return QUESTIONS[case.question](model)


def peak(case: Case, threads: int, name: str) -> int | None:
    """Peak of the extra memory of a question, the answer included."""
    torch.set_num_threads(threads)
    model = _models(case, (name,))[name]
    model.get_latent_representation(indices=np.arange(2))  # what is loaded once
    return peak_extra_bytes(lambda: _ask(case, model))


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Compare the answers, then time them, then measure memory."""
    models = _models(case, NAMES)
    stock, ours = (np.asarray(_ask(case, models[name])) for name in NAMES)
    error = float(np.abs(ours - stock).max() / np.abs(stock).max())
    if not error <= (TOLERANCE_OF_DRAWS if case.question == IMPORTANCE else TOLERANCE):
        raise AssertionError(f"{case}: ours is off by {error:.1e} of the largest element")
    threads = torch.get_num_threads()
    return {
        "shape": f"{case.cells:,} cells x {case.genes:,} genes, zinb",
        "what": case.question,
        **interleaved(
            {name: lambda model=model: _ask(case, model) for name, model in models.items()},
            repeats=min(repeats, 3 if case.cells * case.genes > 1 << 25 else repeats),
        ),
        "peak extra bytes": {name: fresh(peak, case, threads, name) for name in NAMES},
    }
