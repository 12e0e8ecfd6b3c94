"""Medians, ratios and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import (
    Figure,
    Results,
    Sample,
    Summary,
    better,
    cell,
    markdown,
    number,
    percentile,
    summarize,
    tables,
)

RATE = Figure("W1", "W1", "workflows/s", higher_is_better=True)
TIME = Figure("W1-latency", "W1", "p50 ms", higher_is_better=False)
REPLAY = Figure("replay-10", "N = 10", "ms/child", higher_is_better=False)


def results(*samples: Sample) -> Results:
    return Results(figures={figure.key: figure for figure in (RATE, TIME, REPLAY)}, samples=list(samples))


def test_a_summary_is_the_median_and_the_range() -> None:
    assert summarize([3.0, 1.0, 7.0]) == Summary(3.0, 1.0, 7.0, 3)
    assert summarize([1.0, 2.0]) == Summary(1.5, 1.0, 2.0, 2)
    assert summarize([]) is None


def test_better_is_above_one_in_both_directions() -> None:
    assert better(200, 100, higher_is_better=True) == 2
    assert better(200, 100, higher_is_better=False) == 0.5


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (51, 6), (95, 10), (100, 10), (1, 1)])
def test_a_percentile_is_the_nearest_rank(percent: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was four times slower in the second round: the ratios do not see it.
    found = results(
        Sample("ours", "W1", 1, 100),
        Sample("peer", "W1", 1, 200),
        Sample("ours", "W1", 2, 25),
        Sample("peer", "W1", 2, 50),
        Sample("peer", "W1", 3, 1_000_000),
    )
    assert found.ratio("peer", "W1", "ours") == 2
    assert found.ratio("ours", "W1", "ours") == 1
    assert found.ratio("ours", "W1", "absent") is None


def test_a_ratio_of_times_is_above_one_if_it_is_faster() -> None:
    found = results(Sample("ours", "W1-latency", 1, 20), Sample("peer", "W1-latency", 1, 10))
    assert found.ratio("peer", "W1-latency", "ours") == 2


def test_a_cell_shows_median_range_and_ratio() -> None:
    found = results(
        *(Sample("ours", "W1", number, value) for number, value in enumerate((100, 110, 120), 1)),
        *(Sample("peer", "W1", number, value) for number, value in enumerate((50, 55, 90), 1)),
        Sample("once", "W1", 1, 1234.5),
    )
    assert cell(found, "ours", "W1", "ours") == "110 (100 to 120)"
    assert cell(found, "peer", "W1", "ours") == "55.0 (50.0 to 90.0) ×0.50"
    assert cell(found, "once", "W1", "absent") == "1,234"
    assert cell(found, "peer", "W1-latency", "ours") == "–"


def test_a_cell_of_a_latency_shows_the_95th_percentile() -> None:
    found = results(Sample("ours", "W1-latency", 1, 5, also={"p95": 9}), Sample("peer", "W1-latency", 1, 10))
    assert cell(found, "ours", "W1-latency", "peer") == "5.00, p95 9.00 ×2.00"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234567.0, "1,234,567")],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_tables_leave_out_what_was_not_measured() -> None:
    found = results(
        Sample("ours", "W1", 1, 100, costs={"statements": 8, "commits": 4, "syncs": 2, "wal_kb": 10}),
        Sample("queue", "W1-latency", 1, 5),
        Sample("ours", "replay-10", 1, 2, costs={"statements": 3}),
    )
    assert tables(found, "ours") == {
        "Rates": [["", "W1, workflows/s"], ["ours", "100"]],
        "Times": [["", "W1, p50 ms"], ["queue", "5.00"]],
        "Replay": [["", "N = 10, ms/child"], ["ours", "2.00"]],
        "Replay, statements for each child": [["", "N = 10"], ["ours", "3.00"]],
        "The database's part in W1, for each root": [
            ["", "statements", "commits", "WAL syncs", "WAL kB"],
            ["ours", "8.00", "4.00", "2.00", "10.0"],
        ],
    }


def test_markdown_aligns_numbers_to_the_right() -> None:
    assert markdown([["", "W1"], ["ours", "100"]]) == "|  | W1 |\n| --- | --: |\n| ours | 100 |"


def test_a_file_comes_back_as_it_was_and_knows_its_next_round(tmp_path: Path) -> None:
    found = results(Sample("ours", "W1", 2, 1.5, 40, {"statements": 8.0}, {"p95": 3.0}))
    found.about, found.notes = {"scale": 1.0}, {"peer": "is away"}
    found.save(tmp_path / "new" / "results.json")

    assert Results.load(tmp_path / "new" / "results.json") == found
    assert found.next_round("W1") == 3
    assert found.next_round("W1-latency") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": {}, "figures": {}, "samples": [{}]}'])
def test_a_file_that_is_no_results_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="is no file of results"):
        Results.load(path)
