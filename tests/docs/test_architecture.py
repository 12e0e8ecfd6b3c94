"""The contributor's pages show the house as the contracts keep it."""

from __future__ import annotations

import re

from tests.docs import house


def test_the_picture_of_the_layers_is_made_from_the_contract() -> None:
    page = house.PAGE.read_text()
    assert page.partition(house.BEGIN)[2].partition(house.END)[0] == house.picture()


def test_the_table_of_the_layers_has_each_in_its_place() -> None:
    table = house.PAGE.read_text().partition("| layer | what is there |\n|---|---|\n")[2].partition("\n\n")[0]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()]
    assert shown == house.layers()


def test_each_module_and_package_of_the_top_has_its_place() -> None:
    top = house.ROOT / "conductor_app"
    modules = {path.stem for path in top.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in top.glob("*/__init__.py")}
    assert {name for layer in house.layers() for name in layer} == modules | packages
