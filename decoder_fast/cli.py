"""The command ``decoder-fast``: train a model, measure what it gains, say what can run here."""

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
from .bench.shapes import SHAPES
from .datasets import (
    DATA_VARIABLE,
    InputError,
    ObsKeys,
    check_counts,
    demo_counts,
    read_counts,
)
from .nn import DISPERSIONS
from .reference.log_prob import LIKELIHOODS
from .training import SUMMARY, Settings, check_settings, cpu_threads, output_folder
from .training import train as train_model

__all__ = ["main"]

_DEMO_EPOCHS, _DEMO_OUT = 20, "demo-output"
_BENCH_PARTS, _BENCH_OUT = ("operations", "step", "epoch"), "bench-output"


class _Parser(argparse.ArgumentParser):
    """Reports its errors like all others of this command."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; unknown arguments are reported by the command that was given them."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = f" {arguments.command}"
            raise InputError(
                f"unrecognized arguments: {' '.join(unknown)} (see {self.prog}{command} --help)"
            )
        return arguments


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
        description="Faster scVI decoders: train a model, measure what is gained on this machine, "
        "see what can run on it.",
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
    data.add_argument(
        "--backed",
        action="store_true",
        help="leave the counts on disk: for files larger than memory (X must be CSR)",
    )
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
    options: dict[str, dict[str, Any]] = {
        "--likelihood": {"choices": LIKELIHOODS, "default": "zinb", "help": "of the counts"},
        "--dispersion": {"choices": DISPERSIONS, "default": "gene", "help": "what it differs by"},
        "--n-latent": {"type": _at_least(1), "default": 10, "help": "latent dimensions"},
        "--n-layers": {"type": _at_least(1), "default": 1, "help": "hidden layers"},
        "--n-hidden": {"type": _at_least(1), "default": 128, "help": "units of a hidden layer"},
        "--max-epochs": {"type": _at_least(1), "help": "(default: scvi-tools' choice)"},
        "--batch-size": {"type": _at_least(2), "default": 128, "help": "cells of a mini-batch"},
        "--seed": {"type": _at_least(0), "default": 0, "help": "of all random numbers"},
        "--accelerator": {
            "choices": ("auto", "cpu", "gpu", "mps"),
            "default": "auto",
            "help": "what to train on",
        },
        "--threads": {"type": _at_least(1), "help": "of the CPU (default: torch's choice)"},
    }
    for name, option in options.items():
        if "default" in option:
            option["help"] += f" (default: {option['default']})"
        if "choices" in option:
            option["help"] = f"{', '.join(option['choices'])}: {option['help']}"
            option["metavar"] = "NAME"
        model.add_argument(name, **{"metavar": "N", **option})
    model.add_argument(
        "--early-stopping",
        action="store_true",
        help="stop when the ELBO of the validation cells no longer improves",
    )
    model.add_argument(
        "--no-fused", action="store_true", help="train with scvi-tools' own decoder, to compare"
    )
    model.add_argument(
        "--cuda-graph",
        action="store_true",
        help="record a training step on the GPU and replay it: for small mini-batches",
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

    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure stock scvi-tools, stock under torch.compile and ours on this machine",
        description="Measure scvi-tools as it is, under torch.compile, and with the fused decoder: "
        "the operations, a training step and an epoch, with mini-batches of real models that are "
        "scaled to this machine. Results are checked first, and what is wrong is not timed. Takes "
        "some minutes. DIR gets a table, a CSV file and plots. The exit status is 1 if anything of "
        "ours was wrong or failed.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "--quick", action="store_true", help="a first look: few shapes, small, and few turns"
    )
    bench.add_argument(
        "--shapes",
        nargs="+",
        choices=(*SHAPES, "all"),
        metavar="NAME",
        help=f"of {', '.join(SHAPES)}, or all (default: four of them; two with --quick)",
    )
    bench.add_argument(
        "--parts",
        nargs="+",
        choices=_BENCH_PARTS,
        default=_BENCH_PARTS,
        metavar="PART",
        help=f"of {', '.join(_BENCH_PARTS)} (default: all)",
    )
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    bench.add_argument(
        "--threads", type=_at_least(1), metavar="N", help="of the CPU (default: torch's choice)"
    )
    bench.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out stock under torch.compile, which takes most of the time",
    )
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder to write (default: {_BENCH_OUT})"
    )
    bench.add_argument(
        "--overwrite", action="store_true", help="replace DIR, if it is an earlier output"
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
        packages = " ".join("scvi-tools" if name == "scvi" else name for name in missing)
        raise InputError(
            f"this command needs {', '.join(missing)}, which is not installed: "
            f"pip install {packages}"
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
        threads=arguments.threads,
        early_stopping=arguments.early_stopping,
        fused=not arguments.no_fused,
        cuda_graph=arguments.cuda_graph,
    )


def _train(arguments: argparse.Namespace) -> int:
    demo, out, path = arguments.demo, arguments.out, arguments.counts
    if demo and path is not None:
        raise InputError(f"--demo finds its own counts: leave out {path}, or --demo")
    if not demo and path is None:
        raise InputError("no counts: give an h5ad file first (train counts.h5ad ...), or --demo")
    if arguments.backed and (demo or arguments.layer):
        raise InputError("--backed is for the X of a file of your own: not with --demo or --layer")
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
                backed=arguments.backed,
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
        if settings.keys.labels is not None and settings.dispersion != "gene-label":
            _note("note: SCVI takes labels for --dispersion gene-label alone")
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
    batches, epochs = summary["batches"], summary["epochs"]
    lines = {
        "data": f"{summary['cells']:,} cells x {summary['genes']:,} genes, "
        f"{summary['density']:.1%} non-zero, {batches:,} batch{'' if batches == 1 else 'es'}",
        "training": f"{epochs} epoch{'' if epochs == 1 else 's'} in {summary['seconds']:.1f} s: "
        f"{summary['cells_per_second']:,.0f} cells per second",
        "device": summary["device"],
        "ran": ", ".join(
            f"{step.get('operation', step['step'])}: {step['backend']}" for step in summary["ran"]
        )
        + (f" ({SUMMARY} says why nothing faster)" if summary["settings"]["fused"] else ""),
        "-ELBO": f"{final['elbo_train']:,.2f} train, {final['elbo_validation']:,.2f} validation "
        "(nats per cell)",
        "written": f"{out}/: model/, latent.h5ad, training.png, training.csv, {SUMMARY}",
        "next": f"scvi.model.SCVI.load('{out / 'model'}', adata), with or without decoder_fast",
    }
    _say("\n" + "\n".join(f"{name:<10}  {text}" for name, text in lines.items()))


def _bench(arguments: argparse.Namespace) -> int:
    wanted, device = arguments.shapes, arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; decoder-fast doctor says more")
    _require("tqdm")
    from .bench import suite
    from .bench.suite_report import CSV

    if wanted is None:
        wanted = suite.QUICK_SHAPES if arguments.quick else suite.DEFAULT_SHAPES
    elif "all" in wanted:
        wanted = SHAPES
    options = suite.Options(
        shapes=tuple(dict.fromkeys(wanted)),
        parts=tuple(arguments.parts),
        device=torch.device(device),
        quick=arguments.quick,
        compiled=not arguments.no_compile,
    )
    out = arguments.out or Path(_BENCH_OUT)
    overwrite = arguments.overwrite or arguments.out is None
    with (
        cpu_threads(arguments.threads),
        output_folder(out, overwrite=overwrite, marker=CSV) as folder,
    ):
        right = suite.run(options, folder, _say)
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
    _say(f"\nwritten: {out}/: {written}")
    return 0 if right else 1


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
    if missing := [name for name in extras if packages[name] == "not installed"]:
        _say(f"  training needs these: pip install {' '.join(missing)}")

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
        The exit status: 0, 1 if a benchmark found something wrong, 2 if what the user gave cannot
        be used, 130 after Ctrl-C.
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
