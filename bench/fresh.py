"""Measurements that need a process of their own."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock


def fresh(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Call a function of a module in a new process, started with these environment variables."""
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *args).result()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grows at most while ``run()`` runs.

    The kernel's own high-water mark (Linux; None elsewhere), so nothing is missed between samples.
    Free memory that the allocator holds is given back before: what is used again counts.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident
        before = _peak()
    except OSError:
        return None
    run()
    return _peak() - before
