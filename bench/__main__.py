"""Run every benchmark and write ``bench/results/<processor>-<date>.json`` and ``.md``."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from tqdm import tqdm

from . import count_nll, covariate_linear, training
from .timing import environment

PARTS = {"covariate_linear": covariate_linear, "count_nll": count_nll, "training": training}
ORDER = ("stock eager", "stock compiled", "ours", "ours, dense", "ours, CSR")


def table(rows: list[dict[str, object]]) -> str:
    """Write rows as Markdown: milliseconds, and the best of ours relative to each stock."""
    lines = [
        "| what | shape | threads | stock eager, ms | stock compiled, ms | ours, ms "
        "| eager / ours | compiled / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = {name: float(row[name]) for name in ORDER if name in row}  # type: ignore[arg-type]
        best = min((value, name) for name, value in seconds.items() if name.startswith("ours"))
        ours = f"{best[0] * 1e3:.1f}" + (f" ({best[1][6:]})" if "," in best[1] else "")
        eager, compiled = seconds["stock eager"], seconds.get("stock compiled")
        lines.append(
            f"| {row['what']} | {row['shape']} | {row['threads']} | {eager * 1e3:.1f} "
            f"| {'' if compiled is None else f'{compiled * 1e3:.1f}'} | {ours} "
            f"| {eager / best[0]:.2f} | {'' if compiled is None else f'{compiled / best[0]:.2f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        for name in args.parts or PARTS:
            for row in tqdm(PARTS[name].rows(), desc=f"{name}, {threads} thread(s)"):
                rows.append({"benchmark": name, "threads": threads, **row})
    about = environment()
    args.out.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", str(about["processor"]).lower()).strip("-")
    file = args.out / f"{stem}-{about['date']}"
    result = {"environment": about, "unit": "seconds, median", "rows": rows}
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    text = f"{head}\n\nMedians, alternatives interleaved in one process.\n\n{table(rows)}\n"
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {file}.json, {file}.md")


if __name__ == "__main__":
    main()
