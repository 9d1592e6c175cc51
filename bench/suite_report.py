"""What ``decoder-fast bench`` shows and writes: table, CSV and plots."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shapes import Shape

if TYPE_CHECKING:
    from .suite import Row

CSV, TABLE = "benchmark.csv", "benchmark.md"
PLOTS = {"times faster": "speed-up.png", "peak memory": "memory.png"}
ALTERNATIVES = ("stock eager", "stock compiled", "ours")
#: Of the CSV; the times are how many times faster ours is than the alternative of the row.
CSV_COLUMNS = (
    *("what", "shape", "scaled", "cells", "samples", "genes", "batches", "likelihood"),
    *("alternative", "seconds", "times_faster", "peak_bytes", "value_error", "gradient_error"),
    "status",
)
#: Of the environment, what a row of the CSV repeats.
ABOUT = ("date", "device", "decoder-fast", "torch", "scvi-tools", "commit")
COLORS = {"stock eager": "#7f7f7f", "stock compiled": "#d9a441", "ours": "#1f77b4"}


def milliseconds(row: Row, name: str) -> str:
    """Time of one alternative; a word where there is none."""
    if name in row.seconds:
        found = row.seconds[name] * 1e3
        return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"
    if name == "ours" and row.wrong:
        return "wrong"
    return "failed" if name in row.missing else "-"


def _times(row: Row, than: str) -> str:
    found = row.times_faster(than)
    return "-" if found is None else f"{found:.2f}"


def _megabytes(row: Row, name: str) -> str:
    return f"{row.peak_bytes[name] / 1e6:,.1f}" if name in row.peak_bytes else "-"


#: Columns of the table: heading, width, content.
COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("what", 22, lambda row: row.what),
    ("shape", 12, lambda row: row.shape.name),
    ("stock, ms", 10, lambda row: milliseconds(row, "stock eager")),
    ("compiled, ms", 12, lambda row: milliseconds(row, "stock compiled")),
    ("ours, ms", 10, lambda row: milliseconds(row, "ours")),
    ("x stock", 8, lambda row: _times(row, "stock eager")),
    ("x compiled", 10, lambda row: _times(row, "stock compiled")),
    ("stock, MB", 10, lambda row: _megabytes(row, "stock eager")),
    ("compiled, MB", 12, lambda row: _megabytes(row, "stock compiled")),
    ("ours, MB", 10, lambda row: _megabytes(row, "ours")),
)
LEGEND = (
    "Medians of interleaved runs. x stock, x compiled: how many times faster ours is than "
    "scvi-tools, eager and under torch.compile (below 1: slower). MB: peak memory beyond what was "
    "held before."
)


def _aligned(cells: list[str]) -> str:
    parts = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, (_, width, _)) in enumerate(zip(cells, COLUMNS, strict=True))
    ]
    return " ".join(parts).rstrip()


def _of_shape(shape: Shape, how: str) -> str:
    def of(number: int, what: str) -> str:
        return f"{number:,} {what}{'' if number == 1 else 'es' if what == 'batch' else 's'}"

    cells = f"{shape.cells:,} cells"
    if shape.samples > 1:
        cells = f"{shape.samples} samples of {cells}"
    return (
        f"{cells} x {shape.genes:,} genes, {of(shape.batches, 'batch')}, "
        f"{of(shape.layers, 'layer')} of {shape.hidden}, {shape.likelihood}"
        f"{'' if shape.training else ', evaluation: forward alone'}; {how}"
    )


class Report:
    """The results, as they come."""

    def __init__(
        self,
        about: dict[str, str | int | float],
        scaled: dict[str, tuple[Shape, str]],
        left_out: list[str],
    ) -> None:
        self.about, self.scaled, self.left_out = about, scaled, left_out
        self.rows: list[Row] = []

    @property
    def title(self) -> str:
        """Device and versions."""
        versions = ", ".join(f"{name} {self.about[name]}" for name in ("torch", "scvi-tools"))
        return f"{self.about['device']}; {versions}; {self.about['date']}"

    def preamble(self) -> str:
        """What will be measured, and how each shape was scaled to the machine."""
        lines = [self.title, "", "Shapes (mini-batches of real models):"]
        lines += [
            f"  {name:<12} {_of_shape(shape, how)}" for name, (shape, how) in self.scaled.items()
        ]
        if self.left_out:
            lines += ["", "Left out:", *(f"  {why}" for why in self.left_out)]
        return "\n".join(lines) + "\n"

    def header(self) -> str:
        """Headings of the table on the screen."""
        return _aligned([name for name, _, _ in COLUMNS])

    def line(self, row: Row) -> str:
        """One line of the table on the screen."""
        return _aligned([content(row) for _, _, content in COLUMNS])

    def problems(self) -> list[str]:
        """What is wrong, failed, or slower than stock."""
        lines = []
        for row in self.rows:
            where = f"{row.what}, {row.shape.name}"
            if row.wrong:
                of = {k: v for k, v in row.errors.items() if k != "stock compiled"}
                errors = "; ".join(
                    f"{name}: " + ", ".join(f"{kind} {e:.1e}" for kind, e in error.items())
                    for name, error in of.items()
                )
                lines.append(f"WRONG, and not timed: {where}: relative errors of {errors}")
            lines += [
                f"failed: {where}, {', '.join(names)}: {why}"
                for why, names in _by_reason(row.missing).items()
            ]
            lines += [
                f"slower: {where}: ours takes {1 / times:.2f} times as long as {than}"
                for than in ALTERNATIVES[:-1]
                if (times := row.times_faster(than)) is not None and times < 1
            ]
        return lines

    def conclusion(self) -> str:
        """What the table does not say."""
        lines = ["", LEGEND, "", "Where ours is slower, wrong or failed:"]
        lines += [f"  {line}" for line in self.problems() or ["nowhere"]]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Everything, as Markdown."""

        def bullets(lines: list[str]) -> str:
            return "\n".join(f"- {line}" for line in lines)

        table = [[name for name, _, _ in COLUMNS], ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
        table += [[content(row) for _, _, content in COLUMNS] for row in self.rows]
        parts = [
            "\n".join(f"| {' | '.join(line)} |" for line in table),
            LEGEND,
            "Shapes, scaled to the machine:",
            bullets([f"`{n}`: {_of_shape(*scaled)}" for n, scaled in self.scaled.items()]),
            "Where ours is slower, wrong or failed:",
            bullets(self.problems() or ["nowhere"]),
        ]
        if self.left_out:
            parts += ["Left out:", bullets(self.left_out)]
        parts.append(", ".join(f"{name} {value}" for name, value in self.about.items()))
        return "\n\n".join([self.title, *parts]) + "\n"

    def write(self, out: Path, say: Callable[[str], Any]) -> None:
        """Write table, CSV, and plots if matplotlib is there."""
        (out / TABLE).write_text(self.markdown())
        with (out / CSV).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*CSV_COLUMNS, *ABOUT])
            for row in self.rows:
                writer.writerows(self._csv_line(row, name) for name in ALTERNATIVES)
        if importlib.util.find_spec("matplotlib") is None:
            say("no plots: matplotlib is not installed (pip install matplotlib)")
            return
        for kind, file_name in PLOTS.items():
            self._draw(kind, out / file_name)

    def _csv_line(self, row: Row, name: str) -> list[Any]:
        shape, error = row.shape, row.errors.get(name, {})
        status = "ok" if name in row.seconds else row.missing.get(name, "not run")
        if name == "ours" and row.wrong:
            status = "wrong"
        numbers = [row.seconds.get(name), row.times_faster(name), row.peak_bytes.get(name)]
        numbers += [error.get(kind) for kind in ("value", "gradient")]
        return [
            *(row.what, shape.name, self.scaled[shape.name][1], shape.cells, shape.samples),
            *(shape.genes, shape.batches, shape.likelihood, name),
            *("" if number is None else number for number in numbers),
            *(status, *(self.about[key] for key in ABOUT)),
        ]

    def _draw(self, kind: str, path: Path) -> None:
        """Draw bars by shape, a panel for each thing that was measured."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        if kind == "times faster":
            names, label = ALTERNATIVES[:-1], "times faster than"

            def height(row: Row, name: str) -> float | None:
                return row.times_faster(name)
        else:
            names, label = ALTERNATIVES, "MB of"

            def height(row: Row, name: str) -> float | None:
                return row.peak_bytes[name] / 1e6 if name in row.peak_bytes else None

        names = tuple(n for n in names if any(height(row, n) for row in self.rows)) or names
        panels: dict[str, list[Row]] = {}
        for row in self.rows:
            panels.setdefault(row.what, []).append(row)
        figure = Figure(figsize=(9, 1.2 + 2.2 * len(panels)), layout="constrained")
        for axes, (what, rows) in zip(
            # one scale for all, so that bars of one height mean one thing
            figure.subplots(len(panels), squeeze=False, sharey=True)[:, 0],
            panels.items(),
            strict=True,
        ):
            width, base = 0.8 / len(names), 1 if kind == "times faster" else 0
            axes.set_yscale("log")
            for k, name in enumerate(names):
                bars = [(i, h) for i, row in enumerate(rows) if (h := height(row, name))]
                drawn = axes.bar(
                    [i + width * (k - (len(names) - 1) / 2) for i, _ in bars],
                    [h - base for _, h in bars],
                    0.95 * width,
                    base,
                    label=f"{label} {name}",
                    color=COLORS[name],
                )
                axes.bar_label(drawn, [f"{h:.3g}" for _, h in bars], padding=1, fontsize=7)
            if kind == "times faster":
                axes.axhline(1, color="black", linewidth=0.8)
                for i in (i for i, row in enumerate(rows) if row.failed):
                    word = "wrong" if rows[i].wrong else "failed"
                    axes.annotate(word, (i, 1), (0, 4), textcoords="offset points", ha="center")
            axes.margins(y=0.2)
            axes.set_xlim(-0.5, len(rows) - 0.5)
            axes.set_xticks(range(len(rows)), [row.shape.name for row in rows])
            axes.set_title(what, fontsize=10, loc="left")
            subs = (1, 2, 5) if kind == "times faster" else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(names), frameon=False)
        figure.suptitle(self.title, fontsize=9)
        figure.savefig(path, dpi=110)


def _by_reason(missing: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(name)
    return found
