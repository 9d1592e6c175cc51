"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable
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
    """Milliseconds, and ours relative to each stock."""
    what: Columns = {"what": lambda row: row["what"]}
    return _table(rows, what | KEYS | _times(*STOCK, "ours") | _ratios("ours", *STOCK))


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
            f"{where}{name} is wrong and was not timed; largest relative errors: "
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
    columns |= {f"error of a {of}": error(of) for of in ("loss", "gradient")}
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
        error for row in rows for name, error in row["errors"].items() if not name.endswith("bf16")
    ]
    columns = KEYS | _times(*COUNT_NLL)
    for name in OURS[1:]:
        columns |= _ratios(name, *STOCK, "head products")
    parts = [
        f"`count_nll`, backend {', '.join(sorted({row['backend'] for row in rows}))}: heads and "
        "likelihood, forward and backward, float32, 5 % non-zeros, 128 hidden units, dispersion by "
        "gene, softmax. Largest errors against float64: "
        f"{max(error['loss'] for error in found):.1e} of a loss, "
        f"{max(error['gradient'] for error in found):.1e} of a gradient (by its largest element).",
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
