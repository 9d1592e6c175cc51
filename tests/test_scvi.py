"""The bridge: scvi-tools' models, stock and fused, side by side."""

from __future__ import annotations

import copy
import inspect
import pickle
from contextlib import contextmanager
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

scvi = pytest.importorskip("scvi", reason="scvi-tools is what the bridge leads to")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import decoder_fast.nn as fast_nn  # noqa: E402
from decoder_fast import fuse, fused, unfuse  # noqa: E402
from decoder_fast.datasets import simulate_atlas  # noqa: E402
from decoder_fast.scvi import FusedDecoderSCVI, FusedFCLayers  # noqa: E402
from decoder_fast.scvi.lazy import LazyCounts  # noqa: E402

SCVI = scvi.model.SCVI
TRAIN = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore"),  # of Lightning's advice on tiny data
]


@pytest.fixture(scope="module")
def atlas():
    adata = simulate_atlas(n_cells=300, n_genes=200, n_batches=3, n_cell_types=3, seed=0)
    adata.obs["label"] = adata.obs["cell_type"].astype(str)
    adata.obs.loc[adata.obs_names[::3], "label"] = "unknown"
    rng = np.random.default_rng(0)
    adata.obs["size_factor"] = np.asarray(adata.X.sum(1)).ravel() / 100
    adata.obs["percent_mito"] = rng.normal(size=adata.n_obs)
    adata.obs["donor"] = [f"d{i}" for i in rng.integers(0, 4, adata.n_obs)]
    return adata


@pytest.fixture
def fused_calls(monkeypatch):
    """Count the calls of the fused likelihood."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["likelihood"])
        return original(*args, **kwargs)

    original = fast_nn.count_nll
    monkeypatch.setattr(fast_nn, "count_nll", counted)
    return calls


def scvi_model(atlas, setup=None, **kwargs):
    adata = atlas.copy()
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type", **(setup or {}))
    return SCVI(adata, **{"n_hidden": 32, **kwargs})


def train_both(make, ask=None, train=None):
    """Train stock and fused from one seed; return what ``ask(model)`` says of each."""
    results = []
    for change in (lambda model: model, fuse):
        scvi.settings.seed = 0
        model = change(make())
        model.train(**TRAIN | (train or {}))
        state = {k: v.clone() for k, v in model.module.state_dict().items()}
        scvi.settings.seed = 1
        results.append((model, state, None if ask is None else ask(model)))
    return results


def assert_states_agree(stock, ours, tolerance=1e-4):
    """Parameters after two epochs: Adam turns the rounding of tiny gradients into whole steps, so
    the norm of the difference is compared, tensor by tensor.
    """
    assert stock.keys() == ours.keys()
    for name, value in stock.items():
        assert value.dtype == ours[name].dtype
        a, b = value.double(), ours[name].double()
        assert (a - b).norm() <= tolerance * a.norm() + 1e-6, name


def assert_close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-6)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
def test_scvi_trains_alike(atlas, fused_calls, likelihood, dispersion):
    def make():
        return scvi_model(atlas, gene_likelihood=likelihood, dispersion=dispersion)

    stock, ours = train_both(make, lambda model: float(model.get_elbo()))
    assert set(fused_calls) == {likelihood}, "the fused likelihood was not taken"
    tolerance = 2e-3 if likelihood == "normal" else 1e-4  # its raw gradients are 1e4 times larger
    assert_states_agree(stock[1], ours[1], tolerance)
    assert ours[2] == pytest.approx(stock[2], rel=1e-5)
    for key in ("elbo_train", "reconstruction_loss_train", "kl_local_train"):
        assert_close(stock[0].history[key], ours[0].history[key])


@pytest.mark.parametrize(
    ("setup", "kwargs"),
    [
        ({"size_factor_key": "size_factor"}, {}),  # softplus
        ({}, {"use_observed_lib_size": False}),
        ({"categorical_covariate_keys": ["donor"]}, {"n_layers": 2, "encode_covariates": True}),
        ({"continuous_covariate_keys": ["percent_mito"]}, {"deeply_inject_covariates": False}),
        ({}, {"batch_representation": "embedding"}),
        ({}, {"use_layer_norm": "both", "use_batch_norm": "none", "n_layers": 2}),
        ({}, {"use_layer_norm": "both", "dispersion": "gene-batch"}),
        ({}, {"latent_distribution": "ln"}),
    ],
    ids=str,
)
def test_scvi_options(atlas, fused_calls, setup, kwargs):
    stock, ours = train_both(
        lambda: scvi_model(atlas, setup, **kwargs),
        lambda model: model.get_normalized_expression(),
    )
    assert fused_calls
    assert_states_agree(stock[1], ours[1])
    assert_close(stock[2], ours[2])


def test_scanvi(atlas, fused_calls):
    def make():
        adata = atlas.copy()
        scvi.model.SCANVI.setup_anndata(
            adata, labels_key="label", unlabeled_category="unknown", batch_key="batch"
        )
        return scvi.model.SCANVI(adata, n_hidden=32)

    stock, ours = train_both(make, lambda model: model.predict(soft=True))
    assert fused_calls
    assert_states_agree(stock[1], ours[1])
    assert_close(stock[2], ours[2])


def test_scanvi_from_scvi_model(atlas, fused_calls):
    """``from_scvi_model`` takes a fused model, and what it makes can be fused."""
    results = []
    for change in (lambda model: model, fuse):
        scvi.settings.seed = 0
        model = change(scvi_model(atlas))
        model.train(**TRAIN)
        semi = change(
            scvi.model.SCANVI.from_scvi_model(
                model, unlabeled_category="unknown", labels_key="label"
            )
        )
        fused_calls.clear()
        semi.train(**TRAIN)
        results.append(semi.predict(soft=True))
    assert fused_calls
    assert_close(*results)


def test_poissonvi(atlas, fused_calls):
    poissonvi = pytest.importorskip("scvi.external.poissonvi", reason="not in this scvi-tools")

    def make():
        adata = atlas.copy()
        poissonvi.POISSONVI.setup_anndata(adata, batch_key="batch")
        return poissonvi.POISSONVI(adata)

    def ask(model):
        with torch.no_grad():
            # Replaces the scale head's bias, and puts it back.
            return model.get_normalized_accessibility(), model.get_region_factors()

    stock, ours = train_both(make, ask)
    assert set(fused_calls) == {"poisson"}
    assert_states_agree(stock[1], ours[1])
    for a, b in zip(stock[2], ours[2], strict=True):
        assert_close(a, b)


def test_joint_embedding_scvi(atlas, fused_calls):
    name = "scvi.external.joint_embedding_scvi"
    module = pytest.importorskip(name, reason="JointEmbeddingSCVI came with scvi-tools 1.5")

    def make():
        adata = atlas.copy()
        module.JointEmbeddingSCVI.setup_anndata(adata, batch_key="batch")
        return module.JointEmbeddingSCVI(adata)

    stock, ours = train_both(make, lambda model: model.get_normalized_expression())
    assert fused_calls
    assert_states_agree(stock[1], ours[1])
    assert_close(stock[2], ours[2])


def multivi_model(adata):
    mudata = pytest.importorskip("mudata", reason="MULTIVI takes MuData")
    rna, atac = adata[:, :150].copy(), adata[:, 150:].copy()
    mdata = mudata.MuData({"rna": rna, "atac": atac})
    mdata.obs["batch"] = adata.obs["batch"].to_numpy()
    scvi.model.MULTIVI.setup_mudata(
        mdata, batch_key="batch", modalities={"rna_layer": "rna", "atac_layer": "atac"}
    )
    return scvi.model.MULTIVI(mdata, n_genes=150, n_regions=50)


def test_multivi(atlas, fused_calls):
    stock, ours = train_both(
        lambda: multivi_model(atlas.copy()), lambda model: model.get_normalized_expression()
    )
    assert set(fused_calls) == {"zinb"}
    assert_states_agree(stock[1], ours[1])
    assert_close(stock[2], ours[2])


def test_contrastivevi(atlas, fused_calls):
    contrastivevi = pytest.importorskip("scvi.external.contrastivevi", reason="not installed")
    background = np.flatnonzero(atlas.obs["batch"] == atlas.obs["batch"].iloc[0])
    target = np.setdiff1d(np.arange(atlas.n_obs), background)

    def make():
        adata = atlas.copy()
        contrastivevi.ContrastiveVI.setup_anndata(adata, batch_key="batch")
        return contrastivevi.ContrastiveVI(adata)

    def ask(model):
        salient = model.get_normalized_expression(indices=target[:20])
        return salient["salient"], model.get_latent_representation(representation_kind="salient")

    stock, ours = train_both(
        make, ask, {"background_indices": background, "target_indices": target}
    )
    assert set(fused_calls) == {"zinb"}
    assert_states_agree(stock[1], ours[1])
    for a, b in zip(stock[2], ours[2], strict=True):
        assert_close(a, b)


def test_autozi(atlas):
    """A mixture by gene: the decoder is fused, the likelihood is AUTOZI's own."""

    def make():
        adata = atlas.copy()
        scvi.model.AUTOZI.setup_anndata(adata, batch_key="batch")
        return scvi.model.AUTOZI(adata)

    stock, ours = train_both(make, lambda model: model.get_normalized_expression())
    assert isinstance(ours[0].module.decoder, FusedDecoderSCVI)
    assert_states_agree(stock[1], ours[1], 1e-3)
    assert_close(stock[2], ours[2])


def test_resolvi(atlas):
    """A Pyro model: the decoder is fused, nothing else."""
    resolvi = pytest.importorskip("scvi.external.resolvi", reason="ResolVI left in 1.6")

    def make():
        adata = atlas.copy()
        adata.obsm["X_spatial"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
        resolvi.RESOLVI.setup_anndata(adata, batch_key="batch")
        return resolvi.RESOLVI(adata)

    stock, ours = train_both(make)
    assert any(type(m) is FusedDecoderSCVI for m in ours[0].module.modules())
    assert_states_agree(stock[1], ours[1], 1e-3)


def test_compiled_training(atlas, fused_calls):
    """``plan_kwargs={"compile": True}`` silences errors: see that it took the fused path."""
    stock, ours = train_both(lambda: scvi_model(atlas), train={"plan_kwargs": {"compile": True}})
    assert fused_calls
    assert_states_agree(stock[1], ours[1])


@pytest.mark.parametrize("counts", ["with", "without"])
def test_minified_data(atlas, fused_calls, counts):
    """Latent space cached; with the counts kept, the decoder alone is trained further."""
    results = []
    for change in (lambda model: model, fuse):
        scvi.settings.seed = 0
        model = change(scvi_model(atlas))
        model.train(**TRAIN)
        scvi.settings.seed = 2
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_mean"], model.adata.obsm["X_variance"] = mean, variance
        kind = "latent_posterior_parameters" + ("_with_counts" if counts == "with" else "")
        model.minify_adata(kind, "X_mean", "X_variance")
        scvi.settings.seed = 3
        before = {k: v.clone() for k, v in model.module.named_parameters()}
        fused_calls.clear()
        if counts == "with":
            model.train(**TRAIN, plan_kwargs={"update_only_decoder": True, "weight_decay": 0.0})
            assert bool(fused_calls) == (change is fuse)
            after = dict(model.module.named_parameters())
            encoder = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
            assert torch.equal(before[encoder], after[encoder])
            head = "decoder.px_scale_decoder.0.weight"
            assert not torch.equal(before[head], after[head])
        results.append((model.module.state_dict(), model.get_normalized_expression(n_samples=2)))
    assert_states_agree(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


# --- counts in CSR -------------------------------------------------------------------------------


@pytest.fixture
def layouts(monkeypatch):
    """Layouts of the counts that the fused likelihood was given."""
    seen = set()

    def spy(x, *args, **kwargs):
        assert type(x) is torch.Tensor
        seen.add(x.layout)
        return original(x, *args, **kwargs)

    original = fast_nn.count_nll
    monkeypatch.setattr(fast_nn, "count_nll", spy)
    return seen


def poissonvi_model(adata):
    poissonvi = pytest.importorskip("scvi.external.poissonvi", reason="not in this scvi-tools")
    poissonvi.POISSONVI.setup_anndata(adata, batch_key="batch")
    return poissonvi.POISSONVI(adata)


def scanvi_model(adata):
    scvi.model.SCANVI.setup_anndata(
        adata, labels_key="label", unlabeled_category="unknown", batch_key="batch"
    )
    return scvi.model.SCANVI(adata, n_hidden=32)


def layer_model(adata):
    adata.layers["umi"] = adata.X
    adata.X = np.log1p(adata.X.toarray())
    SCVI.setup_anndata(adata, batch_key="batch", layer="umi")
    return SCVI(adata, n_hidden=32)


MODELS = {
    "SCVI": scvi_model,
    "SCVI, library size learned": lambda adata: scvi_model(adata, use_observed_lib_size=False),
    "SCVI, no log in the encoder": lambda adata: scvi_model(adata, log_variational=False),
    "SCVI, layer": layer_model,
    "SCANVI": scanvi_model,
    "POISSONVI": poissonvi_model,
}


def with_counts(atlas, change):
    adata = atlas.copy()
    adata.X = change(adata.X)
    return adata


@pytest.fixture
def shown(monkeypatch):
    """The CSR mini-batches that were shown to a module as dense ones."""
    seen = []
    of = LazyCounts.of
    monkeypatch.setattr(LazyCounts, "of", lambda csr: seen.append(csr) or of(csr))
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_csr_reaches_the_likelihood_and_changes_nothing(atlas, layouts, kind):
    """Stock and fused on CSR, fused on dense: in training and in validation."""
    dense = with_counts(atlas, lambda x: x.toarray())
    if kind == "SCVI, layer":
        dense.X = sparse.csr_matrix(dense.X)  # its own X does not matter
    results = []
    for adata, change, expected in (
        (atlas, lambda model: model, set()),
        (atlas, fuse, {torch.sparse_csr}),
        (dense, fuse, {torch.strided}),
    ):
        layouts.clear()
        scvi.settings.seed = 0
        model = MODELS[kind](adata.copy())
        if kind == "SCVI, layer" and adata is dense:
            model.adata.layers["umi"] = model.adata.layers["umi"].toarray()
        change(model).train(**TRAIN, check_val_every_n_epoch=1)
        assert layouts == expected
        results.append(({k: v.clone() for k, v in model.module.state_dict().items()}, model))
    (stock, stock_model), *others = results
    for ours, model in others:
        assert_states_agree(stock, ours)
        for key in ("elbo_train", "elbo_validation", "kl_local_validation"):
            assert_close(stock_model.history[key], model.history[key])
        with seeded(1):
            expected = stock_model.get_latent_representation()
        with seeded(1):
            assert_close(expected, model.get_latent_representation())


def duplicated(x):
    """Every count split in two entries of one place."""
    x = x.tocsr()
    halves = np.repeat(x.data / 2, 2)
    return sparse.csr_matrix((halves, np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)


ENCODERS = {
    "default": {},
    "no log": {"log_variational": False},
    "covariates": {"encode_covariates": True},
    "covariates, layers, layer norm": {
        "encode_covariates": True,
        "n_layers": 2,
        "use_layer_norm": "both",
        "use_batch_norm": "none",
    },
    "embedded batches": {"encode_covariates": True, "batch_representation": "embedding"},
    "library size": {"use_observed_lib_size": False, "encode_covariates": True},
}


def encoder_model(adata, **options):
    adata = adata.copy()
    SCVI.setup_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["percent_mito"],
    )
    return SCVI(adata, n_hidden=32, **options)


@pytest.mark.parametrize("kind", ENCODERS)
def test_sparse_encoder_is_stocks(atlas, kind):
    """Its output, and what training makes of it."""
    results = []
    for change in (unfuse, fuse):
        scvi.settings.seed = 0
        model = change(encoder_model(atlas, **ENCODERS[kind]))
        model.train(**TRAIN)
        results.append((model.get_latent_representation(), model.module.state_dict()))
    (latent, stock), (ours_latent, ours) = results
    assert_close(latent, ours_latent)
    assert_states_agree(stock, ours)


@pytest.mark.parametrize("canonical", [True, False])
def test_csr_of_a_data_module_of_the_users_own(atlas, canonical):
    """Mini-batches that arrive as CSR tensors, without duplicates or with."""
    model = scvi_model(atlas)
    (tensors,) = model._make_data_loader(model.adata, batch_size=atlas.n_obs)
    csr = atlas.X if canonical else duplicated(atlas.X)
    arrays = (torch.as_tensor(a) for a in (csr.indptr, csr.indices, csr.data))
    sparse_tensors = {**tensors, "X": torch.sparse_csr_tensor(*arrays, size=csr.shape)}
    losses = []
    for change, batch in ((unfuse, tensors), (fuse, tensors), (fuse, sparse_tensors)):
        with seeded(0), torch.no_grad():
            losses.append(change(model).module(batch)[2].loss)
    assert_close(losses[0], losses[1])
    assert_close(losses[0], losses[2])


@pytest.fixture
def backed(atlas, tmp_path):
    def open_backed(change=lambda x: x):
        with_counts(atlas, change).write_h5ad(tmp_path / "atlas.h5ad")
        return anndata.read_h5ad(tmp_path / "atlas.h5ad", backed="r")

    return open_backed


def backed_model(adata):
    SCVI.setup_anndata(adata, batch_key="batch")
    return SCVI(adata, n_hidden=32)


@pytest.mark.parametrize("change", [sparse.csr_matrix, sparse.csc_matrix, duplicated])
def test_counts_on_disk(atlas, backed, layouts, change):
    """Trained on as in memory, CSR as CSR; duplicates are summed a mini-batch at a time."""
    results = []
    for adata in (atlas.copy(), backed(change)):
        scvi.settings.seed = 0
        layouts.clear()
        model = fuse(backed_model(adata))
        model.train(**TRAIN, shuffle_set_split=False)
        results.append((model.module.state_dict(), model.get_latent_representation()))
    assert layouts == {torch.strided if change is sparse.csc_matrix else torch.sparse_csr}
    assert results[0][1].shape == results[1][1].shape


def test_counts_are_never_made_dense(atlas, monkeypatch):
    """The encoder gets log1p of the non-zeros, the library size their sum."""
    made_dense = []
    compute = LazyCounts.compute
    monkeypatch.setattr(LazyCounts, "compute", lambda x: made_dense.append(x) or compute(x))
    for options in ENCODERS.values():
        model = fuse(encoder_model(atlas, **options))
        model.train(**TRAIN)
        model.get_latent_representation()
        model.get_elbo()
        model.get_reconstruction_error()
        assert not made_dense
    model = fuse(scvi_model(atlas))
    (tensors,) = model._make_data_loader(model.adata, batch_size=atlas.n_obs)
    assert isinstance(tensors["X"], LazyCounts)
    assert torch.equal(tensors["X"] + 0, torch.as_tensor(atlas.X.toarray()))
    assert made_dense


def test_csr_under_compile(atlas, layouts):
    """A compiled encoder gets a plain dense tensor, so that its graph does not break there."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fuse(scvi_model(atlas)).train(**TRAIN, plan_kwargs={"compile": True})
    assert layouts == {torch.sparse_csr}
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert all("disable()" in reason for reason in counters["graph_break"])


def test_csr_from_worker_processes(atlas, layouts, monkeypatch):
    monkeypatch.setattr(scvi.settings, "dl_num_workers", 1)
    fuse(scvi_model(atlas)).train(**TRAIN)
    assert layouts == {torch.sparse_csr}


@pytest.mark.parametrize("kind", ["SCVI", "SCANVI", "POISSONVI"])
@pytest.mark.parametrize("how", ["argument", "datasplitter_kwargs"])
@pytest.mark.parametrize("sparse_tensor", [True, False])
def test_users_have_the_last_word(atlas, layouts, kind, how, sparse_tensor):
    said = {"load_sparse_tensor": sparse_tensor}
    model = fuse(MODELS[kind](atlas.copy()))
    model.train(**TRAIN, **(said if how == "argument" else {how: said}))
    assert layouts == {torch.sparse_csr if sparse_tensor else torch.strided}
    assert said == {"load_sparse_tensor": sparse_tensor}, "the user's dict was changed"


def test_the_last_word_by_position(atlas, layouts):
    fuse(scvi_model(atlas)).train(2, "cpu", "auto", None, None, True, False)
    assert layouts == {torch.strided}


def test_other_options_of_the_data_splitter(atlas, layouts):
    model = fuse(scvi_model(atlas))
    model.train(**TRAIN, datasplitter_kwargs={"drop_last": True}, train_size=0.5)
    assert layouts == {torch.sparse_csr} and len(model.train_indices) == 150
    with pytest.raises(TypeError):
        model.train(**TRAIN, datasplitter_kwargs={"nonsense": True})
    assert "_data_splitter_cls" not in vars(model), "left behind by a training that failed"


@pytest.mark.parametrize(
    ("change", "layout"), [(sparse.csc_matrix, torch.strided), (duplicated, torch.sparse_csr)]
)
@pytest.mark.parametrize("sparse_tensor", [None, True])
def test_other_sparse_counts(atlas, layouts, change, layout, sparse_tensor):
    """CSC stays dense, duplicates are summed."""
    results = []
    for counts in (lambda x: x, change):
        scvi.settings.seed = 0
        model = fuse(scvi_model(with_counts(atlas, counts)))
        layouts.clear()
        said = {} if sparse_tensor is None else {"load_sparse_tensor": sparse_tensor}
        model.train(**TRAIN, **said)
        results.append(model.module.state_dict())
    assert layouts == {layout}
    assert_states_agree(*results)


def test_a_likelihood_that_takes_no_csr_is_handed_dense(atlas, layouts, shown):
    """MULTIVI joins its modalities to one dense matrix, and takes the counts from there."""
    fuse(multivi_model(atlas.copy())).train(**TRAIN)
    assert layouts == {torch.strided} and not shown


def test_a_fused_module_in_a_stock_model(atlas, layouts):
    model = scvi_model(atlas)
    fuse(model.module)
    model.train(**TRAIN)
    model.train(**TRAIN, load_sparse_tensor=True)  # which scvi-tools makes dense on arrival
    assert layouts == {torch.strided}


def test_unfused_models_train_as_stock(atlas, layouts, shown):
    model = scvi_model(atlas)
    before = dict(vars(model))
    fuse(model)
    stock, ours = (inspect.signature(m.train).parameters for m in (scvi_model(atlas), model))
    assert [name for name in ours if name != "cuda_graph"] == list(stock)
    assert model.train.__doc__.startswith(inspect.getdoc(SCVI.train))
    unfuse(model)
    assert vars(model) == before
    model.train(**TRAIN, load_sparse_tensor=True)
    with fused(model):
        pass
    assert vars(model).keys() - before.keys() <= {"trainer"}
    assert layouts == set()
    fuse(model)
    unfuse(model.module)  # and not the model
    model.train(**TRAIN)
    assert layouts == set() and not shown


def test_options_of_training_are_stocks(atlas, tmp_path):
    """Early stopping, checkpoints, validation, a learning rate that falls: the same epochs."""
    options = {
        "max_epochs": 12,
        "early_stopping": True,
        "early_stopping_patience": 1,
        "early_stopping_min_delta": 20.0,
        "train_size": 0.7,
        "validation_size": 0.2,
        "batch_size": 50,
        "check_val_every_n_epoch": 1,
        "plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 1, "lr_threshold": 50.0},
    }
    found = []
    for name, change in (("stock", unfuse), ("ours", fuse)):
        scvi.settings.seed = 0
        model = change(scvi_model(atlas))
        checkpoint = scvi.train.SaveCheckpoint(
            dirpath=str(tmp_path / name), monitor="elbo_validation", load_best_on_end=True
        )
        model.train(**{**TRAIN, **options}, callbacks=[checkpoint], enable_checkpointing=True)
        loaded = SCVI.load(checkpoint.best_model_path, adata=model.adata, accelerator="cpu")
        assert type(loaded.module.decoder) is scvi.nn.DecoderSCVI
        found.append((model, loaded.module.state_dict()))
    (stock, stock_best), (ours, ours_best) = found
    assert 1 < len(stock.history["elbo_train"]) == len(ours.history["elbo_train"]) < 12
    assert len(stock.validation_indices) == len(ours.validation_indices) == 60
    for key in ("elbo_train", "elbo_validation", "reconstruction_loss_validation"):
        assert_close(stock.history[key], ours.history[key])
    assert_states_agree(stock_best, ours_best)


def optimizer_of(model, **said):
    model.train(**TRAIN, **said)
    (optimizer,) = model.trainer.optimizers
    return optimizer


def test_adam_is_fused(atlas):
    model = scvi_model(atlas)
    stock = optimizer_of(model)
    fuse(model)
    ours = optimizer_of(model)
    assert type(ours) is type(stock) is torch.optim.Adam
    assert ours.param_groups[0]["fused"]
    for name in ("lr", "eps", "weight_decay", "betas"):
        assert ours.param_groups[0][name] == stock.param_groups[0][name]
    assert optimizer_of(model, plan_kwargs={"optimizer": "AdamW"}).param_groups[0]["fused"]
    assert model._training_plan_cls is SCVI._training_plan_cls


@pytest.mark.parametrize(
    "said",
    [
        {
            "plan_kwargs": {
                "optimizer": "Custom",
                "optimizer_creator": lambda params: torch.optim.Adam(params, lr=1e-4),
            }
        },
        {"precision": "bf16-mixed"},
    ],
    ids=["the user's own", "scaled"],
)
def test_optimizers_that_are_left_alone(atlas, said):
    stock = optimizer_of(scvi_model(atlas), **said)
    ours = optimizer_of(fuse(scvi_model(atlas)), **said)
    assert ours.param_groups[0]["fused"] == stock.param_groups[0]["fused"]


def test_scvi_tools_option_of_a_fused_optimizer(atlas):
    said = {"plan_kwargs": {"fused_optimizer": False}}
    if "fused_optimizer" not in inspect.signature(scvi.train.TrainingPlan.__init__).parameters:
        pytest.skip("it came with scvi-tools 1.5.1")
    assert not optimizer_of(fuse(scvi_model(atlas)), **said).param_groups[0]["fused"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_itself(atlas, layouts, copied):
    model = fuse(scvi_model(atlas))
    other = copied(model)
    other.train(**TRAIN)
    assert layouts == {torch.sparse_csr}
    assert other.is_trained and not model.is_trained
    unfuse(other)
    assert "train" not in vars(other)


def test_torch_says_nothing_about_csr():
    """Neither that it is in beta, nor that it goes unchecked: users did not ask for it."""
    import subprocess
    import sys

    code = (
        "import scvi, warnings\n"
        "from decoder_fast import fuse\n"
        "from decoder_fast.datasets import simulate_atlas\n"
        "adata = simulate_atlas(n_cells=60, n_genes=20, n_batches=2, n_cell_types=2, seed=0)\n"
        "scvi.model.SCVI.setup_anndata(adata)\n"
        "model = fuse(scvi.model.SCVI(adata))\n"
        "model.train(max_epochs=1, accelerator='cpu', enable_progress_bar=False)\n"
        "assert model.history\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert "CSR" not in done.stderr and "nvariant" not in done.stderr


# --- what comes after training -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(atlas):
    scvi.settings.seed = 0
    model = scvi_model(atlas)
    model.train(**TRAIN)
    return model


@contextmanager
def seeded(seed):
    scvi.settings.seed = seed
    yield


QUESTIONS = {
    "normalized_expression": lambda m: m.get_normalized_expression(n_samples=2),
    "normalized_expression_genes": lambda m: m.get_normalized_expression(
        gene_list=list(m.adata.var_names[3:9]), library_size=1e4
    ),
    "normalized_expression_latent": lambda m: m.get_normalized_expression(library_size="latent"),
    "normalized_expression_batch": lambda m: m.get_normalized_expression(
        transform_batch=list(m.adata.obs["batch"].cat.categories[:2])
    ),
    "normalized_expression_importance": lambda m: m.get_normalized_expression(
        indices=np.arange(20),
        n_samples_overall=30,
        weights="importance",
        n_mc_samples=20,
        n_mc_samples_per_pass=10,
        return_numpy=True,
    ),
    "latent": lambda m: m.get_latent_representation(),
    "elbo": lambda m: [float(m.get_elbo())],
    "marginal_ll": lambda m: m.get_marginal_ll(
        n_mc_samples=12, n_mc_samples_per_pass=4, return_mean=False
    ),
    "reconstruction_error": lambda m: [float(m.get_reconstruction_error()["reconstruction_loss"])],
    "posterior_predictive": lambda m: m.posterior_predictive_sample(n_samples=2).todense(),
    "likelihood_parameters": lambda m: np.concatenate(
        [v.ravel() for v in m.get_likelihood_parameters(n_samples=2).values()]
    ),
    "feature_correlation": lambda m: m.get_feature_correlation_matrix(n_samples=2),
    "differential_expression": lambda m: m.differential_expression(
        groupby="cell_type", mode="change", silent=True
    ).select_dtypes("number"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_stocks(trained, question):
    answers = []
    for change in (unfuse, fuse):
        change(trained)
        with seeded(5):
            np.random.seed(5)
            answers.append(QUESTIONS[question](trained))
    if question == "differential_expression":
        # Bayes factors of probabilities near 1 and ranks by them have no digits to spare.
        for name in ("lfc_mean", "lfc_median", "raw_mean1", "scale1", "proba_de"):
            a, b = (answer[name].sort_index().to_numpy() for answer in answers)
            if name == "proba_de":
                assert np.abs(a - b).max() < 5e-3
            else:
                assert_close(a, b, 1e-4)
        return
    assert_close(*answers, 1e-4 if question == "feature_correlation" else 2e-5)


def test_distribution_of_a_fused_module(trained):
    """What is read off ``px`` downstream."""
    fuse(trained)
    tensors = next(iter(trained._make_data_loader(trained.adata, batch_size=64)))
    x = tensors["X"]
    with torch.no_grad(), seeded(0):
        _, generative = trained.module.forward(tensors, compute_loss=False)
        px = generative["px"]
        assert isinstance(px, scvi.distributions.ZeroInflatedNegativeBinomial)
        assert isinstance(px, scvi.distributions.NegativeBinomial)
        for name in ("mu", "theta", "scale", "zi_logits", "zi_probs", "mean", "variance"):
            assert type(getattr(px, name)) is torch.Tensor
            assert getattr(px, name).shape == x.shape
        assert px.sample().shape == x.shape
        assert "ZeroInflatedNegativeBinomial" in repr(px)
        assert torch.equal(px.get_normalized("mu"), px.mu)
        elementwise = px.log_prob(x)
        assert elementwise.shape == x.shape
        total = elementwise.sum(-1)
        torch.testing.assert_close(total, (elementwise + 0.0).sum(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(px.log_prob(x).sum(dim=-1), total)
        torch.testing.assert_close(px.log_prob(x).sum(0), (elementwise + 0.0).sum(0))
        torch.testing.assert_close(px.log_prob(x).mean(), (elementwise + 0.0).mean())
        # Rebuilt from its parameters, as scvi-tools concatenates distributions.
        parameters = {name: getattr(px, name) for name in px.arg_constraints}
        again = type(px)(**parameters)
        torch.testing.assert_close(again.log_prob(x).sum(-1), total, rtol=1e-5, atol=1e-3)
        # A new mean, then counts of one cell against all: importance weights.
        again.mu = again.scale * 50
        assert again.log_prob(x[:1]).shape == x.shape
        moved = copy.deepcopy(px)
        torch.testing.assert_close(moved.mu, px.mu)
        px.mu = px.scale * 50
        torch.testing.assert_close(px.log_prob(x), again.log_prob(x))


def test_samples_axis(trained):
    """x (N, G) against Monte-Carlo samples (S, N, G)."""
    losses = []
    tensors = next(iter(trained._make_data_loader(trained.adata, batch_size=64)))
    for change in (unfuse, fuse):
        change(trained)
        with torch.no_grad(), seeded(0):
            _, _, loss = trained.module.forward(tensors, inference_kwargs={"n_samples": 4})
        losses.append(loss.reconstruction_loss["reconstruction_loss"])
    assert losses[0].shape == (4, 64)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


class _Largest(TorchDispatchMode):
    """Count the floating-point results with at least ``limit`` elements."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() >= self.limit:
                is_view = t._is_view() or any(t is a for a in args)
                self.count += not is_view
        return out


def test_no_cells_x_genes_tensor_in_a_training_step():
    adata = simulate_atlas(n_cells=512, n_genes=3000, n_batches=2, n_cell_types=2, seed=1)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_hidden=16, dispersion="gene-batch")
    tensors = next(iter(model._make_data_loader(adata, batch_size=512)))
    counted = []
    for change in (unfuse, fuse):
        change(model)
        model.module.train()
        with _Largest(512 * 3000) as largest:
            model.module(tensors)[2].loss.backward()
        counted.append(largest.count)
    stock, ours = counted
    # What is left is the encoder's: log1p(x) and the product with its first layer's weight.
    assert stock > 40
    assert ours <= 3


# --- saving, loading, surgery --------------------------------------------------------------------


def test_saved_model_is_stock(trained, atlas, tmp_path):
    fuse(trained)
    trained.save(str(tmp_path / "model"), overwrite=True)
    assert b"decoder_fast" not in (tmp_path / "model" / "model.pt").read_bytes()
    adata = atlas.copy()
    loaded = SCVI.load(str(tmp_path / "model"), adata=adata, accelerator="cpu")
    assert type(loaded.module.decoder) is scvi.nn.DecoderSCVI
    with seeded(1):
        expected = trained.get_normalized_expression()
    for change in (unfuse, fuse):
        change(loaded)
        with seeded(1):
            assert_close(expected, loaded.get_normalized_expression())
    unfuse(trained)
    trained.save(str(tmp_path / "stock"))
    again = fuse(SCVI.load(str(tmp_path / "stock"), adata=atlas.copy(), accelerator="cpu"))
    assert isinstance(again.module.decoder, FusedDecoderSCVI)


def query(atlas):
    adata = atlas[:90].copy()
    adata.obs["batch"] = ["new"] * 45 + ["newer"] * 45
    return adata


@pytest.mark.parametrize("kind", ["SCVI", "SCANVI"])
def test_surgery(atlas, fused_calls, kind):
    """``load_query_data`` from a fused reference, and the query trained fused."""
    results = []
    state = None
    for change in (lambda model: model, fuse):
        scvi.settings.seed = 0
        adata = atlas.copy()
        if kind == "SCVI":
            SCVI.setup_anndata(adata, batch_key="batch")
            reference = SCVI(adata, n_layers=2, n_hidden=32)
        else:
            scvi.model.SCANVI.setup_anndata(
                adata, labels_key="label", unlabeled_category="unknown", batch_key="batch"
            )
            reference = scvi.model.SCANVI(adata, n_layers=2, n_hidden=32)
        change(reference).train(**TRAIN)
        # From the same reference: two trainings in a row would amplify rounding.
        state = state or {k: v.clone() for k, v in reference.module.state_dict().items()}
        reference.module.load_state_dict(state)
        cells = query(atlas)
        type(reference).prepare_query_anndata(cells, reference)
        model = change(type(reference).load_query_data(cells, reference, accelerator="cpu"))
        before = {k: v.clone() for k, v in model.module.named_parameters()}
        fused_calls.clear()
        model.train(**TRAIN, plan_kwargs={"weight_decay": 0.0})
        after = dict(model.module.named_parameters())
        # Frozen: heads and dispersion. Moved: the columns of the new batches.
        for name in ("decoder.px_scale_decoder.0.weight", "decoder.px_dropout_decoder.weight"):
            assert torch.equal(before[name], after[name]) and after[name].grad is None
        weight = "decoder.px_decoder.fc_layers.Layer 0.0.weight"
        assert torch.equal(before[weight][:, :10], after[weight][:, :10])
        assert not torch.equal(before[weight][:, -2:], after[weight][:, -2:])
        with seeded(4):
            results.append(
                ({k: v.detach() for k, v in after.items()}, model.get_latent_representation())
            )
    assert fused_calls
    assert_states_agree(results[0][0], results[1][0], 1e-3)
    assert_close(results[0][1], results[1][1], 1e-4)


def test_fuse_after_load_query_data_from_disk(trained, atlas, tmp_path):
    fuse(trained)
    trained.save(str(tmp_path / "model"), overwrite=True)
    cells = query(atlas)
    SCVI.prepare_query_anndata(cells, str(tmp_path / "model"))
    model = fuse(SCVI.load_query_data(cells, str(tmp_path / "model"), accelerator="cpu"))
    hooked = model.module.decoder.px_decoder.hooks
    assert hooked and isinstance(model.module.decoder.px_decoder, FusedFCLayers)
    model.train(**TRAIN, plan_kwargs={"weight_decay": 0.0})


# --- fuse, unfuse, fused -------------------------------------------------------------------------


def test_fuse_changes_classes_and_nothing_else(atlas):
    model = scvi_model(atlas)
    stock_class = type(model.module)
    parameters = dict(model.module.named_parameters())
    attributes = set(model.module.__dict__)
    signatures = [
        inspect.signature(getattr(model.module, name)) for name in ("generative", "loss", "forward")
    ]
    assert fuse(model) is model
    assert fuse(model) is model  # a second time changes nothing
    assert type(model.module) is not stock_class and isinstance(model.module, stock_class)
    assert isinstance(model.module.decoder, (FusedDecoderSCVI, scvi.nn.DecoderSCVI))
    assert isinstance(model.module.decoder.px_decoder, scvi.nn.FCLayers)  # surgery asks for it
    assert model.module.decoder.px_decoder.n_cat_list == [3]
    assert all(p is parameters[name] for name, p in model.module.named_parameters())
    assert [
        inspect.signature(getattr(model.module, name)) for name in ("generative", "loss", "forward")
    ] == signatures
    for other in (copy.deepcopy(model.module), pickle.loads(pickle.dumps(model.module))):
        assert type(other) is type(model.module)
        assert isinstance(other.decoder, FusedDecoderSCVI)
        assert all(
            torch.equal(v, other.state_dict()[k]) for k, v in model.module.state_dict().items()
        )
    assert unfuse(model) is model
    assert unfuse(model) is model
    assert type(model.module) is stock_class
    assert type(model.module.decoder) is scvi.nn.DecoderSCVI
    assert type(model.module.decoder.px_decoder) is scvi.nn.FCLayers
    assert set(model.module.__dict__) == attributes


def test_fused_context(atlas):
    model = scvi_model(atlas)
    with fused(model) as inside:
        assert inside is model and isinstance(model.module.decoder, FusedDecoderSCVI)
    assert type(model.module.decoder) is scvi.nn.DecoderSCVI
    with pytest.raises(KeyError), fused(model):
        raise KeyError
    assert type(model.module.decoder) is scvi.nn.DecoderSCVI
    fuse(model)
    with fused(model):
        pass
    assert isinstance(model.module.decoder, FusedDecoderSCVI), "it was fused before"


def test_fuse_a_module(atlas):
    module = scvi_model(atlas).module
    assert fuse(module) is module and isinstance(module.decoder, FusedDecoderSCVI)
    decoder = scvi.nn.DecoderSCVI(3, 4)
    assert fuse(decoder) is decoder


def test_what_cannot_be_fused(atlas):
    adata = atlas.copy()
    scvi.model.LinearSCVI.setup_anndata(adata)
    with pytest.raises(TypeError, match=r"LinearSCVI has no scvi.nn.Dec.*LinearDecoderSCVI"):
        fuse(scvi.model.LinearSCVI(adata))
    with pytest.raises(TypeError, match="expected a scvi-tools model"):
        fuse(adata)
    with pytest.raises(TypeError, match="expected a scvi-tools model"):
        unfuse("model")


def test_a_subclass_with_its_own_forward_stays_as_it_is(atlas):
    class Other(scvi.nn.DecoderSCVI):
        def forward(self, *args):
            return super().forward(*args)

    model = scvi_model(atlas)
    model.module.decoder.__class__ = Other
    with pytest.raises(TypeError, match=r"no scvi.nn.DecoderSCVI.*Other"):
        fuse(model)


def test_help_on_train(atlas):
    model = fuse(scvi_model(atlas))
    parameters = inspect.signature(model.train).parameters
    assert parameters["cuda_graph"].default is False
    assert parameters["load_sparse_tensor"].default is True
    assert "max_epochs" in parameters and list(parameters)[-1] == "trainer_kwargs"
    for name in ("max_epochs", "load_sparse_tensor", "cuda_graph"):
        assert name in inspect.getdoc(model.train)
    assert repr(model.train).startswith("<fused <bound method")
    assert "cuda_graph" not in inspect.signature(unfuse(model).train).parameters


def test_completion_offers_the_bridge():
    import decoder_fast

    assert set(decoder_fast.__all__) <= set(dir(decoder_fast))


def test_negative_counts_are_refused_in_training(atlas):
    adata = atlas.copy()
    adata.X = adata.X.astype(np.float32)
    adata.X.data[:200] = -1
    SCVI.setup_anndata(adata, batch_key="batch")
    model = fuse(SCVI(adata))
    with pytest.raises(ValueError, match="non-negative"):
        model.train(**TRAIN)


def test_bridge_without_scvi_tools():
    """Its absence is explained, and the rest of the package works."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['scvi'] = None\n"
        "import decoder_fast; decoder_fast.DecoderSCVI(3, 4)\n"
        "try: decoder_fast.fuse\n"
        "except ImportError as e: print(e)\n"
        "try: decoder_fast.nonsense\n"
        "except AttributeError as e: print(e)\n"
    )
    root = Path(fast_nn.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert "pip install scvi-tools" in done.stdout
    assert "nonsense" in done.stdout


def test_metrics_are_logged_once_an_epoch(atlas, monkeypatch):
    """Lightning computes them at its end; curves are those of the stock model."""
    from lightning.pytorch import LightningModule

    logged = []

    def log_dict(self, dictionary, *args, **kwargs):
        logged.append(next(iter(dictionary)))
        original(self, dictionary, *args, **kwargs)

    original = LightningModule.log_dict
    monkeypatch.setattr(LightningModule, "log_dict", log_dict)
    options = {"max_epochs": 3, "train_size": 0.7, "batch_size": 50, "check_val_every_n_epoch": 1}
    (stock, *_), (fast, *_) = train_both(lambda: scvi_model(atlas), train=options)
    n_train, n_validation = 3 * -(-210 // 50), 3 * -(-90 // 50)
    assert logged.count("elbo_train") == n_train + 3
    assert logged.count("elbo_validation") >= 2 * n_validation  # before the first epoch too
    assert fast.history.keys() == stock.history.keys()
    for name, curve in stock.history.items():
        np.testing.assert_allclose(
            fast.history[name].to_numpy(dtype=float),
            curve.to_numpy(dtype=float),
            rtol=1e-4,
            err_msg=name,
        )
        assert len(curve) == 3 or name == "kl_weight"
