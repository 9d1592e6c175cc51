"""Run every benchmark and write ``bench/results/<processor>-<date>.json`` and ``.md``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from . import report
from .timing import REPEATS, environment

PARTS = ("count_nll", "training", "disk", "inference", "atlas")


def markdown(about: dict[str, str | int | float], rows: list[report.Row]) -> str:
    """Everything that was measured."""
    parts = [", ".join(f"{key} {value}" for key, value in about.items())]
    parts.append("Medians, alternatives interleaved in one process.")
    if other := [row for row in rows if row["benchmark"] != "count_nll"]:
        parts.append(report.general(other))
    if counts := [row for row in rows if row["benchmark"] == "count_nll"]:
        parts.append(report.count_nll(counts))
    return "\n\n".join([*parts, report.losses(rows)]) + "\n"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="fewer turns, the smallest shapes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    about = environment()
    modules = {name: import_module(f".{name}", __package__) for name in args.parts or PARTS}
    jobs = [
        (threads, name, case)
        for threads in args.threads
        for name, module in modules.items()
        for case in module.cases(args.quick)
    ]
    rows: list[report.Row] = []
    for threads, name, case in (bar := tqdm(jobs)):
        bar.set_description(f"{name}, {threads} thread(s)")
        torch.set_num_threads(threads)
        row = modules[name].measure(case, 3 if args.quick else REPEATS)
        rows.append({"benchmark": name, "threads": threads, **row})
    args.out.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", str(about["processor"]).lower()).strip("-")
    file = args.out / f"{stem}-{about['date']}"
    result = {"environment": about, "unit": "seconds, median", "rows": rows}
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(about, rows)
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {file}.json, {file}.md")
    if any(row.get("wrong") for row in rows):
        sys.exit("an alternative was wrong and was not timed: see the end of the report")


if __name__ == "__main__":
    main()
