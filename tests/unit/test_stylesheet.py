"""The stylesheet of an execution's page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import conductor_app

STATIC = Path(conductor_app.__file__).parent / "static/conductor_app"
CSS = (STATIC / "page.css").read_text()
#: The admin's own backgrounds in the light and in the dark scheme: of a page, and of its quiet boxes.
GROUNDS = {"light": "#ffffff", "light box": "#f8f8f8", "dark": "#121212", "dark box": "#212121"}
#: Those of all pages.
TONES = dict(re.findall(r"^    --cd-([a-z]+): (#[0-9a-f]{6});", (STATIC / "admin.css").read_text(), re.MULTILINE))


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("ground", GROUNDS)
def test_bars_and_marks_stand_out_in_both_schemes(ground: str) -> None:
    assert len(TONES) >= 7
    for name, tone in TONES.items():
        assert contrast(tone, GROUNDS[ground]) >= 3, f"{name} on {ground}"


def test_text_has_the_colours_of_the_admin() -> None:
    rules = re.findall(r"[{;\s](?:color|fill): ([^;]+);", CSS)
    others = ("var(--cd-", "GrayText", "CanvasText", "inherit", "transparent")
    of_text = [value for value in rules if not value.startswith(others)]
    assert of_text
    for value in of_text:
        otherwise = r"(#[0-9a-f]{3,6}|currentcolor|var\(--cd-fg\))"
        assert re.match(rf"var\(--(body|error|link)-[a-z-]+, {otherwise}\)", value), value


def test_nothing_comes_from_elsewhere() -> None:
    assert "url(" not in CSS
    assert "@import" not in CSS
