"""The page and the picture that are made of results."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks import page
from benchmarks.plot import LABEL, WIDTH, logarithmic, svg
from benchmarks.results import Figure, Results, Sample

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def results() -> Results:
    return Results(
        about={
            "date": "2026-01-02",
            "scale": 0.5,
            "pool": "solo:1",
            "machine": {"cores": 2, "architecture": "x86_64", "kernel": "Linux 6"},
            "python": "3.11",
            "postgresql": "15",
            "versions": {"ours-a": {"celery": "5"}, "ours-b": {"celery": "5"}, "peer": {"peer": "1"}},
        },
        figures={"W1": Figure("W1", "W1", "workflows/s", higher_is_better=True)},
        samples=[Sample("ours-a", "W1", 1, 100), Sample("peer", "W1", 1, 10), Sample("peer", "W1", 2, 30)],
    )


def test_only_what_stands_between_the_markers_changes() -> None:
    before = f"intro\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    once = page.insert(before, "new\n")
    assert once == f"intro\n{page.BEGIN}\n\nnew\n\n{page.END}\nafter\n"
    assert page.insert(once, "new") == once


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END} {page.BEGIN}"])
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="Put both where the figures belong"):
        page.insert(text, "new")


def test_the_page_in_the_repository_has_its_markers() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.insert(text, "new") != text


def test_the_figures_say_what_they_were_measured_on(results: Results) -> None:
    results.profiles["ours-a, W1"] = [("database driver", 0.75), ("other", 0.001)]
    text = page.figures(results, "ours-a")
    assert "**Where the time goes: ours-a, W1**" in text
    assert text.count("75%") == 1
    assert "| other |" not in text
    assert "2 rounds, scale 0.5, 2 cores (x86_64), Linux 6, Python 3.11, PostgreSQL 15" in " ".join(text.split())
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "| peer | 20.0 (10.0 to 30.0) ×0.10 |" in text
    assert text.endswith("Versions: ours: celery 5; peer: peer 1.")


def test_the_picture_has_a_point_for_each_system_inside_of_its_frame(results: Results) -> None:
    root = ET.fromstring(svg(results))
    frame = root.find(f"{SVG}rect")
    points = [(float(point.attrib["cx"]), float(point.attrib["cy"])) for point in root.iter(f"{SVG}circle")]
    assert len(points) == 2
    assert LABEL < points[1][0] < points[0][0] < WIDTH
    assert frame is not None
    assert 0 < points[0][1] < points[1][1] < float(frame.attrib["height"])


def test_a_logarithmic_axis_keeps_the_order_and_shows_the_lowest() -> None:
    length = logarithmic(1, 1_000, 100)
    assert 0 < length(1) < length(10) < length(1_000) == pytest.approx(100)
    assert logarithmic(5, 5, 100)(5) == pytest.approx(100)
