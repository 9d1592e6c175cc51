"""Counts to train on: read from an h5ad file and checked, found for a demonstration, simulated."""

from __future__ import annotations

import ast
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "DATA_VARIABLE",
    "InputError",
    "ObsKeys",
    "check_counts",
    "demo_counts",
    "read_counts",
    "simulate_atlas",
]

#: The environment variable that names a folder of h5ad files for demonstrations and tests.
DATA_VARIABLE = "DECODER_FAST_DATA"

#: Below these scVI has nothing to learn from, and its validation set may come out empty.
MIN_CELLS, MIN_GENES = 50, 10

_GENE_ID = r"ENS[A-Z]*G\d{6,}"  # of Ensembl

_SAMPLED_BLOCKS, _SAMPLED_BLOCK = 16, 1 << 16
_BLOCK = 1 << 22  # values or matrix elements that are worked on at a time: tens of megabytes

Say = Callable[[str], Any]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found and what was expected."""


@dataclass(frozen=True)
class ObsKeys:
    """The columns of ``obs`` that a model is given, as in ``scvi.model.SCVI.setup_anndata``.

    Attributes
    ----------
    batch, labels
        Name of the column with the batch and with the labels, or None.
    categorical, continuous
        Names of the columns with further covariates.
    """

    batch: str | None = None
    labels: str | None = None
    categorical: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()

    def check(self, obs: Any, say: Say) -> None:
        """Raise :class:`InputError` if ``obs``, a data frame, cannot serve these keys."""
        from pandas.api.types import is_float_dtype, is_numeric_dtype

        roles = [("--batch-key", self.batch), ("--labels-key", self.labels)]
        roles += [("--categorical-covariate", key) for key in self.categorical]
        roles += [("--continuous-covariate", key) for key in self.continuous]
        for option, key in roles:
            if key is None:
                continue
            if key not in obs:
                known = ", ".join(map(str, obs.columns)) or "none"
                raise InputError(f"obs has no column {key!r} ({option}); its columns are: {known}")
            column = obs[key]
            if missing := int(column.isna().sum()):
                raise InputError(
                    f"obs[{key!r}] ({option}) has no value in {missing:,} of {len(column):,} "
                    "cells; every cell needs one: fill them in, or leave those cells out"
                )
            if option == "--continuous-covariate":
                if not is_numeric_dtype(column) or not np.isfinite(column.to_numpy(float)).all():
                    raise InputError(
                        f"obs[{key!r}] ({option}) has dtype {column.dtype}; expected finite "
                        "numbers (use --categorical-covariate for categories)"
                    )
            elif (n := column.nunique()) > len(column) / 2 or (is_float_dtype(column) and n > 100):
                say(f"note: obs[{key!r}] ({option}) has {n:,} categories in {len(column):,} cells")


@dataclass
class _Survey:
    """What the non-zero values of a matrix look like."""

    seen: int = 0
    negative: int = 0
    fractional: int = 0
    not_finite: int = 0
    smallest: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, blocks: Iterator[np.ndarray]) -> _Survey:
        survey = cls()
        for block in blocks:
            values = block[block != 0]
            finite = np.isfinite(values)
            survey.seen += values.size
            survey.not_finite += values.size - int(np.count_nonzero(finite))
            values = values[finite]
            if values.size:
                survey.negative += int(np.count_nonzero(values < 0))
                survey.smallest = min(survey.smallest, float(values.min()))
                survey.largest = max(survey.largest, float(values.max()))
                if values.dtype.kind == "f":
                    survey.fractional += int(np.count_nonzero(values != np.rint(values)))
        return survey

    def problem(self, fractional_ok: bool = False) -> str | None:
        """Say what speaks against raw counts, or None."""
        if self.not_finite:
            return f"{self.not_finite:,} of {self.seen:,} non-zero values are NaN or infinite"
        if self.negative:
            # the encoder takes log(1 + x), whatever the likelihood
            scaled = ": this looks like scaled data" if self.negative > self.seen / 100 else ""
            return (
                f"{self.negative:,} of {self.seen:,} non-zero values are negative, the "
                f"smallest is {self.smallest:.4g}{scaled}"
            )
        if self.fractional and not fractional_ok:
            found = (
                f"{self.fractional / self.seen:.1%} of the non-zero values are fractional, "
                f"the largest value is {self.largest:.4g}: "
            )
            # log2(x + 1) leaves the ones, of which there are most, whole
            if self.largest < 20 and self.fractional > self.seen / 10:
                return found + "this looks like log-normalised data"
            if self.fractional > self.seen / 2:
                return found + "this looks like normalised data"
            return found + (
                "round them first if these are estimates, of ambient RNA removal or RSEM, say"
            )
        return None


def _matrix_blocks(matrix: Any) -> Iterator[np.ndarray]:
    """Go through all values of a dense or sparse matrix without temporaries of its size."""
    values = matrix.data if hasattr(matrix, "indptr") else matrix.reshape(-1)
    return (values[i : i + _BLOCK] for i in range(0, values.shape[0], _BLOCK))


def _blocks_on_disk(matrix: Any, sums: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Go through all values of a CSR matrix on disk, once, adding its rows' ``sums`` on the way."""
    from tqdm import tqdm

    n_cells = matrix.shape[0]
    rows = max(1, _BLOCK * n_cells // max(1, matrix.group["data"].shape[0]))
    with tqdm(total=n_cells, desc="checking", unit=" cells", delay=2) as bar:
        for start in range(0, n_cells, rows):
            block = matrix[start : start + rows]
            sums.append(block.sum(axis=1, dtype=np.float64))
            yield block.data
            bar.update(min(rows, n_cells - start))


def _sampled_blocks(matrix: Any) -> Iterator[np.ndarray]:
    """Read blocks spread evenly over a matrix, sparse or dense, in memory or in an HDF5 file."""
    matrix = getattr(matrix, "group", matrix)  # of one that anndata left on disk
    if hasattr(matrix, "indptr"):
        values = matrix.data
    else:
        values = matrix["data"] if hasattr(matrix, "keys") else matrix
    length = values.shape[0]
    size = max(1, _SAMPLED_BLOCK // max(1, int(np.prod(values.shape[1:], dtype=np.int64))))
    n_blocks = min(_SAMPLED_BLOCKS, -(-length // size))
    for start in np.linspace(0, max(0, length - size), n_blocks, dtype=np.int64):
        yield np.asarray(values[start : start + size])


def _is_matrix(node: Any) -> bool:
    """Whether a node of an h5ad file is a sparse matrix (a group) or a dense one (a dataset)."""
    return "data" in node if hasattr(node, "keys") else len(node.shape) == 2


def _counts_elsewhere(matrices: dict[str, Any], where: str) -> str:
    """Say which other matrices hold whole numbers, judged by a sample; empty if none does."""
    found = []
    for name, matrix in matrices.items():
        survey = _Survey.of(_sampled_blocks(matrix))
        if name == where or not survey.seen or survey.problem():
            continue
        advice = "leave out --layer"
        if name == "raw.X":
            advice = "write adata.raw.to_adata() to a new file and train on that"
        elif (layer := _layer(name)) is not None:
            advice = f"add --layer {shlex.quote(layer)}"
        found.append(f"{name} looks like raw counts: {advice}")
    return "; ".join(found)


def _not_counts(where: str, problem: str, elsewhere: str, likelihood: str) -> InputError:
    found = f"; {elsewhere}" if elsewhere else ""
    if likelihood == "normal":
        return InputError(
            f"{where} cannot be trained on: {problem}. Expected finite numbers of 0 and above: "
            f"SCVI's encoder takes their log(1 + x) under every likelihood{found}"
        )
    return InputError(
        f"{where} does not hold raw counts: {problem}. "
        "Expected whole numbers of 0 and above, as they come from counting molecules, before any "
        f"normalisation{found}"
    )


def _where(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"


def _layer(where: str) -> str | None:
    """Return the layer that :func:`_where` was told of."""
    in_brackets = where.removeprefix("layers[").removesuffix("]")
    return None if in_brackets == where else ast.literal_eval(in_brackets)


def read_counts(
    path: str | Path,
    *,
    layer: str | None = None,
    keys: ObsKeys | None = None,
    likelihood: str = "zinb",
    backed: bool = False,
    say: Say = print,
) -> AnnData:
    """Read the counts of an h5ad file, after a look whether it can be what is wanted.

    Only ``obs``, ``var`` and the one matrix are read. Before the matrix is read, the keys and a
    sample of the values are checked, so that a large file fails early; :func:`check_counts` checks
    all values afterwards.

    Parameters
    ----------
    path
        The h5ad file.
    layer
        The layer that holds the counts; None for ``X``.
    keys
        Columns of ``obs`` that must be there.
    likelihood
        ``"normal"`` accepts fractional values, all others do not.
    backed
        Leave the counts, which must be ``X`` in CSR, in the file: for more than memory can hold.
    say
        Called with each message for the user.

    Returns
    -------
    AnnData
        Cells x genes, the counts in ``X`` or in ``layers[layer]``, as in the file.

    Raises
    ------
    InputError
        If the file is not there or not an h5ad, if a key or the matrix is missing, or if values of
        the sample are not raw counts.
    """
    import anndata
    import h5py

    path, keys = Path(path), keys or ObsKeys()
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if path.is_dir() or not h5py.is_hdf5(path):
        what = "a folder" if path.is_dir() else "not an HDF5 file"
        raise InputError(
            f"{path} is {what}; expected an h5ad file, as adata.write_h5ad() of anndata and scanpy "
            "writes it"
        )
    try:
        with h5py.File(path, "r") as file:
            if missing := [name for name in ("obs", "var") if name not in file]:
                raise InputError(
                    f"{path} is HDF5, but not an h5ad file: it has no {' and no '.join(missing)}, "
                    f"only {', '.join(file) or 'nothing'}. Read it with scanpy (read_10x_h5 for "
                    "files of Cell Ranger) and write it with adata.write_h5ad()"
                )
            if "encoding-type" not in file["obs"].attrs:  # written by anndata before 0.7
                if backed:
                    raise InputError(
                        f"{path} was written by anndata before 0.7: to leave it on disk, read it "
                        "and write it again with adata.write_h5ad()"
                    )
                adata = anndata.read_h5ad(path)
                keys.check(adata.obs, say)
                return adata
            adata = _read_parts(file, layer, keys, likelihood, backed, say)
        if backed:
            return anndata.AnnData(obs=adata.obs, var=adata.var, filename=path, filemode="r")
        return adata
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError) as error:  # cut short or corrupt
        raise InputError(f"{path} cannot be read as an h5ad file: {error}") from error


def _read_parts(
    file: Any, layer: str | None, keys: ObsKeys, likelihood: str, backed: bool, say: Say
) -> AnnData:
    """Read obs, var and one matrix of an open h5ad file, the matrix last and after a look at it.

    If it shall stay ``backed``, only the look is taken.
    """
    import anndata

    read = anndata.io.read_elem
    obs, var = read(file["obs"]), read(file["var"])
    keys.check(obs, say)
    where = _where(layer)
    nodes = {"X": file.get("X"), "raw.X": file.get("raw/X")}
    nodes |= {_where(name): node for name, node in file.get("layers", {}).items()}
    matrices = {name: node for name, node in nodes.items() if node is not None and _is_matrix(node)}
    elsewhere = "no other matrix of the file looks like raw counts"
    if where not in matrices:
        raise InputError(
            f"the file has no {where}; it has: "
            + (", ".join(matrices) + "; " if matrices else "no matrix at all")
            + (_counts_elsewhere(matrices, where) or (elsewhere if matrices else ""))
        )
    node = matrices[where]
    survey = _Survey.of(_sampled_blocks(node))
    if problem := survey.problem(likelihood == "normal"):
        problem = f"in a sample of {survey.seen:,} non-zero values, {problem}"
        elsewhere = _counts_elsewhere(matrices, where) or elsewhere
        raise _not_counts(where, problem, elsewhere, likelihood)
    if backed:
        encoding = str(node.attrs.get("encoding-type", "unknown"))
        if layer is not None or encoding != "csr_matrix":
            raise InputError(
                f"{where} cannot stay on disk: anndata reads only X from there, and cells are "
                f"quick to pick out in CSR alone, but it is {encoding}. Write the counts to a new "
                "file as X, a scipy.sparse.csr_matrix, or have them read to memory"
            )
        return anndata.AnnData(obs=obs, var=var)
    matrix = read(node)
    if layer is None:
        return anndata.AnnData(matrix, obs=obs, var=var)
    return anndata.AnnData(obs=obs, var=var, layers={layer: matrix})


def check_counts(
    adata: AnnData,
    *,
    layer: str | None = None,
    likelihood: str = "zinb",
    say: Say = print,
) -> AnnData:
    """Check every value of the counts, convert them to CSR and leave out cells without any.

    Parameters
    ----------
    adata
        Cells x genes; its matrix may be replaced by an equal one in CSR.
    layer
        The layer that holds the counts; None for ``X``.
    likelihood
        ``"normal"`` accepts fractional values, all others do not.
    say
        Called with each message for the user.

    Returns
    -------
    AnnData
        ``adata``, or a copy without the empty cells.

    Raises
    ------
    InputError
        If the matrix is missing, if there are too few cells or genes, or if values are NaN,
        infinite, negative or (unless the likelihood is ``"normal"``) fractional; if there are empty
        cells in a matrix on disk, which cannot be left out.
    """
    from scipy import sparse

    where = _where(layer)
    if adata.isbacked and layer is not None:
        raise InputError(f"{where} cannot stay on disk: anndata reads only X from there")
    matrices = {"X": adata.X, "raw.X": None if adata.raw is None else adata.raw.X}
    matrices |= {_where(name): matrix for name, matrix in adata.layers.items()}
    matrices = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    if where not in matrices:
        raise InputError(f"the data have no {where}; they have: {', '.join(matrices) or 'nothing'}")
    matrix = matrices[where]
    if matrix.dtype.kind not in "biuf":
        raise InputError(f"{where} has dtype {matrix.dtype}; expected numbers")
    _check_size(where, adata, "cells")
    genes = adata.obs_names.astype(str).str.match(_GENE_ID).sum()
    if genes > adata.n_obs / 2:
        say("note: the cells are named as genes are; if the matrix is transposed, save adata.T")
    if adata.isbacked:
        sums: list[np.ndarray] = []
        blocks = _blocks_on_disk(matrix, sums)
    else:
        if not sparse.issparse(matrix) or matrix.format != "csr":
            kind = matrix.format.upper() if sparse.issparse(matrix) else "dense"
            say(f"{where} is {kind}: converting it to CSR, in which cells are quick to pick out")
            matrix = sparse.csr_matrix(matrix)
            if layer is None:
                adata.X = matrix
            else:
                adata.layers[layer] = matrix
        blocks = _matrix_blocks(matrix)

    survey = _Survey.of(blocks)
    problem = survey.problem(likelihood == "normal")
    if problem or not survey.seen:
        elsewhere = _counts_elsewhere(matrices, where)
        raise _not_counts(where, problem or "all its values are zero", elsewhere, likelihood)

    # a library size of zero has the logarithm -inf, which would turn the whole model into NaN
    library = np.concatenate(sums) if adata.isbacked else matrix.sum(axis=1, dtype=np.float64)
    filled = np.asarray(library).ravel() > 0
    if n_empty := int(np.count_nonzero(~filled)):
        if adata.isbacked:
            raise InputError(
                f"{n_empty:,} of {adata.n_obs:,} cells have no counts at all, and cannot be left "
                "out of a file: write one without them, or have the counts read to memory"
            )
        say(f"leaving out {n_empty:,} of {adata.n_obs:,} cells, which have no counts at all")
        adata = adata[filled].copy()
        _check_size(where, adata, "cells with counts")
    return adata


def _check_size(where: str, adata: AnnData, cells: str) -> None:
    if adata.n_obs < MIN_CELLS or adata.n_vars < MIN_GENES:
        raise InputError(
            f"{where} has {adata.n_obs:,} {cells} and {adata.n_vars:,} genes; "
            f"expected at least {MIN_CELLS} cells (better a thousand) and {MIN_GENES} genes"
        )


class _Unavailable(Exception):
    """Why a source of demonstration data was not taken."""


def _from_folder(dataset: str | None) -> tuple[AnnData, str]:
    import anndata

    name = os.environ.get(DATA_VARIABLE)
    if not name:
        raise _Unavailable(f"{DATA_VARIABLE} is not set")
    if not Path(name).is_dir():
        raise _Unavailable(f"{DATA_VARIABLE} names {name}, which is not a folder")
    paths = {path.stem: path for path in sorted(Path(name).glob("*.h5ad"))}
    if not paths:
        raise _Unavailable(f"the folder {name} ({DATA_VARIABLE}) holds no h5ad file")
    path = paths.get((dataset or next(iter(paths))).removesuffix(".h5ad"))
    if path is None:
        raise _Unavailable(f"the folder {name} ({DATA_VARIABLE}) holds only {', '.join(paths)}")
    try:
        return anndata.read_h5ad(path), f"real counts, {path.name} of {DATA_VARIABLE}"
    except Exception as error:
        raise _Unavailable(f"{path} could not be read ({error})") from error


def _pbmc3k() -> tuple[AnnData, str]:
    try:
        import scanpy
    except ImportError as error:
        raise _Unavailable("scanpy, which downloads pbmc3k, is not installed") from error
    folder, timeout = scanpy.settings.datasetdir, socket.getdefaulttimeout()
    file = Path(folder, "pbmc3k_raw.h5ad")
    try:
        if not file.exists():  # do not leave a folder "data" wherever the command was run
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "decoder_fast")
            cache.mkdir(parents=True, exist_ok=True)
            scanpy.settings.datasetdir = cache
        socket.setdefaulttimeout(10)
        adata = scanpy.datasets.pbmc3k()
    except Exception as error:  # whatever the network does: there is another source
        first: BaseException = error
        while first.__context__ is not None:  # scanpy tries twice; the first failure says more
            first = first.__context__
        raise _Unavailable(f"scanpy's pbmc3k could not be downloaded ({first})") from error
    finally:
        socket.setdefaulttimeout(timeout)
        scanpy.settings.datasetdir = folder
    expressed = np.asarray(adata.X.sum(axis=0)).ravel() > 0
    return adata[:, expressed].copy(), "real counts, scanpy's pbmc3k (genes with counts)"


def _simulated() -> tuple[AnnData, str]:
    return simulate_atlas(), "a simulated atlas"


def demo_counts(dataset: str | None = None) -> tuple[AnnData, str]:
    """Get counts for a demonstration: real ones where they can be found, else simulated ones.

    Parameters
    ----------
    dataset
        The name of an h5ad file (with or without ``.h5ad``) in the folder that the environment
        variable ``DECODER_FAST_DATA`` names, or ``"pbmc3k"``, or ``"simulated"``. None takes the
        first that can be had: the first file of that folder in alphabetical order, scanpy's
        ``pbmc3k`` (downloaded once), a simulated atlas.

    Returns
    -------
    adata
        Cells x genes, raw counts in ``X``.
    description
        A sentence that says which it is, and why not one of the earlier ones.

    Raises
    ------
    InputError
        If ``dataset`` was named and cannot be had.
    """
    sources: list[Callable[[], tuple[AnnData, str]]]
    if dataset == "simulated":
        sources = [_simulated]
    elif dataset == "pbmc3k":
        sources = [_pbmc3k]
    elif dataset is not None:
        sources = [lambda: _from_folder(dataset)]
    else:
        sources = [lambda: _from_folder(None), _pbmc3k, _simulated]
    reasons: list[str] = []
    for source in sources:
        try:
            adata, description = source()
        except _Unavailable as reason:
            reasons.append(str(reason))
        else:
            because = f" (because {', and '.join(reasons)})" if reasons else ""
            return adata, description + because
    raise InputError(
        f"the demonstration data {dataset!r} cannot be had: {'; '.join(reasons)}. Expected the "
        f"name of an h5ad file in the folder that {DATA_VARIABLE} names, 'pbmc3k' or 'simulated'"
    )


def simulate_atlas(
    n_cells: int = 4000,
    n_genes: int = 2000,
    n_batches: int = 4,
    n_cell_types: int = 8,
    *,
    density: float = 0.07,
    dropout: float = 0.1,
    seed: int = 0,
) -> AnnData:
    """Simulate the counts of a single-cell atlas.

    Counts are negative binomial with a dispersion for each gene. The mean is the product of a
    cell's library size (log-normal) and its expression profile, which cell type and batch shift
    gene by gene; some counts are lost to dropout. Library sizes are scaled to meet the density.

    Parameters
    ----------
    n_cells, n_genes, n_batches, n_cell_types
        Numbers of each, at least 1. No matrix of cells x genes is made, so a million cells fit.
    density
        Expected share of non-zero counts, above 0 and at most 0.5.
    dropout
        Median over the genes of the probability that a count is lost, from 0 to below 0.5.
    seed
        Seed of the random numbers: the same seed gives the same atlas.

    Returns
    -------
    AnnData
        ``X`` is CSR in float32, ``obs["batch"]`` and ``obs["cell_type"]`` are categorical. Every
        cell has at least one count.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """
    import anndata
    import pandas as pd
    from scipy import sparse
    from scipy.special import expit, logit

    sizes = dict(n_cells=n_cells, n_genes=n_genes, n_batches=n_batches, n_cell_types=n_cell_types)
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0 < density <= 0.5:
        raise ValueError(f"density is {density}; expected above 0 and at most 0.5")
    if not 0 <= dropout < 0.5:
        raise ValueError(f"dropout is {dropout}; expected from 0 to below 0.5")

    rng = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    log_expression = normal(1.5, n_genes)
    markers = rng.random((n_cell_types, n_genes)) < 0.15
    log_type = normal(1.2, n_cell_types, n_genes) * markers
    log_batch = normal(0.25, n_batches, n_genes)
    theta = rng.lognormal(np.log(2.0), 0.5, n_genes)  # inverse dispersion
    lost = expit(logit(dropout) + normal(0.5, n_genes)) if dropout else np.zeros(n_genes)

    batch = rng.integers(n_batches, size=n_cells)
    # batches differ in their composition, as samples do
    composition = rng.dirichlet(np.full(n_cell_types, 5.0), size=n_batches).cumsum(axis=1)
    cell_type = (rng.random((n_cells, 1)) > composition[batch, :-1]).sum(axis=1)
    library = rng.lognormal(0, 0.5, n_cells)  # relative to the median, which is found next

    def profile(cells: slice) -> np.ndarray:
        """Each cell's expression, (cells, genes), summing to one."""
        log = log_expression + log_type[cell_type[cells]] + log_batch[batch[cells]]
        expression = np.exp(log)
        return expression / expression.sum(axis=1, keepdims=True)

    probe = slice(0, max(1, min(n_cells, _BLOCK // 8 // n_genes)))
    relative_mean = library[probe, None] * profile(probe)
    low, high = np.log(1.0), np.log(1e7)
    for _ in range(20):
        middle = (low + high) / 2
        mean = np.exp(middle) * relative_mean
        non_zero = (1 - lost) * -np.expm1(-theta * np.log1p(mean / theta))
        low, high = (middle, high) if non_zero.mean() < density else (low, middle)
    library *= np.exp(low)

    parts = []
    rows = max(1, _BLOCK // n_genes)
    for start in range(0, n_cells, rows):
        cells = slice(start, min(start + rows, n_cells))
        mean = library[cells, None] * profile(cells)
        counts = rng.poisson(rng.gamma(theta, mean / theta))
        counts[rng.random(counts.shape) < lost] = 0
        empty = np.flatnonzero(counts.sum(axis=1) == 0)
        counts[empty, mean[empty].argmax(axis=1)] = 1
        parts.append(sparse.csr_matrix(counts.astype(np.float32)))

    obs = pd.DataFrame(
        {
            "batch": pd.Categorical.from_codes(batch, [f"batch_{i}" for i in range(n_batches)]),
            "cell_type": pd.Categorical.from_codes(
                cell_type, [f"type_{i}" for i in range(n_cell_types)]
            ),
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(n_genes)])
    return anndata.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=var)
