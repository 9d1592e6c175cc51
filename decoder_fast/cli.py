"""The command ``decoder-fast``: train a model, or say what can run here."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import backends, native
from ._version import __version__
from .datasets import (
    DATA_VARIABLE,
    InputError,
    ObsKeys,
    check_counts,
    demo_counts,
    read_counts,
)
from .training import SUMMARY, Settings, check_settings, output_folder
from .training import train as train_model

__all__ = ["main"]

_DEMO_EPOCHS, _DEMO_OUT = 20, "demo-output"


class _Parser(argparse.ArgumentParser):
    """Reports its errors like all others of this command."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="decoder-fast",
        description="Faster scVI decoders: train a model, or see what can run on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"decoder-fast {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train SCVI with the fused decoder on the raw counts of an h5ad file",
        description="Train scvi.model.SCVI with the fused decoder on raw counts. DIR gets the "
        "model (for scvi.model.SCVI.load), latent.h5ad, training.png, training.csv, summary.json.",
    )
    train.set_defaults(run=_train)
    train.add_argument("counts", nargs="?", type=Path, metavar="counts.h5ad", help="the counts")
    train.add_argument("--out", type=Path, metavar="DIR", help="folder to write, all or nothing")
    train.add_argument(
        "--overwrite", action="store_true", help="replace DIR, if it is an earlier output"
    )
    data = train.add_argument_group("the data")
    data.add_argument("--batch-key", metavar="KEY", help="column of obs with the batch")
    data.add_argument("--labels-key", metavar="KEY", help="column of obs with labels")
    data.add_argument("--layer", metavar="NAME", help="layer with the raw counts (default: X)")
    for kind in ("categorical", "continuous"):
        data.add_argument(
            f"--{kind}-covariate",
            metavar="KEY",
            nargs="+",
            action="extend",
            default=[],
            help=f"columns of obs with further {kind} covariates",
        )
    model = train.add_argument_group("the model and its training (defaults as in scvi-tools)")
    model.add_argument("--likelihood", choices=("zinb", "nb", "poisson", "normal"), default="zinb")
    model.add_argument(
        "--dispersion", choices=("gene", "gene-batch", "gene-label", "gene-cell"), default="gene"
    )
    model.add_argument("--n-latent", type=_at_least(1), default=10, metavar="N")
    model.add_argument("--n-layers", type=_at_least(1), default=1, metavar="N")
    model.add_argument("--n-hidden", type=_at_least(1), default=128, metavar="N")
    model.add_argument("--max-epochs", type=_at_least(1), metavar="N")
    model.add_argument("--batch-size", type=_at_least(2), default=128, metavar="N")
    model.add_argument("--seed", type=_at_least(0), default=0, metavar="N")
    model.add_argument("--accelerator", choices=("auto", "cpu", "gpu", "mps"), default="auto")
    model.add_argument(
        "--no-fused", action="store_true", help="train with scvi-tools' own decoder, to compare"
    )
    demo = train.add_argument_group("demonstration")
    demo.add_argument(
        "--demo",
        action="store_true",
        help=f"train {_DEMO_EPOCHS} epochs on real counts: a file of the folder that the "
        f"environment variable {DATA_VARIABLE} names, else scanpy's pbmc3k, else a simulated "
        f"atlas (default DIR: {_DEMO_OUT})",
    )
    demo.add_argument(
        "--demo-dataset",
        metavar="NAME",
        help="a file of that folder, 'pbmc3k' or 'simulated', instead of the first to be had",
    )

    doctor = commands.add_parser(
        "doctor", allow_abbrev=False, help="say what can run here, and what is missing"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _say(message: str) -> None:
    print(message, flush=True)


def _note(message: str) -> None:
    _say(f"          {message}")


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"this command needs {', '.join(missing)}, which is not installed: "
            "pip install 'decoder-fast[scvi]'"
        )


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        keys=ObsKeys(
            batch=arguments.batch_key,
            labels=arguments.labels_key,
            categorical=tuple(arguments.categorical_covariate),
            continuous=tuple(arguments.continuous_covariate),
        ),
        layer=arguments.layer,
        likelihood=arguments.likelihood,
        dispersion=arguments.dispersion,
        n_latent=arguments.n_latent,
        n_layers=arguments.n_layers,
        n_hidden=arguments.n_hidden,
        max_epochs=arguments.max_epochs or (_DEMO_EPOCHS if arguments.demo else None),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        accelerator=arguments.accelerator,
        fused=not arguments.no_fused,
    )


def _train(arguments: argparse.Namespace) -> int:
    demo, out, path = arguments.demo, arguments.out, arguments.counts
    if demo and path is not None:
        raise InputError(f"--demo finds its own counts: leave out {path}, or --demo")
    if not demo and path is None:
        raise InputError("no counts: give an h5ad file first (train counts.h5ad ...), or --demo")
    if arguments.demo_dataset and not demo:
        raise InputError("--demo-dataset needs --demo")
    if out is None:
        if not demo:
            raise InputError("no output folder: add --out DIR")
        out = Path(_DEMO_OUT)
    settings = _settings(arguments)
    check_settings(settings)
    _require("scvi", "anndata", "matplotlib")

    overwrite = arguments.overwrite or (demo and _is_demo_output(out))
    with output_folder(out, overwrite=overwrite) as folder:
        if demo:
            _say("reading   looking for counts to demonstrate on")
            adata, source = demo_counts(arguments.demo_dataset)
            _note(source)
            if settings.keys.batch is None and "batch" in adata.obs:
                settings = replace(settings, keys=replace(settings.keys, batch="batch"))
            settings.keys.check(adata.obs, _note)
        else:
            source = str(path)
            _say(f"reading   {source}")
            adata = read_counts(
                path,
                layer=settings.layer,
                keys=settings.keys,
                likelihood=settings.likelihood,
                say=_note,
            )
        _say(f"checking  {adata.n_obs:,} cells x {adata.n_vars:,} genes")
        adata = check_counts(
            adata,
            layer=settings.layer,
            likelihood=settings.likelihood,
            say=_note,
        )
        if settings.keys.batch is None:
            _note("no batch key: all cells count as one batch")
        _say(f"training  {'fused' if settings.fused else 'stock'} SCVI, {settings.likelihood}")
        summary = train_model(adata, settings, folder, source=source, demo=demo)
    _report(summary, out)
    return 0


def _is_demo_output(out: Path) -> bool:
    """Whether a folder was written by an earlier demonstration, which the next may replace."""
    try:
        return bool(json.loads((out / SUMMARY).read_text())["demo"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _report(summary: dict[str, Any], out: Path) -> None:
    final = summary["final"]
    batches = summary["batches"]
    lines = {
        "data": f"{summary['cells']:,} cells x {summary['genes']:,} genes, "
        f"{summary['density']:.1%} non-zero, {batches:,} batch{'' if batches == 1 else 'es'}",
        "training": f"{summary['epochs']} epochs in {summary['seconds']:.1f} s: "
        f"{summary['cells_per_second']:,.0f} cells per second",
        "device": summary["device"],
        "ran": ", ".join(
            f"{step.get('operation', step['step'])}: {step['backend']}" for step in summary["ran"]
        )
        + f" ({SUMMARY} says why nothing faster)",
        "-ELBO": f"{final['elbo_train']:,.2f} train, {final['elbo_validation']:,.2f} validation "
        "(nats per cell)",
        "written": f"{out}/: model/, latent.h5ad, training.png, training.csv, {SUMMARY}",
        "next": f"scvi.model.SCVI.load('{out / 'model'}', adata), with or without decoder_fast",
    }
    _say("\n" + "\n".join(f"{name:<10}  {text}" for name, text in lines.items()))


def _doctor(arguments: argparse.Namespace) -> int:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    def section(title: str, lines: dict[str, str]) -> None:
        _say(f"\n{title}")
        for name, text in lines.items():
            _say(f"  {name:<16}" + text.replace("\n", "\n" + 18 * " "))

    _say(f"decoder-fast {__version__}")
    extras = ("scvi-tools", "anndata", "scanpy", "matplotlib")
    packages = {name: installed(name) for name in ("torch", "triton", *extras)}
    section("Software", {"Python": platform.python_version(), **packages})
    if any(packages[name] == "not installed" for name in extras):
        _say("  training needs these: pip install 'decoder-fast[scvi]'")

    section(
        "Machine",
        {
            "system": f"{platform.system()} {platform.machine()}",
            "CPU": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "GPU": "\n".join(_gpus()),
        },
    )
    reason = native.reason()
    section("Native library", native.describe() if reason is None else {"missing": reason})
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _say(f"\nOperations on {device}")
        for operation in backends.OPERATIONS:
            choice = str(backends.choose(operation, device=torch.device(device)))
            _say("  " + choice.replace("\n", "\n  "))
    return 0


def _gpus() -> list[str]:
    """Name the GPUs, or say why there is none."""
    if torch.cuda.is_available():
        return [
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    if torch.version.cuda is None and torch.version.hip is None:
        return [f"none: this build of torch ({torch.__version__}) is for CPUs only"]
    return [f"none: torch {torch.__version__} finds no device or driver (try nvidia-smi)"]


@contextlib.contextmanager
def _clean_exit() -> Iterator[None]:
    """Let SIGTERM, which ends jobs on a cluster, unwind the stack so that files are cleaned up."""

    def leave(*_: Any) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        The arguments; None for those of the process.

    Returns
    -------
    int
        The exit status: 0, 2 if what the user gave cannot be used, 130 after Ctrl-C.
    """
    try:
        arguments = _parser().parse_args(argv)
        with _clean_exit():
            return int(arguments.run(arguments))
    except InputError as error:
        print(f"decoder-fast: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stopped:
        # Lightning turns Ctrl-C into an exit with status 1
        if isinstance(stopped, SystemExit) and not isinstance(
            stopped.__context__, KeyboardInterrupt
        ):
            raise
        print("decoder-fast: interrupted, nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
