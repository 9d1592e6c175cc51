"""Paired timing: alternatives take turns in one process, and medians are compared."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import parent_process
from pathlib import Path

import torch
from tqdm import tqdm

from decoder_fast import native

#: Turns that alternatives get at least; quick ones get more.
REPEATS = 7


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:160]}"


def interleaved(
    alternatives: dict[str, Callable[[], object]],
    *,
    repeats: int = REPEATS,
    at_least: float = 2.0,
    at_most: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of each alternative: one warm-up, then turn by turn.

    There are at least ``repeats`` turns, and turns for at least ``at_least`` seconds; but after
    ``at_most`` seconds three turns are enough. In each turn the order is another: what runs after a
    hungry neighbour finds colder caches.
    """
    hidden = parent_process() is not None  # the parent has a bar of its own
    for name, run in (bar := tqdm(alternatives.items(), leave=False, disable=hidden)):
        bar.set_description(f"warm-up: {name}")
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    names, order = list(alternatives), random.Random(0)
    began = time.perf_counter()
    with tqdm(desc="turns", total=repeats, leave=False, disable=hidden, mininterval=1) as bar:
        while len(seconds[names[0]]) < repeats or time.perf_counter() - began < at_least:
            for name in order.sample(names, len(names)):
                start = time.perf_counter()
                alternatives[name]()
                seconds[name].append(time.perf_counter() - start)
            bar.update()
            if len(seconds[names[0]]) >= 3 and time.perf_counter() - began > at_most:
                break
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, str | int | float]:
    """What a result has to be read with: machine, versions, commit."""
    versions = {}
    for package in ("decoder-fast", "torch", "scvi-tools", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    missing = native.reason()
    root = Path(__file__).parent.parent
    commit = ""
    if (root / ".git").exists():  # not some repository that this was installed into
        with contextlib.suppress(OSError):  # there is no git
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=root
            ).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": native.describe()["instruction set"] if missing is None else "none",
        "python": platform.python_version(),
        "commit": commit or "unknown",
        **versions,
    }
