"""Posterior expression of fused models: stock's answers, and nothing computed that is not asked."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

scvi = pytest.importorskip("scvi", reason="the methods are those of scvi-tools' models")

from scvi.model.base import DifferentialComputation, RNASeqMixin  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from decoder_fast import fuse, unfuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402
from decoder_fast.ops.softmax_library import log_sum_exp  # noqa: E402
from decoder_fast.reference import softmax_library as reference  # noqa: E402
from decoder_fast.scvi import differential, inference  # noqa: E402
from decoder_fast.scvi.decoder import Decoded, joined  # noqa: E402
from decoder_fast.scvi.lazy import LazyExpanded, LazyTensor, real, rows, samples  # noqa: E402

SCVI = scvi.model.SCVI
N, G = 110, 70

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore"),  # of scvi-tools' advice on tiny data
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def atlas():
    adata = simulate_atlas(n_cells=N, n_genes=G, n_batches=3, n_cell_types=2, seed=0)
    rng = np.random.default_rng(0)
    adata.obs["size_factor"] = np.asarray(adata.X.sum(1)).ravel() / 100
    adata.obs["percent_mito"] = rng.normal(size=N)
    adata.obs["donor"] = [f"d{i}" for i in rng.integers(0, 4, N)]
    return adata


def as_if_trained(model):
    """Other parameters and running statistics than those that a model starts with."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.module.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    model.module.eval()
    model.is_trained_ = True
    return model


def make(atlas, setup=None, cls=SCVI, **kwargs):
    adata = atlas.copy()
    if cls is SCVI:
        setup = {"labels_key": "cell_type", **(setup or {})}
        kwargs = {"n_hidden": 16, **kwargs}
    cls.setup_anndata(adata, batch_key="batch", **(setup or {}))
    return as_if_trained(cls(adata, **kwargs))


def seeded(ask, model):
    """Ask, and what the generators give next."""
    torch.manual_seed(1)
    np.random.seed(1)
    return ask(model), (torch.rand(1).item(), np.random.random())


def both(model, ask):
    """Answers of the stock model and of the fused one; they draw the same random numbers."""
    stock, after_stock = seeded(ask, unfuse(model))
    ours, after_ours = seeded(ask, fuse(model))
    assert after_stock == after_ours, "other random numbers were drawn"
    return stock, ours


def assert_same(stock, ours, tolerance=2e-5):
    assert type(stock) is type(ours)
    if isinstance(stock, dict):
        assert list(stock) == list(ours)
        for name in stock:
            assert_same(stock[name], ours[name])
        return
    if isinstance(stock, pd.DataFrame):
        pd.testing.assert_index_equal(stock.index, ours.index)
        pd.testing.assert_index_equal(stock.columns, ours.columns)
        stock, ours = stock.to_numpy(), ours.to_numpy()
    assert stock.dtype == ours.dtype and stock.shape == ours.shape
    if stock.size:
        assert np.abs(stock - ours).max() <= tolerance * np.abs(stock).max()


@pytest.fixture
def answered(monkeypatch):
    """Names of the methods that were not left to scvi-tools."""
    names = []
    for cls in (inference.FusedNormalizedExpression, inference.FusedLikelihoodParameters):

        def answer(self, *args, original=cls.answer):
            names.append(self.name)
            return original(self, *args)

        monkeypatch.setattr(cls, "answer", answer)
    return names


# --- the answers are stock's ---------------------------------------------------------------------

MODELS = {
    "zinb": {},
    "nb, gene-batch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    "poisson": {"gene_likelihood": "poisson"},
    "normal, gene-label": {"gene_likelihood": "normal", "dispersion": "gene-label"},
    "zinb, gene-cell": {"dispersion": "gene-cell"},
    "softplus": {"setup": {"size_factor_key": "size_factor"}, "gene_likelihood": "nb"},
    "covariates": {
        "setup": {
            "continuous_covariate_keys": ["percent_mito"],
            "categorical_covariate_keys": ["donor"],
        },
        "n_layers": 2,
        "encode_covariates": True,
    },
    "library size learned": {"use_observed_lib_size": False},
    "logistic normal": {"latent_distribution": "ln"},
}

QUESTIONS = {
    "mean": {"n_samples": 3},
    "mean of genes": {"n_samples": 3, "gene_list": "some", "batch_size": 40},
    "mean of no genes": {"n_samples": 3, "gene_list": ["none"]},
    "mean, numpy": {"n_samples": 3, "return_numpy": True, "library_size": 1e4},
    "mean, latent": {"n_samples": 3, "library_size": "latent", "gene_list": "some"},
    "mean, batch": {"n_samples": 3, "transform_batch": "first"},
    "mean, batches": {"n_samples": 3, "transform_batch": "two", "gene_list": "some"},
    "mean of a few cells": {"n_samples": 3, "indices": [7, 3, 3, 80], "library_size": 7},
    "mean of a mask": {"n_samples": 3, "indices": np.arange(N) % 3 == 1, "batch_size": 7},
    "mean, without the last cells": {
        **{"n_samples": 3, "data_loader_kwargs": {"drop_last": True}, "batch_size": 40},
        "return_numpy": True,
    },
    "mean, in any order": {"n_samples": 3, "data_loader_kwargs": {"shuffle": True}},
    "samples": {"n_samples": 3, "return_mean": False},
    "samples of genes": {"n_samples": 3, "return_mean": False, "gene_list": "some"},
    "one sample": {},
    "one sample of genes": {"gene_list": "some", "library_size": "latent"},
    "overall": {"n_samples_overall": 400, "return_numpy": True, "batch_size": 40},
    "overall, frame": {"n_samples_overall": N},
    "overall, few": {"n_samples_overall": 20, "return_numpy": True, "gene_list": "some"},
    "overall, batches": {
        **{"n_samples_overall": 100, "return_numpy": True, "transform_batch": "two"},
        **{"library_size": 1e4, "weights": "uniform", "indices": np.arange(N) % 3 == 1},
    },
    "overall, latent": {
        **{"n_samples_overall": 200, "return_numpy": True, "library_size": "latent"},
        "indices": [5],
    },
}


def expression(question, model):
    batches = list(model.adata.obs["batch"].cat.categories)
    named = {
        "some": list(model.adata.var_names[[60, 3, 4, 5, 6, 33]]),
        "first": batches[1],
        "two": batches[:2],
    }
    said = QUESTIONS[question]
    said = {k: named[v] if isinstance(v, str) and v in named else v for k, v in said.items()}
    return model.get_normalized_expression(**said)


@pytest.mark.parametrize("kind", MODELS)
def test_normalized_expression(atlas, answered, kind, monkeypatch):
    model = make(atlas, **MODELS[kind])
    for most in (1 << 22, 2 * N):  # at once, and a sample and a few cells at a time
        monkeypatch.setattr(inference, "MOST_ELEMENTS", most)
        for question in QUESTIONS:
            answered.clear()
            assert_same(*both(model, functools.partial(expression, question)))
            several = question.startswith(("mean", "overall"))
            assert answered == ["get_normalized_expression"] * several, question
        if kind not in ("zinb", "softplus", "library size learned"):
            break


def test_of_a_data_loader(atlas, answered):
    model = make(atlas)
    for said in ({"n_samples": 3}, {"n_samples": 3, "library_size": 1e4}, {}):

        def ask(model, said=said):
            loader = model._make_data_loader(model.adata, indices=np.arange(50), batch_size=20)
            return model.get_normalized_expression(dataloader=loader, **said)

        assert_same(*both(model, ask))
    assert answered == ["get_normalized_expression"] * 2

    def ask(model):
        loader = model._make_data_loader(model.adata, indices=np.arange(50), batch_size=20)
        return model.get_likelihood_parameters(dataloader=loader, n_samples=3, give_mean=True)

    assert_same(*both(model, ask))


@pytest.mark.parametrize("kind", MODELS)
def test_likelihood_parameters(atlas, answered, kind, monkeypatch):
    monkeypatch.setattr(inference, "MOST_ELEMENTS", 1)  # a sample at a time
    model = make(atlas, **MODELS[kind])
    if model.module.gene_likelihood not in ("nb", "zinb"):
        for change in (unfuse, fuse):
            with pytest.raises(AttributeError):  # scvi-tools has no others
                change(model).get_likelihood_parameters()
        return
    for said in (
        {"n_samples": 1},
        {"n_samples": 1, "give_mean": True, "indices": [4, 9, 2]},
        {"n_samples": 3, "batch_size": 40},
        {"n_samples": 3, "give_mean": True, "batch_size": 40},
        {"n_samples": 3, "give_mean": True, "indices": np.arange(N) % 3 == 1, "shuffle": True},
        {"indices": (1, 2)},
    ):
        assert_same(*both(model, lambda m, said=said: m.get_likelihood_parameters(**said)))
    assert len(answered) == 6


@pytest.mark.parametrize("kind", MODELS)
def test_posterior_predictive_sample(atlas, kind):
    model = make(atlas, **MODELS[kind])
    genes = list(model.adata.var_names[3:20])
    batches = list(model.adata.obs["batch"].cat.categories[:2])
    for said in (
        {},
        {"n_samples": 3, "batch_size": 40},
        {"n_samples": 3, "gene_list": genes, "indices": np.arange(30)},
        {"gene_list": genes, "transform_batch": batches},
    ):
        stock, ours = both(
            model, lambda m, said=said: m.posterior_predictive_sample(**said).todense()
        )
        assert_same(stock, ours)


@pytest.mark.parametrize("kind", MODELS)
def test_likelihoods(atlas, kind):
    model = make(atlas, **MODELS[kind])

    def ask(model):
        return {
            "error": model.get_reconstruction_error(return_mean=False)[
                "reconstruction_loss"
            ].numpy(),
            "elbo": model.get_elbo(return_mean=False).numpy(),
            "marginal": model.get_marginal_ll(
                n_mc_samples=6, n_mc_samples_per_pass=3, return_mean=False
            ).numpy(),
        }

    assert_same(*both(model, ask))


@pytest.fixture
def blocks(monkeypatch):
    """Numbers of genes of the blocks in which fused models compared groups of cells."""
    sizes = []
    compare = differential.FusedDifferentialComputation._compare

    def _compare(*args, **kwargs):
        for answer in compare(*args, **kwargs):
            sizes.append(len(answer["scale1"]))
            yield answer

    monkeypatch.setattr(differential.FusedDifferentialComputation, "_compare", _compare)
    return sizes


def assert_same_tables(stock, ours):
    assert list(stock.columns) == list(ours.columns)
    keys = ["gene", "comparison"] if "comparison" in stock else ["gene"]
    stock, ours = (
        table.rename_axis("gene").reset_index().sort_values(keys, ignore_index=True)
        for table in (stock, ours)
    )
    for name in stock.columns:
        a, b = stock[name], ours[name]
        assert a.dtype == b.dtype, name
        if name.startswith("lfc_confidence_interval"):
            # The shortest interval, of which there can be two: its width.
            if name.endswith("max"):
                low = name.replace("max", "min")
                assert_same((a - stock[low]).to_numpy(), (b - ours[low]).to_numpy(), 1e-4)
            continue
        if name.startswith(("proba", "bayes_factor", "is_de")):
            # Counts of samples on either side of a border, where one can lie by a rounding.
            if name.startswith("proba"):
                assert np.abs(a - b).max() <= 5e-4, name
        elif name.startswith("lfc"):
            # Differences of logarithms of about 10, of which a rounding is 1e-6.
            tolerance = 1e-3 if name == "lfc_std" else 1e-4
            assert np.abs(a - b).max() <= 4e-6 + tolerance * a.abs().max(), name
        elif a.dtype.kind == "f":
            assert_same(a.to_numpy(), b.to_numpy(), 1e-4)
        else:
            assert (a == b).all(), name


CHANGE = {"mode": "change"}


@pytest.mark.parametrize("kind", ["zinb", "softplus", "covariates"])
@pytest.mark.parametrize(
    "said",
    [
        {"mode": "vanilla"},
        {**CHANGE, "batch_correction": True},
        {**CHANGE, "batch_correction": True, "m_permutation": 501},
        {**CHANGE, "group1": "A", "n_samples_overall": 300, "batch_size": 20},
        {**CHANGE, "batch_correction": True, "batchid1": "two", "batchid2": "two"},
        {"idx1": np.arange(N) < 8, "mode": "vanilla", "weights": None, "all_stats": False},
        {**CHANGE, "pseudocounts": 1e-3, "use_permutation": False, "test_mode": "two"},
        {**CHANGE, "use_permutation": False, "cred_interval_lvls": [0.5], "change_fn": "log-fold"},
        {**CHANGE, "filter_outlier_cells": True, "threshold_counts": 0.0},
        {**CHANGE, "delta": None, "pseudocounts": 1e-4},
        {**CHANGE, "delta": None, "batch_correction": True, "test_mode": "two"},
    ],
    ids=lambda said: "-".join(k for k in said if k != "mode") or said["mode"],
)
def test_differential_expression(atlas, blocks, monkeypatch, kind, said):
    monkeypatch.setattr(differential, "MOST_ELEMENTS", 30 * 10_000 + 1)  # 70 genes in 3 or more
    model = make(atlas, **MODELS[kind])
    types = list(model.adata.obs["cell_type"].cat.categories)
    batches = list(model.adata.obs["batch"].cat.categories)
    said = {k: batches[:2] if isinstance(v, str) and v == "two" else v for k, v in said.items()}
    if "group1" in said:
        said["group1"] = types[0]
    if "idx1" not in said:
        said["groupby"] = "cell_type"
    filtered = []

    def all_but_seven(self, mask):
        filtered.append(mask)
        return np.where(mask)[0][:-7]

    if "filter_outlier_cells" in said:  # the fit to latent cells is not to be tested
        monkeypatch.setattr(DifferentialComputation, "filter_outlier_cells", all_but_seven)
    said = {"use_permutation": True, **said}
    assert_same_tables(*both(model, lambda m: m.differential_expression(silent=True, **said)))
    assert len(blocks) > 2 and min(blocks) < max(blocks)
    assert len(filtered) in (0, 8)  # two groups, in two comparisons, of stock and of ours


@pytest.mark.parametrize(
    "said",
    [
        {"change_fn": lambda a, b, pseudocounts: a - b - (a - b).mean(1, keepdims=True)},
        {"m1_domain_fn": lambda samples: (samples > 0.1, samples < -0.1)},
        {"pseudocounts": np.full(G, 1e-4)},
        {"gene_by_gene": False},
    ],
    ids=lambda said: next(iter(said)),
)
def test_genes_that_depend_on_each_other_are_compared_at_once(atlas, blocks, monkeypatch, said):
    """A change or a domain of the users' own, or what is not known here."""
    model = make(atlas)
    if "gene_by_gene" in said:
        stock = DifferentialComputation.get_bayes_factors

        def get_bayes_factors(self, *args, gene_by_gene=True, **kwargs):
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(DifferentialComputation, "get_bayes_factors", get_bayes_factors)
    options = {"groupby": "cell_type", "mode": "change", "silent": True, **said}
    assert_same_tables(*both(model, lambda m: m.differential_expression(**options)))
    assert not blocks


def test_errors_and_warnings_of_differential_expression(atlas, monkeypatch):
    monkeypatch.setattr(differential, "MOST_ELEMENTS", 30 * 10_000)
    model = make(atlas)
    batches = list(model.adata.obs["batch"].cat.categories)
    computations = type(model).differential_expression.__globals__["_de_core"].__globals__
    for change in (unfuse, fuse):
        ask = functools.partial(
            change(model).differential_expression, groupby="cell_type", silent=True
        )
        with pytest.raises(NotImplementedError, match="Mode neither not recognized"):
            ask(mode="neither")
        with pytest.raises(ValueError, match="Inconsistent batch policy"):
            ask(batchid1=batches[:1])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ask(batchid1=batches[:2], batchid2=batches[1:], batch_correction=True)
        assert sum("non-null intersection" in str(w.message) for w in said) == 2  # comparisons
        assert computations["DifferentialComputation"] is DifferentialComputation


@pytest.fixture
def weights(monkeypatch):
    """The importance weights that were computed."""
    computed = []
    stock = RNASeqMixin.get_importance_weights

    def get_importance_weights(self, *args, **kwargs):
        computed.append(stock(self, *args, **kwargs))
        return computed[-1]

    monkeypatch.setattr(RNASeqMixin, "get_importance_weights", get_importance_weights)
    return computed


def assert_same_weights(weights):
    stock, ours = weights
    assert stock.shape == ours.shape and stock.dtype == ours.dtype
    assert (stock > 1e-20).sum() > 3, "one sample has all the weight: this tests nothing"
    np.testing.assert_allclose(ours, stock, rtol=5e-3, atol=1e-20)
    weights.clear()


IMPORTANCE = {
    **{"weights": "importance", "return_numpy": True, "batch_size": 16},
    **{"n_mc_samples": 8, "n_mc_samples_per_pass": 4},
}


@pytest.mark.parametrize("kind", MODELS)
def test_importance_weights(atlas, answered, weights, kind):
    model = make(atlas, **MODELS[kind])
    model.adata.X[2] = 0  # a cell without counts
    genes = list(model.adata.var_names[3:9])
    if model.module.gene_likelihood not in ("nb", "zinb"):
        for change in (unfuse, fuse):
            with pytest.raises((TypeError, AttributeError)):  # scvi-tools has no others
                change(model).get_normalized_expression(
                    indices=np.arange(40), n_samples_overall=90, **IMPORTANCE
                )
        return
    for said in (
        {"indices": np.arange(40), "n_samples_overall": 90},  # three samples of a cell
        {"indices": np.arange(N), "n_samples_overall": 30, "max_cells": 21, "truncation": True},
        {"indices": np.arange(40), "n_samples_overall": 30, "library_size": "latent"},
        {"indices": np.arange(40), "n_samples_overall": 90, "gene_list": genes},
        {"indices": np.arange(40), "n_samples_overall": 30, "transform_batch": "batch_1"},
    ):
        answered.clear()
        with np.errstate(all="ignore"):
            assert_same(
                *both(model, lambda m, said=said: m.get_normalized_expression(**IMPORTANCE, **said))
            )
        assert answered == ["get_normalized_expression"]
        assert_same_weights(weights)


def test_importance_weights_without_traces(atlas, answered, weights, monkeypatch):
    """Of distributions that are not made of lazy outputs."""
    monkeypatch.setattr(inference.CellsLikelihood, "of", lambda distributions: None)
    model = make(atlas)
    for n_samples in (30, 90):
        said = {"indices": np.arange(40), "n_samples_overall": n_samples}
        assert_same(
            *both(model, lambda m, said=said: m.get_normalized_expression(**IMPORTANCE, **said))
        )
        assert_same_weights(weights)
    assert len(answered) == 2


def test_importance_weights_that_are_left_to_scvi_tools(atlas, answered):
    model = make(atlas)
    said = {"indices": np.arange(20), "n_samples_overall": 30, **IMPORTANCE}
    stock, ours = both(model, lambda m: m.get_normalized_expression(library_size=1e4, **said))
    assert_same(stock, ours)
    batches = list(model.adata.obs["batch"].cat.categories[:2])
    for change in (unfuse, fuse):
        with pytest.raises(NotImplementedError, match="averaged across batches"):
            change(model).get_normalized_expression(transform_batch=batches, **said)
    assert not answered


def test_importance_weights_in_differential_expression(atlas, blocks):
    model = make(atlas)
    options = {k: IMPORTANCE[k] for k in ("n_mc_samples", "n_mc_samples_per_pass")}
    stock, ours = both(
        model,
        lambda m: m.differential_expression(
            **{"groupby": "cell_type", "mode": "change", "silent": True, "weights": "importance"},
            **{"n_samples_overall": 300, "importance_weighting_kwargs": options},
        ),
    )
    assert blocks.count(G) == 2  # two groups against the rest
    stock, ours = (
        table.rename_axis("gene").reset_index().sort_values(["gene", "comparison"])
        for table in (stock, ours)
    )
    for name in ("scale1", "scale2", "lfc_mean"):
        assert_same(stock[name].to_numpy(), ours[name].to_numpy(), 1e-4)


@pytest.mark.parametrize(
    "gone",
    [
        (inference, "_batch_codes"),
        (inference, "_DistributionConcatenator"),
        (differential, "_estimate_pseudocounts"),
        (differential, "_estimate_delta"),
        (differential, "DifferentialComputation"),
    ],
    ids=lambda gone: gone[1],
)
def test_what_scvi_tools_keeps_for_itself_may_go(atlas, monkeypatch, gone):
    """Then it answers by itself."""
    monkeypatch.setattr(*gone, None)
    model = make(atlas)
    weighted = {"weights": "importance", "importance_weighting_kwargs": {"n_mc_samples": 50}}
    for options in ({"delta": None}, weighted):
        options |= {"groupby": "cell_type", "mode": "change", "silent": True}
        stock, ours = (
            table.rename_axis("gene").reset_index().sort_values(["gene", "comparison"])
            for table in both(model, lambda m: m.differential_expression(**options))  # noqa: B023
        )
        assert_same(stock["scale1"].to_numpy(), ours["scale1"].to_numpy(), 1e-4)


def test_private_parts_of_scvi_tools():
    assert inference.private("model._utils", "_get_batch_code_from_category") is not None
    assert inference.private("model._utils", "nothing") is None
    assert inference.private("model.nothing", "nothing") is None


@pytest.mark.parametrize("kind", ["SCANVI", "AUTOZI"])
def test_other_models_of_the_same_methods(atlas, answered, kind):
    setup = {"labels_key": "cell_type"}
    if kind == "SCANVI":
        setup["unlabeled_category"] = "unknown"
    model = make(atlas, setup, cls=getattr(scvi.model, kind))
    for question in ("mean of genes", "mean", "overall", "overall, batches"):
        assert_same(*both(model, functools.partial(expression, question)))
    assert_same(*both(model, lambda m: m.get_likelihood_parameters(n_samples=3, give_mean=True)))
    assert len(answered) == 5


def test_a_model_that_calls_the_method_of_its_class(atlas, decoded):
    """POISSONVI goes past the model's own attributes; its lazy outputs still compute few genes."""
    poissonvi = pytest.importorskip("scvi.external.poissonvi", reason="not in this scvi-tools")
    model = make(atlas, cls=poissonvi.POISSONVI)
    regions = list(model.adata.var_names[3:9])
    stock, ours = both(
        model, lambda m: m.get_normalized_accessibility(n_samples=3, region_list=regions)
    )
    assert_same(stock, ours)
    assert decoded == [("px_scale", 6)]


@pytest.mark.parametrize("kind", ["without", "with"])
def test_minified_data(atlas, kind):
    model = make(atlas)
    model.adata.obsm["X_mean"], model.adata.obsm["X_variance"] = model.get_latent_representation(
        return_dist=True
    )
    name = "latent_posterior_parameters" + ("_with_counts" if kind == "with" else "")
    model.minify_adata(name, "X_mean", "X_variance")
    for question in ("mean of genes", "mean", "overall", "one sample"):
        assert_same(*both(model, functools.partial(expression, question)))
    assert_same(*both(model, lambda m: m.get_likelihood_parameters(n_samples=3, give_mean=True)))


def test_what_stock_refuses_is_refused(atlas):
    model = make(atlas)
    for change in (unfuse, fuse):
        ask = change(model).get_normalized_expression
        with pytest.raises(AssertionError):
            ask(n_samples=2, n_samples_overall=5)
        with pytest.raises(ValueError, match="not a valid batch category"):
            ask(n_samples=2, transform_batch="nonsense")
        with pytest.raises(ValueError, match="dataloader"):
            ask(adata=model.adata, dataloader=iter([]), n_samples=2)
        with pytest.raises(TypeError):
            ask(n_samples=2, library_size="nonsense")


def test_progress_bars(atlas, capsys):
    model = make(atlas)
    texts = []
    for change in (unfuse, fuse):
        change(model).get_normalized_expression(n_samples=2, silent=False, batch_size=N)
        texts.append("Working" in capsys.readouterr().out)
    assert texts == [True, True]


# --- and nothing else is computed ----------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """What was computed of a decoder: which output, and of how many genes (None: all)."""
    seen = []

    def compute(self, output, genes=None):
        seen.append((output, None if genes is None else len(genes)))
        return original(self, output, genes)

    original = Decoded.compute
    monkeypatch.setattr(Decoded, "compute", compute)
    return seen


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda m, g: m.get_normalized_expression(n_samples=3), {("px_scale", None)}),
        (lambda m, g: m.get_normalized_expression(n_samples=3, gene_list=g), {("px_scale", 4)}),
        (lambda m, g: m.get_normalized_expression(gene_list=g), {("px_scale", 4)}),
        (
            lambda m, g: m.get_normalized_expression(gene_list=g, library_size="latent"),
            {("px_rate", 4)},
        ),
        (
            lambda m, g: m.get_normalized_expression(
                n_samples=3, return_mean=False, return_numpy=True, gene_list=g
            ),
            {("px_scale", 4)},
        ),
        (
            lambda m, g: m.differential_expression(groupby="cell_type", silent=True),
            {("px_scale", None)},
        ),
        (
            lambda m, g: m.get_likelihood_parameters(n_samples=3, give_mean=True),
            {("px_rate", None), ("px_dropout", None)},
        ),
        (
            lambda m, g: m.posterior_predictive_sample(n_samples=2, gene_list=g),
            {("px_rate", None), ("px_dropout", None)},
        ),
        (lambda m, g: m.get_reconstruction_error(), set()),
        (lambda m, g: m.get_elbo(), set()),
        (lambda m, g: m.get_marginal_ll(n_mc_samples=6, n_mc_samples_per_pass=3), set()),
    ],
)
def test_only_what_is_asked_for_is_decoded(atlas, decoded, ask, expected):
    model = fuse(make(atlas))
    ask(model, list(model.adata.var_names[[1, 5, 6, 50]]))
    assert set(decoded) == expected


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            # Memory, not shape: an expanded view has little.
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_sparse_csr:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


CELLS, GENES, SAMPLES = 64, 3000, 20


@pytest.fixture(scope="module")
def large():
    adata = simulate_atlas(n_cells=2 * CELLS, n_genes=GENES, n_batches=2, n_cell_types=2, seed=1)
    SCVI.setup_anndata(adata, batch_key="batch")
    return as_if_trained(SCVI(adata, n_hidden=16))


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (
            lambda m: m.get_normalized_expression(
                n_samples=SAMPLES, gene_list=list(m.adata.var_names[:5]), batch_size=CELLS
            ),
            2 * CELLS * 5,
        ),
        (
            lambda m: m.get_normalized_expression(n_samples=SAMPLES, batch_size=CELLS),
            2 * CELLS * GENES,
        ),
        (
            lambda m: m.get_normalized_expression(
                n_samples_overall=1300,
                return_numpy=True,
                gene_list=list(m.adata.var_names[:5]),
                batch_size=CELLS,
            ),
            1300 * 5,
        ),
        (
            lambda m: m.get_normalized_expression(
                n_samples_overall=30, return_numpy=True, batch_size=CELLS
            ),
            30 * GENES,
        ),
        (
            lambda m: m.get_normalized_expression(
                **{"indices": np.arange(2 * CELLS), "n_samples_overall": 10 * CELLS},
                **{"gene_list": list(m.adata.var_names[:5]), "max_cells": 3},
                **{**IMPORTANCE, "batch_size": CELLS},
            ),
            10 * CELLS * 5,
        ),
        (
            lambda m: m.get_likelihood_parameters(
                n_samples=SAMPLES, give_mean=True, batch_size=CELLS
            ),
            3 * 2 * CELLS * GENES,
        ),
        (
            lambda m: m.differential_expression(
                idx1=np.arange(2 * CELLS) < CELLS, mode="change", batch_size=CELLS, silent=True
            ),
            10 * CELLS * GENES,  # 38 genes of 5,000 samples at a time, of two groups and in pairs
        ),
        (lambda m: m.get_reconstruction_error(batch_size=CELLS), 0),
        (lambda m: m.get_elbo(batch_size=CELLS), 0),
        (
            lambda m: m.get_marginal_ll(
                n_mc_samples=SAMPLES, n_mc_samples_per_pass=SAMPLES, batch_size=CELLS
            ),
            0,
        ),
    ],
    ids=[
        *("genes", "all genes", "overall, genes", "overall", "importance", "parameters"),
        *("differential", "error", "elbo", "ll"),
    ],
)
def test_samples_by_cells_by_genes_are_nowhere(large, monkeypatch, ask, answer):
    # All samples of five genes at once, but one sample of all genes.
    monkeypatch.setattr(inference, "MOST_ELEMENTS", SAMPLES * CELLS * 5)
    monkeypatch.setattr(differential, "MOST_ELEMENTS", CELLS * GENES)
    monkeypatch.setattr(reference, "_TILE", {"cpu": 1})  # where there is no native library
    largest, arrays = [], []
    for change in (unfuse, fuse):
        model = change(large)
        torch.manual_seed(0)
        np.random.seed(0)
        tracemalloc.start()
        with Largest() as mode:
            ask(model)
        arrays.append(tracemalloc.get_traced_memory()[1])  # NumPy's; torch's are not traced
        tracemalloc.stop()
        largest.append(mode.elements)
    # What is left is the encoder's: the counts of a mini-batch.
    assert largest[1] <= CELLS * GENES
    if answer not in (0, 30 * GENES):
        assert largest[0] >= 10 * CELLS * GENES, "stock has become frugal: this tests nothing"
    assert arrays[1] <= 4 * answer + 4 * CELLS * GENES + (2 << 20)


def test_drawn_expression_can_be_asked_for_again(atlas):
    model = fuse(make(atlas))
    torch.manual_seed(0)
    batches = list(model.adata.obs["batch"].cat.categories[:2])
    drawn = model.get_normalized_expression.drawn(
        n_samples_overall=300, library_size=3.0, batch_size=40, transform_batch=batches
    )
    first = drawn.of_genes(None)
    assert first.shape == (300, G) and np.allclose(first.sum(1), 3, rtol=1e-5)
    some = np.array([5, 60])
    for _ in range(2):
        assert_same(first, drawn.of_genes(None))
        assert_same(first[:, some], drawn.of_genes(some))


def test_parts_of_lazy_tensors(atlas):
    """Samples, and rows of samples x cells: lazy, and what the whole tensor has there."""
    model = fuse(make(atlas, dispersion="gene-cell"))
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=7)))
    with torch.inference_mode():
        _, outputs = model.module.forward(
            tensors, inference_kwargs={"n_samples": 4}, compute_loss=False
        )
        px = vars(outputs["px"])
        mixed = LazyExpanded.of(torch.randn(4, 1, G), torch.Size((4, 7, G)))
        alike = LazyExpanded.of(torch.randn(7, G), torch.Size((4, 7, G)))
        index = torch.tensor([27, 0, 8, 8])
        for lazy in (*(px[n] for n in ("mu", "scale", "zi_logits", "theta")), mixed, alike):
            part = samples(lazy, 1, 3)
            assert isinstance(part, LazyTensor) and lazy._value is None
            some = rows(lazy, index)
            assert part.shape == (2, 7, G) and some.shape == (4, G)
            whole = real(lazy)
            torch.testing.assert_close(real(part), whole[1:3])
            torch.testing.assert_close(real(some), whole.flatten(0, 1)[index])
            assert torch.equal(samples(whole, 1, 3), whole[1:3])
            assert torch.equal(rows(whole, index), whole.flatten(0, 1)[index])


def test_rows_of_several_tensors_as_one(atlas):
    model = fuse(make(atlas))
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=7)))
    with torch.inference_mode():
        px = vars(model.module.forward(tensors, compute_loss=False)[1]["px"])
        scale, mu = (rows(px[name], torch.tensor([6, 0, 3])) for name in ("scale", "mu"))
        for parts, lazily in (
            ([scale, scale], True),
            ([scale, mu], False),
            ([scale, torch.ones(2, G)], False),
        ):
            whole = joined(parts)
            assert isinstance(whole, LazyTensor) is lazily
            torch.testing.assert_close(real(whole), torch.cat([real(part) for part in parts]))


# --- the normaliser ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cells", "genes", "hidden"), [(1, 1, 1), (37, 301, 17), (300, 700, 40)])
def test_log_sum_exp(cells, genes, hidden, dtype, monkeypatch):
    torch.manual_seed(0)
    h, w, b = torch.randn(cells, hidden), torch.randn(genes, hidden), torch.randn(genes)
    w[0] *= 30  # one gene that outweighs the others, in some cells
    h, w, b = h.to(dtype), w.to(dtype), b.to(dtype)
    monkeypatch.setattr(reference, "_TILE", {"cpu": 3 * genes})
    for bias in (b, None):
        logits = h.double() @ w.double().t() + (0 if bias is None else bias.double())
        expected = logits.logsumexp(-1)
        # Of a sum of so many products, and a few operations more.
        largest = (h.abs() @ w.abs().t()).amax(-1).double() + b.abs().max()
        rounding = (hidden + 4) * torch.finfo(dtype).eps * largest
        for run in (log_sum_exp, reference.log_sum_exp):
            found = run(h, w, bias)
            assert found.dtype == dtype and found.shape == expected.shape
            assert ((found - expected).abs() <= rounding).all()


def test_log_sum_exp_of_samples_and_of_nothing():
    w = torch.randn(7, 4)
    h = torch.randn(3, 5, 4)
    torch.testing.assert_close(log_sum_exp(h, w, None), (h @ w.t()).logsumexp(-1))
    torch.testing.assert_close(
        log_sum_exp(h.transpose(0, 1), w, None), (h @ w.t()).logsumexp(-1).t()
    )
    assert log_sum_exp(h[:, :0], w, None).shape == (3, 0)


def test_log_sum_exp_is_the_same_for_any_number_of_threads():
    h, w, b = torch.randn(300, 20), torch.randn(900, 20), torch.randn(900)
    one = log_sum_exp(h, w, b)
    torch.set_num_threads(2)
    assert torch.equal(log_sum_exp(h, w, b), one)


# --- fuse and unfuse -----------------------------------------------------------------------------


def test_methods_look_like_stocks(atlas, answered):
    model = make(atlas)
    before = dict(vars(model))
    fuse(model)
    for cls in (inference.FusedNormalizedExpression, inference.FusedLikelihoodParameters):
        method = getattr(model, cls.name)
        stock = getattr(SCVI, cls.name)
        assert isinstance(method, cls) and method.__doc__ == stock.__doc__
        assert (
            list(inspect.signature(method).parameters)
            == list(inspect.signature(stock).parameters)[1:]
        )
    unfuse(model)
    assert vars(model) == before
    fuse(model)
    unfuse(model.module)  # and not the model
    model.get_normalized_expression(n_samples=3)
    assert not answered


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_asks_itself(atlas, copied):
    model = fuse(make(atlas))
    other = copied(model)
    ask = functools.partial(expression, "mean of genes")
    assert_same(seeded(ask, model)[0], seeded(ask, other)[0])
    with torch.no_grad():
        other.module.decoder.px_scale_decoder[0].weight.mul_(2)
    assert not seeded(ask, other)[0].equals(seeded(ask, model)[0])
    assert not [v for v in vars(unfuse(other)).values() if isinstance(v, inference.FusedMethod)]


def test_saved_and_loaded(atlas, tmp_path):
    model = fuse(make(atlas))
    ask = functools.partial(expression, "mean of genes")
    model.save(str(tmp_path / "model"))
    assert b"decoder_fast" not in (tmp_path / "model" / "model.pt").read_bytes()
    loaded = SCVI.load(str(tmp_path / "model"), adata=model.adata, accelerator="cpu")
    assert not [v for v in vars(loaded).values() if isinstance(v, inference.FusedMethod)]
    assert_same(seeded(ask, model)[0], seeded(ask, loaded)[0])


def test_methods_of_a_models_own_stay(atlas):
    class Other(SCVI):
        @functools.wraps(SCVI.get_normalized_expression)
        def get_normalized_expression(self, *args, **kwargs):
            return "its own"

    model = fuse(make(atlas, cls=Other))
    assert model.get_normalized_expression(n_samples=3) == "its own"
    assert "get_normalized_expression" not in vars(model)
    assert isinstance(model.get_likelihood_parameters, inference.FusedLikelihoodParameters)
