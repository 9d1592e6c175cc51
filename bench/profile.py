"""Where the time of ``SCVI.train`` goes, step by step: ``python -m bench.profile``.

One epoch under ``torch.profiler``, stock and fused; operations by their own time, and what is left
of the wall-clock time: Python, Lightning, the data loader.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import environment
from .training import CASES, Case, models


def _rows(run: Callable[[], object], steps: int, top: int) -> list[str]:
    run()
    start = time.perf_counter()
    run()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events: Any = sorted(profiled.key_averages(), key=lambda e: -e.self_cpu_time_total)
    # What Lightning and torch.optim name for the profiler is Python's time.
    events = [e for e in events if "#" not in e.key and "[" not in e.key]
    inside = sum(event.self_cpu_time_total for event in events) / 1e6
    lines = [
        f"{wall / steps * 1e3:.2f} ms a step without the profiler; operations' own time "
        f"{inside / steps * 1e3:.2f} ms a step under it",
        "",
        "| operation | calls a step | ms a step |",
        "|---|---|---|",
    ]
    lines += [
        f"| {event.key} | {event.count / steps:.1f} "
        f"| {event.self_cpu_time_total / steps / 1e3:.3f} |"
        for event in events[:top]
    ]
    return lines


def report(case: Case, top: int) -> str:
    """Profile one case, stock and fused."""
    steps = -(-case[0] // case[3])
    parts = []
    with models(case) as (shape, epochs):
        for name, epoch in epochs.items():
            parts += [f"### {shape}: {name}", "\n".join(_rows(epoch, steps, top))]
    return "\n\n".join(parts)


def main() -> None:
    """Print the profiles of all cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--top", type=int, default=12, help="operations of each profile")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for case in CASES:
        print(f"\n{report(case, args.top)}", flush=True)


if __name__ == "__main__":
    main()
