"""Train an SCVI model with the fused decoder and write what came of it, all of it or nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._version import __version__
from .backends import choose
from .datasets import InputError, ObsKeys

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

__all__ = [
    "SUMMARY",
    "Settings",
    "check_settings",
    "cpu_threads",
    "output_folder",
    "quiet",
    "train",
]

#: The file by which an output folder is known to be one.
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Settings:
    """What to train and how; the defaults are those of ``scvi.model.SCVI``.

    Attributes
    ----------
    keys
        Columns of ``obs`` that the model is given.
    layer
        Layer with the counts; None for ``X``.
    likelihood
        ``"zinb"``, ``"nb"``, ``"poisson"`` or ``"normal"``.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
    n_latent, n_layers, n_hidden
        Sizes of the model.
    max_epochs
        None for scvi-tools' choice, which is fewer epochs for more cells.
    batch_size
        Cells in a mini-batch.
    seed
        Seed of all random numbers.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"`` or ``"mps"``, as Lightning names them.
    threads
        Threads of the CPU; None for torch's choice.
    early_stopping
        Whether to stop when the ELBO of the validation cells no longer improves.
    fused
        Whether to train with the fused decoder.
    cuda_graph
        Whether to record a training step on the GPU and replay it.
    """

    keys: ObsKeys = field(default_factory=ObsKeys)
    layer: str | None = None
    likelihood: str = "zinb"
    dispersion: str = "gene"
    n_latent: int = 10
    n_layers: int = 1
    n_hidden: int = 128
    max_epochs: int | None = None
    batch_size: int = 128
    seed: int = 0
    accelerator: str = "auto"
    threads: int | None = None
    early_stopping: bool = False
    fused: bool = True
    cuda_graph: bool = False


def check_settings(settings: Settings) -> None:
    """Raise :class:`InputError` for settings that do not fit together or not this machine."""
    for dispersion, key, option in (
        ("gene-batch", settings.keys.batch, "--batch-key"),
        ("gene-label", settings.keys.labels, "--labels-key"),
    ):
        if settings.dispersion == dispersion and key is None:
            raise InputError(f"--dispersion {dispersion} needs {option}")
    if settings.batch_size < 2:
        raise InputError(
            f"--batch-size is {settings.batch_size}; expected at least 2, which batch norm needs"
        )
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("--accelerator gpu: torch sees no GPU here; decoder-fast doctor says more")
    if settings.cuda_graph:
        if not settings.fused:
            raise InputError("--cuda-graph needs the fused decoder: leave out --no-fused")
        if settings.accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
            raise InputError(
                "--cuda-graph needs an NVIDIA GPU, and "
                + (
                    f"--accelerator {settings.accelerator} was asked for"
                    if torch.cuda.is_available()
                    else "torch sees none here; decoder-fast doctor says more"
                )
            )
    if settings.accelerator == "mps" and not torch.backends.mps.is_available():
        raise InputError("--accelerator mps: torch has no Metal device here")


@contextlib.contextmanager
def output_folder(
    out: str | Path, *, overwrite: bool = False, marker: str = SUMMARY
) -> Iterator[Path]:
    """Give a new folder to write into, which becomes ``out`` if and only if the block succeeds.

    Parameters
    ----------
    out
        The folder to be. Folders above it are made too.
    overwrite
        Whether ``out`` may exist and be replaced, if it is the output of an earlier run.
    marker
        The file by which such an output is known.

    Yields
    ------
    Path
        A folder beside ``out``; it is removed if the block raises anything.

    Raises
    ------
    InputError
        If ``out`` exists and may not be replaced, or nothing can be written there. This is known
        before the block runs.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        if not overwrite:
            raise InputError(f"{out} exists already: choose another --out, or add --overwrite")
        if not (out / marker).is_file():
            raise InputError(
                f"{out} exists and was not written by decoder-fast for this (it has no {marker}), "
                "so it is not overwritten: choose another --out, or remove it yourself"
            )
    parent = next(folder for folder in out.parents if folder.exists())
    partial = parent / f".{out.name}.{os.getpid()}.partial"
    replaced = parent / f".{out.name}.{os.getpid()}.replaced"
    try:
        partial.mkdir()
    except OSError as error:
        raise InputError(f"cannot write to {parent}: {error}") from error
    try:
        yield partial
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rename(replaced)
        try:
            partial.rename(out)
        except BaseException:
            if replaced.exists():
                replaced.rename(out)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def train(
    adata: AnnData, settings: Settings, folder: Path, *, source: str, demo: bool = False
) -> dict[str, Any]:
    """Train SCVI and write the model, the latent space, the training curve and a summary.

    Parameters
    ----------
    adata
        Cells x genes with counts that :func:`decoder_fast.datasets.check_counts` has passed.
    settings
        What to train and how.
    folder
        An empty folder. ``model`` (for ``scvi.model.SCVI.load``), ``latent.h5ad``,
        ``training.csv``, ``training.png`` and ``summary.json`` are written into it.
    source
        Where the counts came from, for the summary.
    demo
        Whether this is a demonstration, for the summary.

    Returns
    -------
    dict
        What ``summary.json`` holds.

    Raises
    ------
    RuntimeError
        If the training diverged.
    """
    import scvi
    from anndata import AnnData

    from decoder_fast.scvi import fuse

    counts = adata.X if settings.layer is None else adata.layers[settings.layer]
    obs = adata.obs.loc[:, [not str(key).startswith("_scvi_") for key in adata.obs]].copy()
    keys = settings.keys

    with quiet():
        scvi.settings.seed = settings.seed
    scvi.model.SCVI.setup_anndata(
        adata,
        layer=settings.layer,
        batch_key=keys.batch,
        labels_key=keys.labels,
        categorical_covariate_keys=list(keys.categorical) or None,
        continuous_covariate_keys=list(keys.continuous) or None,
    )
    model = scvi.model.SCVI(
        adata,
        n_latent=settings.n_latent,
        n_layers=settings.n_layers,
        n_hidden=settings.n_hidden,
        dispersion=settings.dispersion,
        gene_likelihood=settings.likelihood,
    )
    if settings.fused:
        fuse(model)

    started = time.perf_counter()
    with quiet(), cpu_threads(settings.threads):
        model.train(
            max_epochs=settings.max_epochs,
            batch_size=settings.batch_size,
            accelerator=settings.accelerator,
            check_val_every_n_epoch=1,
            early_stopping=settings.early_stopping,
            **({"cuda_graph": True} if settings.cuda_graph else {}),
        )
    seconds = time.perf_counter() - started
    latent = model.get_latent_representation()
    if not np.isfinite(latent).all():
        raise RuntimeError(
            f"the training diverged: {np.count_nonzero(~np.isfinite(latent).all(axis=1)):,} cells "
            "have no finite latent representation. Another --seed, or fewer --max-epochs, may help"
        )

    history = _history(model.history)
    n_train, epochs = len(model.train_indices), len(history)
    summary = {
        "source": source,
        "demo": demo,
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "density": _n_nonzero(counts) / (adata.n_obs * adata.n_vars),
        "batches": model.summary_stats.n_batch,
        "settings": asdict(settings),
        "epochs": epochs,
        "training_cells": n_train,
        "seconds": round(seconds, 3),
        "cells_per_second": round(n_train * epochs / seconds, 1),
        "final": {key: float(history[key].iloc[-1]) for key in history},
        "device": _device_name(model.device, settings.threads),
        "ran": _what_ran(model, settings),
        "versions": {
            "decoder_fast": __version__,
            "torch": torch.__version__,
            "scvi-tools": version("scvi-tools"),
            "anndata": version("anndata"),
            "python": platform.python_version(),
        },
    }

    model.save(str(folder / "model"), save_anndata=False)
    AnnData(obs=obs, obsm={"X_scVI": latent}).write_h5ad(folder / "latent.h5ad")
    history.to_csv(folder / "training.csv")
    _draw(history, f"SCVI, {settings.likelihood}, {adata.n_obs:,} cells", folder / "training.png")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _n_nonzero(counts: Any) -> int:
    """Count the non-zeros; on disk the stored values."""
    on_disk = getattr(counts, "group", None)
    return int(counts.count_nonzero() if on_disk is None else on_disk["data"].shape[0])


@contextlib.contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """Have torch use some threads of the CPU for a while; None leaves it its choice."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice to programmers and its table of devices off the screen."""
    loggers = [
        logging.getLogger(f"lightning.{part}.utilities.{module}")
        for part, module in (("pytorch", "rank_zero"), ("fabric", "seed"), ("fabric", "rank_zero"))
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            # Of the plan's own, which Lightning calls.
            warnings.filterwarnings("default", message="cuda_graph=True")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _what_ran(model: Any, settings: Settings) -> list[dict[str, Any]]:
    """Say which implementation each step takes, and why not a faster one."""
    if not settings.fused:
        return [{"step": "decoder", "backend": "scvi-tools", "reasons": {"fused": "--no-fused"}}]
    encoder = choose("csr_linear", device=model.device)
    n_input = settings.n_latent + len(settings.keys.continuous)
    z = torch.zeros(settings.batch_size, n_input, device=model.device)
    return [
        {"step": "encoder, first layer", **asdict(encoder)},
        *(
            {"step": step, **asdict(choice)}
            for step, choice in model.module.decoder.explain(z, likelihood=settings.likelihood)
        ),
    ]


def _device_name(device: torch.device, threads: int | None) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    n = threads or torch.get_num_threads()
    return f"{device} ({n} thread{'' if n == 1 else 's'})" if device.type == "cpu" else str(device)


def _history(history: dict[str, DataFrame]) -> DataFrame:
    """Join the curves that are logged once an epoch; the index is the epoch, from 1."""
    import pandas as pd

    curves = ("elbo", "reconstruction_loss", "kl_local")
    names = [f"{curve}_{part}" for curve in curves for part in ("train", "validation")]
    frame = pd.concat([history[name][name].astype(float) for name in names], axis=1)
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="epoch")
    return frame


def _draw(history: DataFrame, title: str, path: Path) -> None:
    """Draw ELBO and reconstruction loss by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    marker = "o" if len(history) <= 30 else None
    for axes, curve, label in zip(
        panels,
        ("elbo", "reconstruction_loss"),
        ("negative ELBO per cell (nats)", "reconstruction loss per cell (nats)"),
        strict=True,
    ):
        for part, style in (("train", "-"), ("validation", "--")):
            values = history[f"{curve}_{part}"]
            axes.plot(history.index, values, style, marker=marker, markersize=3, label=part)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
