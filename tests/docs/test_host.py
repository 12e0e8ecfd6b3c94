"""The page about what we rely on names tests that exist, and each file of the contract."""

from __future__ import annotations

import re

from tests.docs import house

CONTRACT = house.ROOT / "tests/celery_contract"
PAGE = house.ROOT / "docs/contributing/host.md"


def test_each_contract_test_that_the_page_names_exists() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "test_" in line]
    assert len(rows) > 15
    for row in rows:
        for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)", row):
            source = (CONTRACT / file).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert f"def {name}(" in source, (file, name)


def test_each_file_of_the_contract_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert [path.name for path in sorted(CONTRACT.glob("test_*.py")) if f"`{path.name}`" not in page] == []
