"""The command line: training from a file to a model, and nothing half-written when it fails."""

from __future__ import annotations

import json
import os
import signal
import warnings

import numpy as np
import pytest

from decoder_fast import __version__, backends, cli, datasets, native, training
from decoder_fast.datasets import DATA_VARIABLE, InputError, simulate_atlas

OUTPUTS = {"model", "latent.h5ad", "training.png", "training.csv", "summary.json"}


@pytest.fixture
def scvi():
    return pytest.importorskip("scvi", reason="scvi-tools is not installed: decoder-fast[scvi]")


@pytest.fixture
def folder(tmp_path, monkeypatch, scvi):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def atlas(scvi):
    adata = simulate_atlas(150, 40, 2, 3, density=0.3)
    adata.obs["age"] = np.linspace(20, 60, adata.n_obs)
    return adata


def run(capsys, *arguments):
    """Run the command; return its exit status, what it printed and its errors."""
    status = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def fails(capsys, folder, message, *arguments):
    """Run the command and assert a message without traceback, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, _, errors = run(capsys, *arguments)
    assert status == 2
    assert errors.startswith("decoder-fast: error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_train(capsys, folder, atlas, scvi):
    """From a file to a model that stock scvi-tools loads, which gives the latent space written."""
    import anndata
    import pandas as pd

    atlas.obs["_scvi_batch"] = 0  # of an earlier model
    atlas.layers["umi"] = atlas.X.tocsc()
    atlas.X = np.log1p(atlas.X)
    atlas.write_h5ad("counts.h5ad")
    status, printed, _ = run(
        capsys,
        *("train", "counts.h5ad", "--layer", "umi", "--batch-key", "batch"),
        *("--labels-key", "cell_type", "--dispersion", "gene-label", "--likelihood", "nb"),
        *("--continuous-covariate", "age", "--categorical-covariate", "cell_type"),
        *("--max-epochs", 2, "--batch-size", 32, "--n-latent", 4, "--n-hidden", 16),
        *("--out", "results/run"),
    )
    assert status == 0
    out = folder / "results" / "run"
    assert {path.name for path in out.iterdir()} == OUTPUTS
    assert {path.name for path in folder.iterdir()} == {"counts.h5ad", "results"}
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "layers['umi'] is CSC: converting it to CSR" in printed
    for step in ("reading", "checking", "training", "cells per second", "count_nll: "):
        assert step in printed

    curve = pd.read_csv(out / "training.csv", index_col="epoch")
    assert list(curve.index) == [1, 2]
    assert np.isfinite(curve.to_numpy()).all()
    assert {"elbo_train", "elbo_validation", "reconstruction_loss_train"} <= set(curve)

    summary = json.loads((out / "summary.json").read_text())
    assert (summary["cells"], summary["genes"], summary["batches"]) == (150, 40, 2)
    assert summary["density"] == pytest.approx(atlas.layers["umi"].nnz / (150 * 40))
    assert summary["epochs"] == 2
    assert summary["settings"]["likelihood"] == "nb"
    assert summary["settings"]["seed"] == 0
    assert summary["cells_per_second"] == pytest.approx(135 * 2 / summary["seconds"], rel=0.01)
    ran = {step["operation"]: step for step in summary["ran"]}
    assert set(ran) == set(backends.OPERATIONS)
    assert all(set(step["reasons"]) <= set(backends.BACKENDS) for step in ran.values())
    assert summary["versions"]["decoder_fast"] == __version__
    assert summary["device"].startswith(("cpu", "cuda", "mps"))
    assert summary["final"]["elbo_train"] == pytest.approx(curve["elbo_train"][2])

    # the user's own file is what the model is loaded with, whatever else that holds
    assert {path.name for path in (out / "model").iterdir()} == {"model.pt"}
    assert b"decoder_fast" not in (out / "model" / "model.pt").read_bytes()
    model = scvi.model.SCVI.load(
        str(out / "model"), adata=anndata.read_h5ad("counts.h5ad"), accelerator="cpu"
    )
    assert type(model.module.decoder) is scvi.nn.DecoderSCVI
    assert model.module.gene_likelihood == "nb"
    assert model.module.dispersion == "gene-label"
    latent = anndata.read_h5ad(out / "latent.h5ad")
    assert latent.obs_names.equals(atlas.obs_names)
    assert list(latent.obs) == ["batch", "cell_type", "age"]
    np.testing.assert_allclose(
        latent.obsm["X_scVI"], model.get_latent_representation(), rtol=1e-4, atol=1e-5
    )


def test_train_is_reproducible_and_fused_is_no_other_model(capsys, folder, atlas):
    atlas.write_h5ad("counts.h5ad")
    curves = {}
    for name, extra in (("a", []), ("b", []), ("c", ["--seed", 1]), ("stock", ["--no-fused"])):
        status, printed, _ = run(
            capsys,
            *("train", "counts.h5ad", "--max-epochs", 2, "--accelerator", "cpu"),
            *("--out", name, *extra),
        )
        assert status == 0
        assert "no batch key: all cells count as one batch" in printed
        curves[name] = np.loadtxt(f"{name}/training.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(curves["a"], curves["b"])
    assert not np.allclose(curves["a"], curves["c"])
    np.testing.assert_allclose(curves["a"], curves["stock"], rtol=1e-3)
    assert json.loads((folder / "stock/summary.json").read_text())["ran"] == [
        {"step": "decoder", "backend": "scvi-tools", "reasons": {"fused": "--no-fused"}}
    ]


def test_train_on_counts_that_stay_on_disk(capsys, folder, atlas):
    atlas.write_h5ad("counts.h5ad")
    arguments = ("train", "counts.h5ad", "--max-epochs", 1, "--batch-key", "batch", "--backed")
    status, printed, _ = run(capsys, *arguments, "--out", "run")
    assert status == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["density"] == pytest.approx(atlas.X.nnz / (150 * 40))
    assert "count_nll: " in printed
    status, _, error = run(capsys, *arguments, "--layer", "umi", "--out", "other")
    assert status == 2 and "not with --demo or --layer" in error


def test_train_leaves_out_empty_cells(capsys, folder, atlas):
    import anndata

    counts = atlas.X.tolil()
    counts[3] = 0
    atlas.X = counts.tocsr()
    atlas.write_h5ad("counts.h5ad")
    status, printed, _ = run(capsys, "train", "counts.h5ad", "--max-epochs", 1, "--out", "run")
    assert status == 0
    assert "leaving out 1 of 150 cells" in printed
    latent = anndata.read_h5ad("run/latent.h5ad")
    assert latent.n_obs == 149
    assert np.isfinite(latent.obsm["X_scVI"]).all()


# --- bad input ----------------------------------------------------------------------------------


def nan(adata):
    adata.X.data[0] = np.nan


def negative(adata):
    adata.X.data[0] = -1


def log_normalised(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)


def all_empty(adata):
    adata.X = adata.X * 0


def almost_all_empty(adata):
    counts = adata.X.tolil()
    counts[:120] = 0
    adata.X = counts.tocsr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, "NaN or infinite"),
        (negative, "negative, the smallest is -1"),
        (log_normalised, "log-normalised data. Expected whole numbers"),
        (log_normalised, "layers['counts'] looks like raw counts: add --layer counts"),
        (all_empty, "all its values are zero"),
        (almost_all_empty, "X has 30 cells with counts"),
        (lambda adata: setattr(adata, "X", None), "no X; it has: no matrix at all\n"),
    ],
)
def test_bad_counts(capsys, folder, atlas, change, message):
    change(atlas)
    atlas.write_h5ad("counts.h5ad")
    fails(capsys, folder, message, "train", "counts.h5ad", "--out", "run")


def test_bad_values_that_need_not_be_counts(capsys, folder, atlas):
    negative(atlas)
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run", "--likelihood", "normal")
    fails(capsys, folder, "the smallest is -1. Expected finite numbers of 0 and above", *train)


def test_nothing_to_train_on(capsys, folder, atlas):
    for part in (atlas[:0], atlas[:, :0]):
        part.copy().write_h5ad("counts.h5ad")
        fails(capsys, folder, "expected at least 50 cells", "train", "counts.h5ad", "--out", "run")


def test_notes(capsys, folder, atlas):
    """What can be trained on, and is seldom meant."""
    atlas.obs_names = [f"ENSG{i:011}" for i in range(atlas.n_obs)]
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run", "--max-epochs", 1)
    status, printed, _ = run(capsys, *train, "--labels-key", "cell_type", "--threads", 1)
    assert status == 0
    assert "if the matrix is transposed, save adata.T" in printed
    assert "SCVI takes labels for --dispersion gene-label alone" in printed
    assert "1 epoch in" in printed and "(1 thread)" in printed


def test_early_stopping(capsys, folder, atlas, monkeypatch):
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run")

    def trained(self, *args, **options):
        raise cli.InputError(f"early_stopping={options['early_stopping']}")

    monkeypatch.setattr("decoder_fast.scvi.training.FusedTrain.__call__", trained)
    fails(capsys, folder, "early_stopping=True", *train, "--early-stopping")
    fails(capsys, folder, "early_stopping=False", *train)


def test_bad_arguments(capsys, folder, atlas):
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run")
    for message, *arguments in [
        ("columns are: batch, cell_type, age", *train, "--batch-key", "donor"),
        ("no layers['umi']", *train, "--layer", "umi"),
        ("there is no file none.h5ad", "train", "none.h5ad", "--out", "run"),
        ("no counts: give an h5ad file", "train", "--out", "run"),
        ("no output folder: add --out", "train", "counts.h5ad"),
        ("leave out counts.h5ad, or --demo", *train, "--demo"),
        ("--demo-dataset needs --demo", *train, "--demo-dataset", "simulated"),
        ("--dispersion gene-label needs --labels-key", *train, "--dispersion", "gene-label"),
        ("--dispersion gene-batch needs --batch-key", *train, "--dispersion", "gene-batch"),
        ("0 is less than 1", *train, "--max-epochs", 0),
        ("1 is less than 2", *train, "--batch-size", 1),
        ("invalid choice: 'gamma'", *train, "--likelihood", "gamma"),
        ("unrecognized arguments: --unknown (see decoder-fast train --help)", *train, "--unknown"),
        ("decoder-fast --help", "fly"),
    ]:
        fails(capsys, folder, message, *arguments)


def test_no_gpu(capsys, folder, monkeypatch, atlas):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run", "--accelerator", "gpu")
    fails(capsys, folder, "torch sees no GPU here", *train)
    train = ("train", "counts.h5ad", "--out", "run", "--cuda-graph")
    fails(capsys, folder, "--cuda-graph needs an NVIDIA GPU, and torch sees none here", *train)
    fails(capsys, folder, "--cuda-graph needs the fused decoder", *train, "--no-fused")


def test_cuda_graph(capsys, folder, monkeypatch, atlas):
    """The option reaches the model's ``train``, where there is a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    atlas.write_h5ad("counts.h5ad")
    train = ("train", "counts.h5ad", "--out", "run", "--cuda-graph")
    fails(capsys, folder, "and --accelerator cpu was asked for", *train, "--accelerator", "cpu")

    def trained(self, *args, **options):
        raise cli.InputError(f"as far as this, cuda_graph={options['cuda_graph']}")

    monkeypatch.setattr("decoder_fast.scvi.training.FusedTrain.__call__", trained)
    fails(capsys, folder, "as far as this, cuda_graph=True", *train)


def test_not_an_h5ad(capsys, folder):
    (folder / "counts.csv").write_text("1,2\n")
    fails(capsys, folder, "expected an h5ad file", "train", "counts.csv", "--out", "run")


def test_missing_packages(capsys, folder, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "scvi" else find(name)
    )
    message = "needs scvi, which is not installed: pip install scvi-tools"
    fails(capsys, folder, message, "train", "counts.h5ad", "--out", "run")


# --- all or nothing -----------------------------------------------------------------------------


def test_existing_output(capsys, folder, atlas, monkeypatch):
    """What exists is refused before anything is read, and replaced only if it is an output."""
    atlas.write_h5ad("counts.h5ad")
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")
    (folder / "file").write_text("precious")
    monkeypatch.setattr(cli, "read_counts", None)
    train = ("train", "counts.h5ad", "--max-epochs", 1, "--out")
    for out in ("run", "file"):
        fails(capsys, folder, "exists already: choose another --out", *train, out)
        fails(capsys, folder, "was not written by decoder-fast", *train, out, "--overwrite")
    fails(capsys, folder, "cannot write to", *train, "file/run")
    monkeypatch.undo()
    monkeypatch.chdir(folder)

    (folder / "run" / "thesis.tex").unlink()
    (folder / "run" / "summary.json").write_text("{}")
    (folder / "run" / "old").write_text("")
    assert run(capsys, *train, "run", "--overwrite")[0] == 0
    assert {path.name for path in (folder / "run").iterdir()} == OUTPUTS
    assert {path.name for path in folder.iterdir()} == {"counts.h5ad", "file", "run"}


@pytest.fixture
def earlier(folder, atlas):
    """Counts, and the output of an earlier training that must survive."""
    atlas.write_h5ad(folder / "counts.h5ad")
    (folder / "run").mkdir()
    (folder / "run" / "summary.json").write_text('{"epochs": 1}')
    return "train", "counts.h5ad", "--max-epochs", 2, "--out", "run", "--overwrite"


def intact(folder):
    return {path.name for path in folder.iterdir()} == {"counts.h5ad", "run"} and (
        folder / "run" / "summary.json"
    ).read_text() == '{"epochs": 1}'


@pytest.mark.parametrize("where", ["in training", "in writing", "in renaming"])
def test_failure(capsys, folder, earlier, monkeypatch, scvi, where):
    def fail(*arguments, **keywords):
        raise RuntimeError("lightning struck")

    if where == "in training":
        monkeypatch.setattr(scvi.train.TrainingPlan, "validation_step", fail)
    elif where == "in writing":
        monkeypatch.setattr(training, "_draw", fail)
    else:
        rename = training.Path.rename
        monkeypatch.setattr(
            training.Path,
            "rename",
            lambda path, to: fail() if path.name.endswith("partial") else rename(path, to),
        )
    with pytest.raises(RuntimeError, match="lightning struck"):
        run(capsys, *earlier)
    assert intact(folder)


def test_divergence_is_a_failure(capsys, folder, earlier, monkeypatch, scvi):
    monkeypatch.setattr(
        scvi.model.SCVI, "get_latent_representation", lambda self: np.full((150, 10), np.nan)
    )
    with pytest.raises(RuntimeError, match="diverged: 150 cells"):
        run(capsys, *earlier)
    assert intact(folder)


def test_ctrl_c(capsys, folder, earlier, monkeypatch, scvi):
    def step(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal did not interrupt the training")

    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # a shell's background jobs ignore it
    try:
        monkeypatch.setattr(scvi.train.TrainingPlan, "validation_step", step)
        status, _, errors = run(capsys, *earlier)
        assert status == 130
        assert "interrupted, nothing was written" in errors
        assert signal.getsignal(signal.SIGINT) is handler
        assert intact(folder)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm(capsys, folder, earlier, monkeypatch, scvi):
    """The end of a job's time on a cluster cleans up too."""

    def step(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not interrupt the training")

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(scvi.train.TrainingPlan, "validation_step", step)
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *earlier)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert intact(folder)


# --- the demonstration --------------------------------------------------------------------------


def test_demo_with_a_folder(capsys, folder, atlas, monkeypatch):
    (folder / "data").mkdir()
    atlas.write_h5ad(folder / "data" / "mine.h5ad")
    monkeypatch.setenv(DATA_VARIABLE, "data")
    demo = ("train", "--demo", "--max-epochs", 1)
    status, printed, _ = run(capsys, *demo)
    assert status == 0
    assert f"real counts, mine.h5ad of {DATA_VARIABLE}" in printed
    summary = json.loads((folder / "demo-output" / "summary.json").read_text())
    assert summary["settings"]["keys"]["batch"] == "batch"
    assert summary["batches"] == 2

    assert run(capsys, *demo)[0] == 0  # replaces its own output
    (folder / "demo-output" / "summary.json").write_text('{"demo": false}')
    fails(capsys, folder, "exists already", *demo)  # and no other


@pytest.mark.parametrize("source", ["pbmc3k", "simulated"])
def test_demo_without_a_folder(capsys, folder, atlas, monkeypatch, source):
    def pbmc3k():
        if source == "simulated":
            raise datasets._Unavailable("there is no network")
        del atlas.obs["batch"]
        return atlas, "real counts, scanpy's pbmc3k"

    monkeypatch.setattr(datasets, "_pbmc3k", pbmc3k)
    monkeypatch.setattr(datasets, "simulate_atlas", lambda: atlas)
    monkeypatch.setattr(cli, "_DEMO_EPOCHS", 2)
    status, printed, _ = run(capsys, "train", "--demo", "--out", "here")
    assert status == 0
    assert f"{DATA_VARIABLE} is not set" in printed
    assert ("there is no network" in printed) == (source == "simulated")
    summary = json.loads((folder / "here" / "summary.json").read_text())
    assert source in summary["source"]
    assert summary["demo"]
    assert summary["epochs"] == 2
    assert summary["batches"] == (1 if source == "pbmc3k" else 2)


def test_demo_checks_what_it_finds(capsys, folder, atlas, monkeypatch):
    log_normalised(atlas)
    (folder / "data").mkdir()
    atlas.write_h5ad(folder / "data" / "mine.h5ad")
    monkeypatch.setenv(DATA_VARIABLE, "data")
    fails(capsys, folder, "log-normalised", "train", "--demo")
    fails(capsys, folder, "holds only mine", "train", "--demo", "--demo-dataset", "yours")
    fails(capsys, folder, "no column 'donor'", "train", "--demo", "--batch-key", "donor")


# --- version and doctor -------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"decoder-fast {__version__}\n"


def test_doctor(capsys):
    status, printed, errors = run(capsys, "doctor")
    assert status == 0
    assert not errors
    lines = [line.strip() for line in printed.splitlines()]
    for name in ("Python", "torch", "triton", "scvi-tools", "CPU", "GPU"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    for operation in backends.OPERATIONS:
        choice = backends.choose(operation, device=cli.torch.device("cpu"))
        assert f"{operation}: {choice.backend}" in lines
        for backend, reason in choice.reasons.items():
            assert f"not {backend}: {reason}" in lines


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    def version(package):
        raise cli.PackageNotFoundError(package)

    monkeypatch.setattr(cli, "version", version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "no compiler: install g++")
    status, printed, _ = run(capsys, "doctor")
    assert status == 0
    assert "scvi-tools      not installed" in printed
    assert "pip install scvi-tools anndata scanpy matplotlib" in printed
    assert "no compiler: install g++" in printed
    assert "none: " in printed


def test_output_folder_of_a_program(tmp_path):
    """Without --overwrite, for who calls it from Python."""
    with training.output_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(InputError), training.output_folder(tmp_path / "a" / "b"):
        raise AssertionError("not reached")


def test_lightnings_advice_is_kept_off_the_screen_but_not_ours():
    from_lightning = {"filename": "call.py", "lineno": 1, "module": "lightning.pytorch.trainer"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        with training.quiet():
            warnings.warn_explicit("use more workers", UserWarning, **from_lightning)
            warnings.warn_explicit("cuda_graph=True has no effect", UserWarning, **from_lightning)
    assert [str(w.message) for w in seen] == ["cuda_graph=True has no effect"]
