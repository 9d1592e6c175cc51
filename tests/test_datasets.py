"""Counts: simulated, found for a demonstration, read from files and checked."""

from __future__ import annotations

import numpy as np
import pytest

from decoder_fast import datasets
from decoder_fast.datasets import (
    DATA_VARIABLE,
    InputError,
    ObsKeys,
    check_counts,
    demo_counts,
    read_counts,
    simulate_atlas,
)

ad = pytest.importorskip("anndata", reason="anndata is not installed: decoder-fast[scvi]")
sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed: decoder-fast[scvi]")
h5py = pytest.importorskip("h5py", reason="h5py is not installed: decoder-fast[scvi]")


def ignore(message):
    pass


@pytest.fixture
def atlas():
    return simulate_atlas(120, 60, 3, 4, seed=1)


# --- the simulated atlas ------------------------------------------------------------------------


def test_atlas_looks_like_counts():
    adata = simulate_atlas(1500, 700, 3, 5, density=0.08)
    assert adata.shape == (1500, 700)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() >= 1  # no explicit zeros
    assert adata.X.nnz / (1500 * 700) == pytest.approx(0.08, rel=0.1)
    assert adata.X.sum(axis=1).min() > 0
    assert list(adata.obs["batch"].cat.categories) == ["batch_0", "batch_1", "batch_2"]
    assert adata.obs["cell_type"].nunique() == 5


def test_atlas_has_no_empty_cell_at_a_tiny_density():
    adata = simulate_atlas(500, 40, 2, 2, density=0.005)
    assert adata.X.sum(axis=1).min() == 1


def test_atlas_is_the_same_for_the_same_seed_only():
    first, again, other = (simulate_atlas(100, 50, seed=seed) for seed in (3, 3, 4))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_atlas_has_what_the_model_is_to_learn():
    """Types differ more than batches, library sizes spread, counts are overdispersed."""
    adata = simulate_atlas(3000, 300, 2, 2, density=0.3, dropout=0.0)
    counts = adata.X.toarray()
    library = counts.sum(axis=1)
    assert 0.3 < np.log(library).std() < 0.8
    profiles = counts / library[:, None]

    def distance(key):
        first, second = (profiles[adata.obs[key] == c].mean(0) for c in adata.obs[key].unique())
        return np.abs(first - second).sum()

    assert distance("cell_type") > distance("batch") > 0.05
    alike = counts[(adata.obs["batch"] == "batch_0") & (adata.obs["cell_type"] == "type_0")]
    mean, variance = alike.mean(axis=0), alike.var(axis=0)
    excess = ((variance - mean) / mean**2)[mean > 0.5]
    assert np.median(excess) > 0.6  # the spread of library sizes alone would give 0.28


def test_atlas_dropout_zeroes_counts():
    """At the same density, dropout leaves fewer but larger counts."""
    without, with_ = (simulate_atlas(2000, 200, density=0.3, dropout=d) for d in (0.0, 0.4))
    assert with_.X.nnz == pytest.approx(without.X.nnz, rel=0.05)
    assert with_.X.data.mean() > 1.3 * without.X.data.mean()


def test_atlas_is_made_in_blocks(monkeypatch):
    monkeypatch.setattr(datasets, "_BLOCK", 1000)
    adata = simulate_atlas(103, 50)  # blocks of 20 cells and one of 3
    assert adata.shape == (103, 50)
    assert adata.X.sum(axis=1).min() > 0


@pytest.mark.parametrize(
    "arguments", [{"n_cells": 0}, {"n_batches": 0}, {"density": 0.0}, {"dropout": 0.5}]
)
def test_atlas_refuses(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} is .* expected"):
        simulate_atlas(**arguments)


# --- the demonstration's counts -----------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def no_network():
        raise datasets._Unavailable("no network")

    monkeypatch.setattr(datasets, "_pbmc3k", no_network)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, seed in (("b", 0), ("a", 1)):
        simulate_atlas(60, 20, seed=seed).write_h5ad(tmp_path / f"{name}.h5ad")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    return tmp_path


def test_demo_takes_the_folder_first(folder):
    adata, description = demo_counts()
    assert description == f"real counts, a.h5ad of {DATA_VARIABLE}"
    assert (adata.X != simulate_atlas(60, 20, seed=1).X).nnz == 0


@pytest.mark.parametrize("name", ["b", "b.h5ad"])
def test_demo_takes_a_named_file(folder, name):
    adata, description = demo_counts(name)
    assert "b.h5ad" in description
    assert (adata.X != simulate_atlas(60, 20, seed=0).X).nnz == 0


def test_demo_downloads_without_a_folder(tmp_path, monkeypatch):
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed: decoder-fast[scvi]")
    adata = simulate_atlas(60, 20)
    adata.X.data[adata.X.indices == 3] = 0
    seen = []

    def pbmc3k():
        seen.append(scanpy.settings.datasetdir)
        return adata

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scanpy.datasets, "pbmc3k", pbmc3k)
    before = scanpy.settings.datasetdir.resolve()
    found, description = demo_counts()
    assert "pbmc3k" in description
    assert f"{DATA_VARIABLE} is not set" in description
    assert found.n_vars < 20  # genes that no cell expresses are left out
    assert seen == [tmp_path / "decoder_fast"]  # not a folder "data" where the command is run
    assert scanpy.settings.datasetdir.resolve() == before
    assert not (tmp_path / "data").exists()


def test_demo_says_why_a_download_failed(monkeypatch, tmp_path):
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed: decoder-fast[scvi]")

    def pbmc3k():
        try:
            raise OSError("no route to host")
        except OSError:
            raise ImportError("certifi") from None  # as scanpy does, which hides the reason

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scanpy.datasets, "pbmc3k", pbmc3k)
    adata, description = demo_counts()
    assert adata.shape == (4000, 2000)
    assert "simulated" in description
    assert "no route to host" in description


def test_demo_skips_a_folder_that_is_missing_or_empty(tmp_path, monkeypatch, offline):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    _, description = demo_counts()
    assert "simulated atlas" in description
    assert "not a folder" in description
    assert "no network" in description
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert "holds no h5ad file" in demo_counts()[1]
    (tmp_path / "broken.h5ad").write_text("nothing")
    assert "could not be read" in demo_counts()[1]


def test_demo_does_not_replace_what_was_named(folder, offline):
    with pytest.raises(InputError, match="holds only a, b"):
        demo_counts("c")
    with pytest.raises(InputError, match="no network"):
        demo_counts("pbmc3k")
    assert demo_counts("simulated")[1] == "a simulated atlas"


# --- reading and checking -----------------------------------------------------------------------


def write(adata, folder):
    path = folder / "counts.h5ad"
    adata.write_h5ad(path)
    return path


def test_read_takes_only_what_is_needed(atlas, tmp_path):
    atlas.layers["counts"] = atlas.X.copy()
    atlas.obsm["X_pca"] = np.zeros((120, 2))
    atlas.X = np.log1p(atlas.X)
    adata = read_counts(write(atlas, tmp_path), layer="counts", say=ignore)
    assert adata.X is None
    assert list(adata.layers) == ["counts"]
    assert not adata.obsm
    assert (adata.layers["counts"] != atlas.layers["counts"]).nnz == 0
    assert adata.obs.equals(atlas.obs)
    assert adata.var_names.equals(atlas.var_names)


def test_read_accepts_files_of_old_anndata(atlas, tmp_path):
    """Before 0.7, data frames were compound arrays and nothing said how it was encoded."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"] = "csr"
        group.attrs["h5sparse_shape"] = atlas.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(atlas.X, part)
        for name, index in (("obs", atlas.obs_names), ("var", atlas.var_names)):
            file[name] = np.array([(i.encode(),) for i in index], dtype=[("index", "S20")])
    with pytest.warns(ad.OldFormatWarning, match="very old version"):
        adata = read_counts(path, say=ignore)
    assert (adata.X != atlas.X).nnz == 0
    assert adata.obs_names.equals(atlas.obs_names)
    with (
        pytest.raises(InputError, match="no column 'batch'"),
        pytest.warns(ad.OldFormatWarning, match="very old version"),
    ):
        read_counts(path, keys=ObsKeys(batch="batch"), say=ignore)


@pytest.mark.parametrize("convert", ["csc", "dense", "integer", "fortran"])
def test_check_converts_to_csr(atlas, convert):
    expected = atlas.X.copy()
    atlas.X = {
        "csc": atlas.X.tocsc(),
        "dense": atlas.X.toarray(),
        "integer": atlas.X.astype(np.int64),
        "fortran": np.asfortranarray(atlas.X.toarray()),
    }[convert]
    said = []
    adata = check_counts(atlas, say=said.append)
    assert adata.X.format == "csr"
    assert (adata.X != expected).nnz == 0
    assert bool(said) == (convert != "integer")


def test_check_leaves_out_empty_cells(atlas):
    counts = atlas.X.tolil()
    counts[[0, 7]] = 0
    atlas.X = counts.tocsr()
    said = []
    adata = check_counts(atlas, say=said.append)
    assert adata.n_obs == 118
    assert "cell_7" not in adata.obs_names
    assert said == ["leaving out 2 of 120 cells, which have no counts at all"]


def spoil(value, at=-1):
    def change(adata):
        adata.X.data[at] = value

    return change


def log_normalise(adata):
    library = adata.X.sum(axis=1)
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray() / library * 1e4))


def scale(adata):
    dense = adata.X.toarray()
    adata.X = (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 1)


def normalise(adata):
    adata.X = sparse.csr_matrix(adata.X.toarray() / adata.X.sum(axis=1) * 1e4 + 0.01)


def empty(adata):
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)


BAD_VALUES = {
    "NaN": (spoil(np.nan), r"1 of [\d,]+ non-zero values are NaN or infinite"),
    "infinite": (spoil(np.inf), "NaN or infinite"),
    "negative": (spoil(-2.0), "negative, the smallest is -2"),
    "fractional": (spoil(2.5), "0.2% of the non-zero values are fractional.*round them"),
    "log-normalised": (log_normalise, "largest value is .*this looks like log-normalised data"),
    "normalised": (normalise, "this looks like normalised data"),
    "scaled": (scale, "this looks like scaled data"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_are_not_counts(atlas, tmp_path, name):
    change, message = BAD_VALUES[name]
    change(atlas)
    with pytest.raises(InputError, match=message):
        check_counts(atlas.copy(), say=ignore)
    with pytest.raises(InputError, match=f"X does not hold raw counts: in a sample.*{message}"):
        read_counts(write(atlas, tmp_path), say=ignore)


def test_the_whole_matrix_is_checked_after_the_sample(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_SAMPLED_BLOCK", 4)
    monkeypatch.setattr(datasets, "_SAMPLED_BLOCKS", 3)
    monkeypatch.setattr(datasets, "_BLOCK", 10)
    atlas.X.data[20] = -1
    adata = read_counts(write(atlas, tmp_path), say=ignore)  # the sample does not meet it
    with pytest.raises(InputError, match="negative") as raised:
        check_counts(adata, say=ignore)
    assert "X looks like raw counts" not in str(raised.value)


def test_normal_likelihood_takes_fractions(atlas, tmp_path):
    log_normalise(atlas)
    adata = read_counts(write(atlas, tmp_path), likelihood="normal", say=ignore)
    assert check_counts(adata, likelihood="normal", say=ignore).shape == atlas.shape


def test_all_zero(atlas):
    empty(atlas)
    with pytest.raises(InputError, match="all its values are zero"):
        check_counts(atlas, say=ignore)


def test_too_few(atlas):
    with pytest.raises(InputError, match="20 cells and 60 genes; expected at least 50"):
        check_counts(atlas[:20].copy(), say=ignore)
    with pytest.raises(InputError, match="expected at least"):
        check_counts(atlas[:, :5].copy(), say=ignore)


@pytest.mark.parametrize("place", ["layer", "odd layer", "raw", "X", "nowhere"])
def test_error_says_where_the_counts_are(atlas, tmp_path, place):
    """Log-normalised values in one place and counts in another, in a file and in memory."""
    counts, layer = atlas.copy(), None
    log_normalise(atlas)
    if place == "layer":
        atlas.layers["umi"] = counts.X
        expected = "layers['umi'] looks like raw counts: add --layer umi"
    elif place == "odd layer":
        atlas.layers["it's [raw]"] = counts.X
        expected = """add --layer 'it'"'"'s [raw]'"""
    elif place == "raw":
        atlas.raw = counts
        expected = "raw.X looks like raw counts: write adata.raw.to_adata()"
    elif place == "X":
        layer, atlas.layers["logs"], atlas.X = "logs", atlas.X, counts.X
        expected = "X looks like raw counts: leave out --layer"
    else:
        expected = "no other matrix of the file looks like raw counts"
    with pytest.raises(InputError) as raised:
        read_counts(write(atlas, tmp_path), layer=layer, say=ignore)
    assert expected in str(raised.value)
    with pytest.raises(InputError) as raised:
        check_counts(atlas, layer=layer, say=ignore)
    assert place == "nowhere" or expected in str(raised.value)


def test_missing_matrix(atlas, tmp_path):
    with pytest.raises(InputError, match=r"no layers\['umi'\]; it has: X; X looks like raw counts"):
        read_counts(write(atlas, tmp_path), layer="umi", say=ignore)
    with pytest.raises(InputError, match=r"no layers\['umi'\]; they have: X"):
        check_counts(atlas, layer="umi", say=ignore)
    without = ad.AnnData(obs=atlas.obs, var=atlas.var, layers={"umi": atlas.X})
    with pytest.raises(InputError, match=r"has no X; it has: layers\['umi'\].*--layer umi"):
        read_counts(write(without, tmp_path), say=ignore)
    with pytest.raises(InputError, match="no X"):
        check_counts(without, say=ignore)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (ObsKeys(batch="donor"), r"no column 'donor' \(--batch-key\).*are: batch, cell_type, age"),
        (ObsKeys(labels="kind"), r"no column 'kind' \(--labels-key\)"),
        (ObsKeys(categorical=("a",)), "--categorical-covariate"),
        (ObsKeys(continuous=("cell_type",)), "has dtype category; expected finite numbers"),
        (ObsKeys(continuous=("age",)), r"obs\['age'\] .* has no value in 1 of 120 cells"),
        (ObsKeys(batch="age"), "has no value in 1 of 120 cells"),
    ],
)
def test_keys(atlas, tmp_path, keys, message):
    atlas.obs["age"] = np.arange(120.0)
    atlas.obs.loc["cell_5", "age"] = np.nan
    with pytest.raises(InputError, match=message):
        read_counts(write(atlas, tmp_path), keys=keys, say=ignore)


def test_a_key_that_can_hardly_be_one_is_remarked(atlas):
    said = []
    atlas.obs["n_counts"] = np.arange(120)
    ObsKeys(batch="n_counts").check(atlas.obs, said.append)
    assert said == ["note: obs['n_counts'] (--batch-key) has 120 categories in 120 cells"]


def test_files_that_are_no_h5ad(atlas, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*missing\.h5ad"):
        read_counts(tmp_path / "missing.h5ad")
    with pytest.raises(InputError, match="is a folder"):
        read_counts(tmp_path)
    (tmp_path / "text.h5ad").write_text("gene,count\n")
    with pytest.raises(InputError, match="not an HDF5 file; expected an h5ad file"):
        read_counts(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "cellranger.h5", "w") as file:
        file.create_group("matrix")
    with pytest.raises(InputError, match=r"has no obs and no var, only matrix.*read_10x_h5"):
        read_counts(tmp_path / "cellranger.h5")
    path = write(atlas, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read as an h5ad file"):
        read_counts(path)


# --- counts that stay on disk --------------------------------------------------------------------


def test_counts_stay_on_disk(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_BLOCK", 500)  # many blocks, the last one smaller
    adata = check_counts(read_counts(write(atlas, tmp_path), backed=True, say=ignore), say=ignore)
    assert adata.isbacked and adata.shape == atlas.shape
    assert (adata.X[:].toarray() == atlas.X.toarray()).all()
    assert adata.obs.equals(atlas.obs)


@pytest.mark.parametrize("change", [sparse.csc_matrix, lambda x: x.toarray()])
def test_what_cannot_stay_on_disk(atlas, tmp_path, change):
    atlas.X = change(atlas.X)
    with pytest.raises(InputError, match=r"X cannot stay on disk.*it is (csc_matrix|array)"):
        read_counts(write(atlas, tmp_path), backed=True, say=ignore)


def test_a_layer_cannot_stay_on_disk(atlas, tmp_path):
    atlas.layers["counts"] = atlas.X
    path = write(atlas, tmp_path)
    with pytest.raises(InputError, match="cannot stay on disk"):
        read_counts(path, layer="counts", backed=True, say=ignore)
    with pytest.raises(InputError, match="cannot stay on disk"):
        check_counts(ad.read_h5ad(path, backed="r"), layer="counts", say=ignore)


def test_bad_values_on_disk_are_found(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_BLOCK", 500)
    atlas.X.data[-1] = -1
    adata = ad.read_h5ad(write(atlas, tmp_path), backed="r")
    with pytest.raises(InputError, match="does not hold raw counts"):
        check_counts(adata, say=ignore)


def test_empty_cells_on_disk(atlas, tmp_path):
    atlas.X = sparse.csr_matrix(atlas.X.multiply(np.arange(atlas.n_obs)[:, None] > 2))
    adata = read_counts(write(atlas, tmp_path), backed=True, say=ignore)
    with pytest.raises(InputError, match=r"3 of .* cells have no counts"):
        check_counts(adata, say=ignore)
