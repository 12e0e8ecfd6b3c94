"""Every link inside the documentation leads somewhere."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, pages, prose, read

_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("page", pages())
def test_relative_links_resolve(page: str) -> None:
    for match in _LINK.finditer(prose(page)):
        target, _, anchor = match["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {match['target']} does not exist"
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page}: {match['target']} has no heading"


def anchors(page: str) -> set[str]:
    """The anchors that a forge makes from a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        name, number = slug, 0
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def test_every_page_is_in_the_index() -> None:
    index = read("docs/README.md")
    missing = [page for page in pages() if page.startswith("docs/") and page != "docs/README.md"]
    missing = [page for page in missing if f"({page.removeprefix('docs/')})" not in index]
    assert not missing, f"docs/README.md has no link to {', '.join(missing)}"
