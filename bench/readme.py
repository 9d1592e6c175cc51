"""Copy the tables of ``bench/results/*/`` into the README, plots beside them.

``decoder-fast bench --out bench/results/NAME`` writes such a folder, one a device;
``python -m bench.readme`` copies, and ``--check`` says whether anything is to be copied.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .suite_report import PLOTS, TABLE

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: python -m bench.readme -->\n", "<!-- end of the benchmarks -->\n"


def section(folder: Path) -> str:
    """What the README shows of one folder of results."""
    text = (folder / TABLE).read_text()
    title, *lines = text.splitlines()
    if found := re.search(r"cpu_capability (\w+)", text):
        title = f"{found[1]}: {title}"
    where = folder.relative_to(ROOT).as_posix()
    table = "\n".join(line for line in lines if line.startswith("|"))
    plots = "\n".join(
        f"![{kind}, {title}]({where}/{name})"
        for kind, name in PLOTS.items()
        if (folder / name).exists()
    )
    return (
        f"**{title}** ([details]({where}/{TABLE}))\n\n{plots}\n\n"
        f"<details><summary>The table</summary>\n\n{table}\n\n</details>\n"
    )


def updated(readme: str) -> str:
    """The README with the results that are there."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    folders = sorted(path.parent for path in (ROOT / "bench" / "results").glob(f"*/{TABLE}"))
    shown = "\n".join(map(section, folders)) or "Not yet measured.\n"
    return f"{before}{BEGIN}\n{shown}\n{END}{after}"


def main() -> None:
    """Update the README, or check that it is up to date."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = updated(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: python -m bench.readme" if new != old else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
