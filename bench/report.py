"""Results as Markdown and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], object]]

STOCK = ("stock eager", "stock compiled")
OURS = ("ours", "ours, CSR", "ours, dense")
COUNT_NLL = (*STOCK, "head products", "ours, CSR", "ours, dense")
BF16 = ("ours, CSR, bf16", "ours, dense, bf16")
KEYS: Columns = {"shape": lambda row: row["shape"], "threads": lambda row: row["threads"]}


def _table(rows: list[Row], columns: Columns) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(column(row)) for column in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(*names: str) -> Columns:
    """Milliseconds; nothing for what was not timed."""

    def column(name: str) -> Callable[[Row], str]:
        return lambda row: (
            "wrong"
            if name in row.get("wrong", ())
            else f"{row[name] * 1e3:.1f}"
            if name in row
            else ""
        )

    return {f"{name}, ms": column(name) for name in names}


def _ratios(name: str, *others: str) -> Columns:
    """How many times as long each of the others takes."""

    def column(other: str) -> Callable[[Row], str]:
        return lambda row: f"{row[other] / row[name]:.2f}" if other in row and name in row else ""

    return {f"{other.removeprefix('stock ')} / {name}": column(other) for other in others}


def general(rows: list[Row]) -> str:
    """Milliseconds, ours relative to each stock, and the peak of the extra memory."""
    what: Columns = {"what": lambda row: row["what"]}
    columns = what | KEYS | _times(*STOCK, "ours") | _ratios("ours", *STOCK)
    return _table(rows, columns | {"extra memory, eager / ours, MB": _extra_memory})


def _extra_memory(row: Row) -> str:
    peaks = row.get("peak extra bytes", {})
    found = [peaks.get(name) for name in ("stock eager", "ours")]
    return "" if None in found else " / ".join(f"{peak / 1e6:.0f}" for peak in found)


def losses(rows: list[Row]) -> str:
    """Where ours is slower than either stock, or wrong."""
    lines = []
    for row in rows:
        where = f"- {row['what']}, {row['shape']}, {row['threads']} thread(s): "
        lines += [
            f"{where}{name} takes {row[name] / row[other]:.2f} times as long as {other}"
            for name in OURS
            for other in STOCK
            if name in row and other in row and row[name] > row[other]
        ]
        lines += [
            f"{where}{name} is wrong and was not timed; relative errors: "
            + ", ".join(f"{error:.1e} ({of})" for of, error in row["errors"][name].items())
            for name in row.get("wrong", ())
        ]
    return "\n".join(["Where ours loses:", "", *(lines or ["- nowhere"])])


def _share(products: str) -> Callable[[Row], str]:
    """Share of the floor that CSR reaches, with one rate of the products."""

    def column(row: Row) -> str:
        parts = row["floor"]
        floor = parts[products] + parts["vector math"] + parts["memory"]
        return f"{floor / row['ours, CSR']:.0%}" if "ours, CSR" in row else ""

    return column


def _floor(rows: list[Row]) -> str:
    parts: Columns = {
        f"{part}, ms": lambda row, part=part: f"{row['floor'][part] * 1e3:.2f}"
        for part in rows[0]["floor"]
    }
    shares: Columns = {
        "share of the floor, CSR": _share("products"),
        "with torch.mm's rate": _share("products at torch.mm's rate"),
    }
    return _table(rows, KEYS | parts | shares)


def _rates(rows: list[Row]) -> str:
    lines = []
    for threads, rates in {row["threads"]: row["rates"] for row in rows}.items():
        flops = rates["flops_a_second"].items()
        lines.append(
            f"- {threads} thread(s): float32 products "
            + ", ".join(f"{rate / 1e9:.0f} GFLOP/s ({name})" for name, rate in flops)
            + f"; exp {rates['exp_seconds'] * 1e9:.2f} ns and log "
            f"{rates['log_seconds'] * 1e9:.2f} ns an element; "
            f"copy {rates['bytes_a_second'] / 1e9:.1f} GB/s"
        )
    return "\n".join(lines)


def _memory(rows: list[Row]) -> str:
    def size(row: Row, name: str) -> float | None:
        return row["peak extra bytes"].get(name)

    def megabytes(name: str) -> Callable[[Row], str]:
        return lambda row: "" if size(row, name) is None else f"{size(row, name) / 1e6:.1f}"

    def share(name: str, *, gradients: bool) -> Callable[[Row], str]:
        def column(row: Row) -> str:
            ours, eager = size(row, name), size(row, "stock eager")
            if ours is None or eager is None:
                return ""
            return f"{(ours - (0 if gradients else row['gradient bytes'])) / eager:.1%}"

        return column

    columns: Columns = {f"{name}, MB": megabytes(name) for name in (*STOCK, *OURS[1:])}
    columns["gradients alone, MB"] = lambda row: f"{row['gradient bytes'] / 1e6:.1f}"
    for name in OURS[1:]:
        columns[f"{name} / eager"] = share(name, gradients=True)
        columns[f"{name} without gradients / eager"] = share(name, gradients=False)
    return _table(rows, KEYS | columns)


def _threads(rows: list[Row]) -> str:
    """How many times as fast as with one thread."""
    one = {row["shape"]: row for row in rows if row["threads"] == 1}

    def column(name: str) -> Callable[[Row], str]:
        def speedup(row: Row) -> str:
            alone = one[row["shape"]]
            return f"{alone[name] / row[name]:.2f}" if name in row and name in alone else ""

        return speedup

    several = [row for row in rows if row["threads"] != 1 and row["shape"] in one]
    return _table(several, KEYS | {name: column(name) for name in COUNT_NLL})


def _bf16(rows: list[Row]) -> str:
    def error(of: str) -> Callable[[Row], str]:
        return lambda row: f"{max(row['errors'][name][of] for name in BF16):.1e}"

    stock = "stock eager, bf16"
    columns = _times(stock, *BF16)
    for name in BF16:
        columns |= _ratios(name, *STOCK, stock)
    columns |= {f"error of a {of}": error(of) for of in ("value", "gradient")}
    return _table(rows, KEYS | columns)


def _allocator(rows: list[Row]) -> str:
    both = []
    for row in rows:
        keys = {key: row[key] for key in KEYS}
        both += [row | {"allocator": "default"}]
        both += [row["thresholds raised"] | keys | {"allocator": "thresholds raised"}]
    columns: Columns = {"allocator": lambda row: row["allocator"]}
    columns |= _times(*COUNT_NLL)
    for name in OURS[1:]:
        columns |= _ratios(name, *STOCK)
    return _table(both, KEYS | columns)


def count_nll(rows: list[Row]) -> str:
    """Everything that is measured of the count likelihood."""
    found = [
        error
        for row in rows
        for name, error in row["errors"].items()
        if name.startswith("ours") and not name.endswith("bf16")
    ]
    columns = KEYS | _times(*COUNT_NLL)
    for name in OURS[1:]:
        columns |= _ratios(name, *STOCK, "head products")
    parts = [
        f"`count_nll`, backend {', '.join(sorted({row['backend'] for row in rows}))}: heads and "
        "likelihood, forward and backward, float32, 5 % non-zeros, 128 hidden units, dispersion by "
        "gene, softmax. Largest errors against float64: "
        f"{max(error['value'] for error in found):.1e} of the losses, "
        f"{max(error['gradient'] for error in found):.1e} of a gradient (norm of the "
        "error by norm of the truth).",
        _table(rows, columns),
        "Share of a floor: a model (`bench/floor.py` says of what), and the rates that it takes, "
        "as measured here:",
        _rates(rows),
        _floor(rows),
        "Peak extra memory: how far a fresh process rises above what it held just before, "
        "gradients included (the allocator's history moves small ones by some MB):",
        _memory(rows),
    ]
    if len({row["threads"] for row in rows}) > 1:
        parts += ["How many times as fast as with one thread:", _threads(rows)]
    if any(name in row["errors"] for row in rows for name in BF16):
        parts += [
            'bf16 products, by `torch.set_float32_matmul_precision("medium")`, against stock in '
            "float32 and under the same setting:",
            _bf16(rows),
        ]
    if large := [row for row in rows if "thresholds raised" in row]:
        parts += [
            "glibc's allocator hands tensors above 32 MiB back to the system at every operation; "
            "with `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` at 4 GiB it keeps them:",
            _allocator(large),
        ]
    return "\n\n".join(parts)


# On a GPU
# --------

GPU_ALTERNATIVES = (
    *("stock eager, fp32", "stock eager, tf32", "stock compiled, tf32"),
    *("ours, fp32", "ours, tf32", "ours, bf16", "ours, CSR, tf32", "ours, CUDA graph, fp32"),
    "ours, CSR, other route, tf32",
)


def _of(row: Row, alternative: str, what: str = "both") -> float | None:
    """What was measured of an alternative; the forward pass where there is no other."""
    times = row["times"].get(alternative, {})
    found = times.get(what)
    if found is None and what.startswith("both") and "both" not in times:
        found = times.get(what.replace("both", "forward"))
    return found if isinstance(found, (int, float)) else None


def _ms(alternative: str, what: str = "both") -> Callable[[Row], str]:
    def column(row: Row) -> str:
        if alternative in row["wrong"]:
            return "wrong"
        found = _of(row, alternative, what)
        return "" if found is None else f"{found * 1e3:.3g}"

    return column


def _ratio(other: str, ours: str, what: str = "both") -> Callable[[Row], str]:
    def column(row: Row) -> str:
        a, b = _of(row, other, what), _of(row, ours, what)
        return f"{a / b:.2f}" if a and b else ""

    return column


def _gpu_share(peaks: dict[str, float]) -> Columns:
    """Shares of what the device was measured to reach, of ours in tf32."""
    ours = "ours, tf32"

    def time(row: Row) -> float | None:
        return _of(row, ours, "both, graph") or _of(row, ours)

    def share(name: str, peak: str) -> Callable[[Row], str]:
        return lambda row: f"{row[name] / t / peaks[peak]:.0%}" if (t := time(row)) else ""

    def floor(row: Row) -> str:
        least = max(row["needed bytes"] / peaks["copy"], row["needed flops"] / peaks["tf32"])
        return f"{t / least:.2f}" if (t := time(row)) else ""

    return {
        "needed bytes, share of copy": share("needed bytes", "copy"),
        "needed products, share of torch.mm": share("needed flops", "tf32"),
        "time / floor": floor,
    }


def _gpu_memory(rows: list[Row]) -> str:
    def megabytes(name: str) -> Callable[[Row], str]:
        def column(row: Row) -> str:
            found = _of(row, name, "peak bytes")
            return "" if found is None else f"{found / 1e6:.1f}"

        return column

    def share(row: Row) -> str:
        ours, eager = (_of(row, f"{name}, tf32", "peak bytes") for name in ("ours", "stock eager"))
        extra = row["gradient bytes"]
        return f"{(ours - extra) / eager:.1%}" if ours and eager else ""

    names = [f"{name}, tf32" for name in ("stock eager", "stock compiled", "ours", "ours, CSR")]
    columns: Columns = {f"{name}, MB": megabytes(name) for name in names}
    columns["ours without gradients / eager"] = share
    return _table(rows, {"shape": lambda row: row["shape"]} | columns)


def _gpu_part(rows: list[Row], peaks: dict[str, float]) -> str:
    shape: Columns = {"shape": lambda row: row["shape"]}
    used = [name for name in GPU_ALTERNATIVES if any(name in row["times"] for row in rows)]
    whole = shape | {f"{name}, ms": _ms(name) for name in used}
    for other in ("stock eager, tf32", "stock compiled, tf32"):
        whole[f"{other.split(',')[0]} / ours, tf32"] = _ratio(other, "ours, tf32")
        if "ours, CSR, tf32" in used:
            whole[f"{other.split(',')[0]} / ours, CSR, tf32"] = _ratio(other, "ours, CSR, tf32")
    whole["stock eager / ours, fp32"] = _ratio("stock eager, fp32", "ours, fp32")
    tf32 = [name for name in used if name.endswith("tf32")]
    passes = shape | {
        f"{what}, {name}, ms": _ms(name, what) for what in ("forward", "backward") for name in tf32
    }
    parts = [
        "Forward + backward (forward alone in evaluation):",
        _table(rows, whole),
        "The passes by themselves, in tf32; the backward pass is the difference:",
        _table(rows, passes),
    ]
    graphs = shape | {f"{name}, ms": _ms(name, "both, graph") for name in used}
    if short := [row for row in rows if _of(row, "ours, tf32", "both, graph")]:
        parts += ["As a CUDA graph, what takes less than five milliseconds:", _table(short, graphs)]
    if "needed bytes" in rows[0]:
        parts += [
            "Ours in tf32, as a graph where there is one, against what the device reaches "
            "(`bench/costs.py` says what is needed):",
            _table(rows, shape | _gpu_share(peaks)),
            "Peak extra memory of forward + backward, gradients included:",
            _gpu_memory(rows),
        ]
    return "\n\n".join(parts)


def _gpu_errors(rows: list[Row]) -> str:
    lines: list[Row] = [
        {"part": row["part"], "shape": row["shape"], "alternative": name, **error}
        for row in rows
        for name, error in row.get("errors", {}).items()
    ]
    if not lines:
        return "nothing was checked"
    worst: dict[tuple[str, str], Row] = {}
    for line in lines:
        kept = worst.setdefault((line["part"], line["alternative"]), dict(line))
        for kind in ("value", "gradient"):
            if kind in line:
                kept[kind] = max(kept[kind], line[kind], key=lambda e: (e != e, e))
    columns: Columns = {name: (lambda row, n=name: row[n]) for name in ("part", "alternative")}
    for kind in ("value", "gradient"):
        columns[f"largest error of a {kind}"] = lambda row, kind=kind: (
            f"{row[kind]:.1e}" if kind in row else "not compared"
        )
    return _table(list(worst.values()), columns)


def gpu(result: dict[str, Any]) -> str:
    """Everything that was measured on a GPU."""
    about, peaks, rows = result["environment"], result["peaks"], result["rows"]
    parts = [
        f"# {about['device']}, {about['date']}",
        ", ".join(f"{key} {value}" for key, value in about.items()),
        f"Stock: {result['stock']}. Ours: "
        + ", ".join(f"{name} by {backend}" for name, backend in result["backends"].items())
        + f". Measured peaks: copy {peaks['copy'] / 1e12:.3g} TB/s; products "
        + ", ".join(f"{peaks[p] / 1e12:.3g} TFLOP/s {p}" for p in ("fp32", "tf32", "bf16"))
        + ".",
        "Tests on the device:\n\n"
        + ("\n".join(f"- {k}: {v}" for k, v in result["tests"].items()) or "- none"),
    ]
    by_part: dict[str, list[Row]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    for part, those in by_part.items():
        parts += [f"## {part}", _gpu_part(those, peaks)]
    parts += [
        "## Errors\n\nAgainst float64, norm by norm; the largest of all shapes:",
        _gpu_errors(rows),
        "## Where ours loses",
        _gpu_losses(rows),
        "## Not measured",
        "\n".join(f"- {s['what']}: {s['why']}" for s in result["skipped"]) or "- nothing",
    ]
    return "\n\n".join(parts) + "\n"


def _gpu_losses(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        where = f"- {row['part']}, {row['shape']}: "
        for name, times in row["times"].items():
            if "failed" in times:
                lines.append(f"{where}{name} failed: {times['failed']}")
            precision = name.rsplit(", ", 1)[-1]
            ours = _of(row, name)
            for other in (f"{stock}, {precision}" for stock in STOCK):
                theirs = _of(row, other)
                if name.startswith("ours") and ours and theirs and ours > theirs:
                    ratio = f"{ours / theirs:.2f} times as long as {other}"
                    lines.append(f"{where}{name} takes {ratio}")
        lines += [f"{where}{name} is wrong: {row['errors'][name]}" for name in row["wrong"]]
    return "\n".join(lines or ["- nowhere"])


def gpu_plots(result: dict[str, Any], file: Path) -> list[Path]:
    """Draw times and memory by shape, if matplotlib is there; returns the PNG files."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed here")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{name}, tf32" for name in (*STOCK, "ours")]
    parts: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if "needed bytes" in row:
            parts.setdefault(row["part"], []).append(row)
    written = []
    for what, unit, scale in (("both", "ms", 1e3), ("peak bytes", "MB", 1e-6)):
        if not parts:
            break
        figure, axes = pyplot.subplots(len(parts), squeeze=False, figsize=(9, 3.2 * len(parts)))
        for axis, (part, rows) in zip(axes[:, 0], parts.items(), strict=True):
            for k, name in enumerate(names):
                heights = [(_of(row, name, what) or 0.0) * scale for row in rows]
                axis.bar([i + 0.27 * (k - 1) for i in range(len(rows))], heights, 0.25, label=name)
            axis.set_xticks(range(len(rows)), [row["shape"] for row in rows])
            if any(patch.get_height() for patch in axis.patches):
                axis.set_yscale("log")
            axis.set_ylabel(unit)
            axis.set_title(part)
        axes[0, 0].legend()
        title = "forward + backward" if what == "both" else "peak extra memory"
        figure.suptitle(f"{result['environment']['device']}: {title}")
        figure.tight_layout()
        out = file.with_name(f"{file.stem}-{'times' if what == 'both' else 'memory'}.png")
        figure.savefig(out, dpi=110)
        pyplot.close(figure)
        written.append(out)
    return written
