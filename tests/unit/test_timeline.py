"""The lanes of the admin's timeline, and their image. No database: rows are made up."""

from __future__ import annotations

import re
import uuid
from typing import Any
from xml.etree import ElementTree

import pytest
from django.utils import translation

from conductor_app.admin.timeline import (
    MOST_LANES,
    QUEUED,
    RUNNING,
    WAITING,
    Lane,
    Timeline,
    axis_label,
    svg,
    timeline,
    totals,
)
from conductor_app.models import Execution, Step
from conductor_app.telling.situation import Situation
from conductor_app.telling.story import Story
from tests.support.instants import NOW, ago

ROOT = uuid.UUID("01a204e4-551c-7612-a2a5-dfa2a183dfde")


def execution(status: str, created: float, started: float | None, finished: float | None, **fields: Any) -> Execution:
    """An execution whose instants are seconds before ``NOW``."""
    key = fields.pop("id", ROOT)
    return Execution(
        id=key,
        root_id=ROOT,
        task="shop.tasks.fulfil",
        queue="celery",
        status=status,
        created_at=ago(created),
        started_at=None if started is None else ago(started),
        finished_at=None if finished is None else ago(finished),
        **fields,
    )


def child(status: str, created: float, started: float | None, finished: float | None, **fields: Any) -> Execution:
    return execution(
        status, created, started, finished, **{"id": uuid.uuid4(), "parent_id": ROOT, "step": "charge", **fields}
    )


def step(kind: str, created: float, finished: float | None, **fields: Any) -> Step:
    values: dict[str, Any] = {"name": "charge", "task": "shop.tasks.charge", "status": "succeeded", **fields}
    if finished is None:
        values["status"] = "pending"
    return Step(
        execution_id=ROOT,
        kind=kind,
        created_at=ago(created),
        finished_at=None if finished is None else ago(finished),
        **values,
    )


def drawn(row: Execution, *steps: Step, children: tuple[Execution, ...] = (), **more: Any) -> Timeline:
    tree = {other.pk: other for other in (row, *children)}
    story = Story(
        execution=row,
        situation=Situation(row, NOW, steps, tree),
        steps=list(steps),
        step_count=more.pop("step_count", len(steps)),
        waits=more.pop("waits", {}),
        causes=[],
        node_count=len(tree),
        child_counts={},
    )
    return timeline(story, **more)


def shape(lane: Lane) -> list[tuple[str, float]]:
    return [(segment.state, round(segment.seconds, 3)) for segment in lane.segments if segment.seconds]


def parsed(lanes: Timeline) -> ElementTree.Element:
    return ElementTree.fromstring(svg(lanes))


def found(image: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in image.iter() if name in element.get("class", "").split()]


def test_a_finished_execution_was_queued_ran_waited_and_ran() -> None:
    row = execution("succeeded", 100, 90, 10)
    lanes = drawn(row, step("sleep", 80, 20))
    own = lanes.lanes[0]
    assert shape(own) == [(QUEUED, 10), (RUNNING, 10), (WAITING, 60), (RUNNING, 10)]
    assert (own.outcome, own.seconds, lanes.seconds) == ("succeeded", 90, 90)
    assert totals(lanes)[0][1:] == ("10 s", "20 s", "60 s")


def test_segments_follow_each_other_without_gap_or_overlap() -> None:
    row = execution("succeeded", 100, 90, 10)
    steps = [step("start", 89, 15), step("invoke", 85, 40), step("event", 60, 30), step("sleep", 20, 5)]
    own = drawn(row, *steps).lanes[0]
    assert shape(own) == [(QUEUED, 10), (RUNNING, 5), (WAITING, 55), (RUNNING, 10), (WAITING, 10)]
    for before, after in zip(own.segments, own.segments[1:], strict=False):
        assert before.end == after.begin


def test_what_goes_on_reaches_until_now() -> None:
    running = drawn(execution("running", 50, 45, None)).lanes[0]
    assert shape(running) == [(QUEUED, 5), (RUNNING, 45)]
    assert (running.end, running.outcome) == (NOW, "")
    waiting = drawn(execution("waiting", 50, 45, None), step("event", 40, None)).lanes[0]
    assert shape(waiting) == [(QUEUED, 5), (RUNNING, 5), (WAITING, 40)]
    assert shape(drawn(execution("queued", 50, None, None)).lanes[0]) == [(QUEUED, 50)]


def test_a_woken_execution_is_queued_since_the_last_that_is_known_of_it() -> None:
    own = drawn(execution("queued", 50, 45, None), step("sleep", 40, 10)).lanes[0]
    assert shape(own) == [(QUEUED, 5), (RUNNING, 5), (WAITING, 30), (QUEUED, 10)]


def test_one_that_waits_for_what_was_not_read_waits() -> None:
    assert shape(drawn(execution("waiting", 50, 45, None)).lanes[0]) == [(QUEUED, 5), (WAITING, 45)]


def test_a_childs_lane_shows_its_time_in_the_queue_and_its_own_waits() -> None:
    row = execution("waiting", 50, 45, None)
    charge = child("waiting", 40, 30, None)
    lanes = drawn(
        row,
        step("invoke", 40, None, child_id=charge.pk),
        children=(charge,),
        waits={charge.pk: [step("sleep", 25, None)]},
    )
    assert [lane.name for lane in lanes.lanes] == ["fulfil", "charge"]
    assert shape(lanes.lanes[1]) == [(QUEUED, 10), (RUNNING, 5), (WAITING, 25)]


def test_a_child_whose_row_is_gone_leaves_its_steps_lane() -> None:
    lanes = drawn(execution("waiting", 50, 45, None), step("invoke", 40, None, child_id=uuid.uuid4()))
    assert shape(lanes.lanes[1]) == [(WAITING, 40)]
    assert lanes.lanes[1].execution is None


def test_a_map_has_a_lane_and_its_children_stand_below_in_order() -> None:
    rows = tuple(child("running", 40, 30 - n, None, step="pages", position=n) for n in (2, 0, 1))
    lanes = drawn(execution("waiting", 50, 45, None), step("map", 40, None, name="pages", total=5_000), children=rows)
    assert [lane.name for lane in lanes.lanes] == ["fulfil", "pages", "pages[0]", "pages[1]", "pages[2]"]
    assert [lane.label for lane in lanes.lanes[1:3]] == ["pages", "[0]"]
    assert [lane.is_nested for lane in lanes.lanes] == [False, False, True, True, True]
    assert lanes.hidden == 4_997


def test_of_too_many_lanes_those_that_failed_or_go_on_are_kept() -> None:
    steps = [step("sleep", 1_000 - n, 999 - n, name=f"nap-{n}") for n in range(200)]
    steps[150].status = "timed_out"
    steps[170].status, steps[170].finished_at = "pending", None
    lanes = drawn(execution("waiting", 1_010, 1_005, None), *steps, step_count=900)
    names = [lane.name for lane in lanes.lanes]
    assert len(names) == MOST_LANES
    assert names[:3] == ["fulfil", "nap-0", "nap-1"]
    assert names[-2:] == ["nap-150", "nap-170"]
    assert lanes.hidden == 900 - (MOST_LANES - 1)


def test_a_maps_many_children_leave_room_for_the_other_steps() -> None:
    rows = [child("running", 40, 30, None, step="pages", position=n) for n in range(50)]
    rows[49].status, rows[49].finished_at = "failed", ago(1)
    steps = [step("sleep", 48, 44, name="nap"), step("map", 40, None, name="pages", total=50)]
    names = [lane.name for lane in drawn(execution("waiting", 50, 49, None), *steps, children=tuple(rows)).lanes]
    assert names[:4] == ["fulfil", "nap", "pages", "pages[0]"]
    assert names[-1] == "pages[49]"
    assert len(names) == MOST_LANES


def test_attempts_have_ticks_where_their_first_step_was_recorded() -> None:
    row = execution("running", 100, 95, None, attempt=3)
    steps = [step("step", 90, 90), step("step", 60, 60, attempt=2), step("step", 50, 50, attempt=2)]
    lanes = drawn(row, *steps)
    assert lanes.lanes[0].ticks == (ago(60),)
    (tick,) = found(parsed(lanes), "cd-tick")
    assert tick.get("x1") == tick.get("x2") == "40%"


def test_nothing_took_any_time() -> None:
    lanes = drawn(execution("succeeded", 10, 10, 10), step("step", 10, 10))
    assert shape(lanes.lanes[0]) == []
    assert lanes.seconds > 0
    image = parsed(lanes)
    assert len(found(image, "cd-point")) == 2
    assert [mark.text for mark in found(image, "cd-end")] == ["✓", "✓"]


def test_a_clock_that_went_backwards_makes_no_negative_lengths() -> None:
    row = execution("succeeded", 10, 20, 15)
    lanes = drawn(row, step("sleep", 30, 40), step("step", 5, 7))
    for lane in lanes.lanes:
        assert all(segment.seconds >= 0 for segment in lane.segments), lane
    for bar in found(parsed(lanes), "cd-bar"):
        assert float(bar.get("width", "").rstrip("%")) > 0


@pytest.mark.parametrize("seconds", [0.002, 0.3, 1, 12, 130, 3_000, 50_000, 400_000, 90_000_000])
def test_the_axis_has_a_few_round_marks(seconds: float) -> None:
    lanes = drawn(execution("succeeded", seconds, seconds, 0))
    marks = lanes.marks()
    assert 2 <= len(marks) <= 7
    assert marks[0] == 0
    assert marks[-1] <= lanes.seconds * 1.000_001
    labels = [axis_label(mark, marks[1]) for mark in marks]
    assert len(set(labels)) == len(labels)
    assert not [label for label in labels if "e" in label]


def test_labels_of_the_axis_are_whole() -> None:
    assert axis_label(0, 30) == "0"
    assert [axis_label(90, 30), axis_label(600, 120), axis_label(7_200, 3_600)] == ["90 s", "10 min", "2 h"]
    assert [axis_label(0.5, 0.1), axis_label(172_800, 86_400)] == ["500 ms", "2 d"]


def test_the_image_names_itself_and_waits_are_hatched() -> None:
    lanes = drawn(execution("waiting", 50, 45, None), step("sleep", 40, None, name="<script>"))
    image = parsed(lanes)
    assert image.get("role") == "img"
    texts = {element.get("id"): element.text for element in image.iter() if element.get("id")}
    assert [bool(texts.get(key)) for key in image.get("aria-labelledby", "").split()] == [True, True]
    hatched = found(image, "cd-bar--waiting")
    assert {bar.get("fill") for bar in hatched} == {"url(#cd-timeline-hatch)"}
    assert len(hatched) == 2
    assert not found(image, "cd-end")


def test_the_image_obeys_a_strict_policy_and_stays_inside_its_frame() -> None:
    late = child("running", 40, 30, None)
    lanes = drawn(execution("failed", 50, 45, 30), step("invoke", 40, 31, child_id=late.pk), children=(late,))
    text = svg(lanes)
    assert not re.search(r"\bstyle=|<style|<script|\son\w+=", text)
    for bar in found(parsed(lanes), "cd-bar"):
        begin, width = (float(bar.get(name, "").rstrip("%")) for name in ("x", "width"))
        assert begin >= 0
        assert begin + width <= 100.5


def test_numbers_have_a_point_in_every_language(settings: Any) -> None:
    settings.USE_THOUSAND_SEPARATOR = True
    lanes = drawn(execution("succeeded", 100, 90.123, 10), step("sleep", 80, 20.7))
    with translation.override("de"):
        text = str(svg(lanes))
    assert not re.search(r'="[\d.]*,', text)
