"""Write the measured tables and the plot into ``docs/explanation/performance.md``, between its two markers.

python -m benchmarks.page [--results FILE] [--baseline NAME]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from benchmarks.peers import ALL, ROOT, VAR
from benchmarks.plot import svg
from benchmarks.results import Results, markdown, tables

PAGE = ROOT / "docs" / "explanation" / "performance.md"
PLOT = ROOT / "docs" / "explanation" / "performance.svg"
BEGIN, END = "<!-- figures: make bench, then make bench-page -->", "<!-- end of figures -->"


def main() -> int:
    """Write the page and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=VAR / "results.json", metavar="FILE")
    parser.add_argument("--baseline", default="conductor-rabbitmq", choices=ALL, metavar="NAME")
    options = parser.parse_args()
    results = Results.load(options.results)
    PLOT.write_text(svg(results), encoding="utf-8")
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), figures(results, options.baseline)), encoding="utf-8")
    return 0


def insert(page: str, text: str) -> str:
    """Put ``text`` between the markers, in the place of what is there.

    Raises:
        SystemExit: A marker is missing, or they are not in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"The page has no {BEGIN!r} that is followed by {END!r}. Put both where the figures belong.")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def figures(results: Results, baseline: str) -> str:
    """What was measured, and on what, in Markdown."""
    about = results.about
    machine = about["machine"]
    rounds = max((sample.round for sample in results.samples), default=0)
    parts = [
        f"Measured on {about['date']}: {rounds} {'round' if rounds == 1 else 'rounds'}, scale {about['scale']:g},"
        f" {machine['cores']} cores ({machine['architecture']}), {machine['kernel']}, Python {about['python']},"
        f" PostgreSQL {about['postgresql']} with fsync and synchronous_commit on, two worker processes"
        f" (Celery's pool and concurrency: {about['pool']}). Each cell: median (lowest to highest) ×ratio to {baseline}"
        " within the same round, where above 1 is better.",
        f"![Rates and latencies of all systems]({PLOT.name})",
    ]
    for title, rows in tables(results, baseline).items():
        parts += [f"**{title}**", markdown(rows)]
    if results.growth:
        parts += ["**An empty table and a full one**", growth(results.growth)]
    for name, shares in results.profiles.items():
        rows = [
            ["", "share of a worker's time"],
            *([owner, f"{share:.0%}"] for owner, share in shares if share >= 0.005),
        ]
        parts += [f"**Where the time goes: {name}**", markdown(rows)]
    for name, note in results.notes.items():
        parts.append(f"{name}: {note}")
    parts.append(versions(about["versions"]))
    return "\n\n".join(part if part.startswith(("|", "!")) else wrap(part) for part in parts)


def wrap(text: str) -> str:
    """Prose in lines of the length that the other pages have; a table that follows it stays as it is."""
    prose, table, rows = text.partition("\n\n|")
    return textwrap.fill(prose, 120, break_long_words=False, break_on_hyphens=False) + table + rows


def growth(found: dict) -> str:
    """What ``--growth`` found."""
    heading = ["", "empty", f"{found['finished']:,} finished, {found['waiting']:,} waiting"]
    return markdown([heading, *found["rows"]]) + "\n\n" + markdown(found["statements"])


def versions(found: dict[str, dict[str, str]]) -> str:
    """Which packages were measured."""
    lines = {
        ", ".join(f"{package} {version}" for package, version in packages.items()): name.partition("-")[0]
        for name, packages in found.items()
    }
    return "Versions: " + "; ".join(f"{name}: {packages}" for packages, name in lines.items()) + "."


if __name__ == "__main__":
    sys.exit(main())
