"""The picture of the layers in the contributor's pages, made from the contract that keeps them.

``python -m tests.docs.house`` writes it.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/contributing/architecture.md"
BEGIN, END = "<!-- layers: made by `python -m tests.docs.house` -->\n", "<!-- end of layers -->\n"


def layers() -> list[list[str]]:
    """Return the modules and packages at the top of ``conductor_app``, layer by layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (whole,) = [contract for contract in contracts if contract.get("containers") == ["conductor_app"]]
    return [layer.split(" | ") for layer in whole["layers"]]


def picture() -> str:
    """Return the picture: one room for each layer, each on top of what it may import."""
    rooms = [f'    L{number}["{" · ".join(layer)}"]' for number, layer in enumerate(layers())]
    arrows = " --> ".join(f"L{number}" for number in range(len(rooms)))
    return "\n".join(["```mermaid", "flowchart TB", *rooms, f"    {arrows}", "```", ""])


def write() -> None:
    """Put the picture into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{picture()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write()
