"""When an execution and its children were queued, ran and waited: as lanes, and the lanes as SVG.

Only classes and presentation attributes, so that it may be shown under the strictest content security policy.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.telling.history import attempts_begun
from conductor_app.telling.labels import MARKS, STEP_MARKS
from conductor_app.telling.story import Story
from conductor_app.telling.waits import WAITING_KINDS
from conductor_app.telling.words import duration, short_name, visible

#: Most lanes that are drawn.
MOST_LANES = 30
#: Pixels.
LANE_HEIGHT = 26
AXIS_HEIGHT = 24
BAR_HEIGHT = 12
#: Percent of the width: nothing is drawn narrower.
_NARROWEST = 0.3
#: Seconds between two marks of the axis; longer ones are multiples of a day.
_INTERVALS = (
    *(base * 10.0**power for power in range(-3, 1) for base in (1, 2, 5)),
    *(10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1_800.0),
    *(3_600.0, 7_200.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0),
)
_MOST_MARKS = 6

QUEUED, RUNNING, WAITING = "queued", "running", "waiting"


@dataclass(frozen=True)
class Segment:
    """A stretch of time in one state."""

    state: str
    begin: dt.datetime
    end: dt.datetime

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end - self.begin).total_seconds()


@dataclass(frozen=True)
class Lane:
    """One line of the timeline: an execution, or a step without one."""

    name: str
    kind: str
    segments: tuple[Segment, ...]
    begin: dt.datetime
    #: When it ended, or the present.
    end: dt.datetime
    #: The status at its end; empty while it goes on.
    outcome: str
    mark: str
    execution: Execution | None = None
    #: When later attempts had begun.
    ticks: tuple[dt.datetime, ...] = ()
    attempts: int = 1
    is_current: bool = False
    #: Whether it belongs to the lane above it: a child of a map.
    is_nested: bool = False

    @property
    def label(self) -> str:
        """The name beside the image: below the lane of its map, a child needs its place alone."""
        return self.name[self.name.rindex("[") :] if self.is_nested else self.name

    @property
    def seconds(self) -> float:
        """How long it took so far."""
        return (self.end - self.begin).total_seconds()

    def total(self, state: str) -> float:
        """Return how many seconds it spent in a state."""
        return sum(segment.seconds for segment in self.segments if segment.state == state)


@dataclass(frozen=True)
class Timeline:
    """All lanes, on one axis."""

    lanes: tuple[Lane, ...]
    begin: dt.datetime
    end: dt.datetime
    #: How many lanes more there would be.
    hidden: int = 0

    @property
    def seconds(self) -> float:
        """The length of the axis; never zero."""
        return max((self.end - self.begin).total_seconds(), 0.001)

    def place(self, when: dt.datetime) -> float:
        """Return where an instant stands, in percent of the axis."""
        return min(max(100 * (when - self.begin).total_seconds() / self.seconds, 0.0), 100.0)

    def marks(self) -> list[float]:
        """Return the seconds from the beginning at which the axis is marked."""
        least = self.seconds / _MOST_MARKS
        days = math.ceil(least / 86_400) * 86_400.0
        step = next((interval for interval in _INTERVALS if interval >= least), days)
        return [number * step for number in range(int(self.seconds / step + 1e-9) + 1)]


# -------------------------------------------------------------------------------------------------------------- lanes


def timeline(story: Story, most: int = MOST_LANES) -> Timeline:
    """Return the timeline of an execution: its own lane first, then its steps in the order in which they began.

    Args:
        most: How many lanes there may be. Those that failed and those that go on are kept first.
    """
    own = _own_lane(story)
    others = list(_other_lanes(story))
    missing = _count(story) - len(others)
    kept = sorted(range(len(others)), key=lambda place: (_weight(others[place]), place))[: most - 1]
    lanes = (own, *(others[place] for place in sorted(kept)))
    return Timeline(
        lanes=lanes,
        begin=own.begin,
        end=max(lane.end for lane in lanes),
        hidden=max(missing, 0) + len(others) - len(kept),
    )


def _weight(lane: Lane) -> int:
    """Return a number that is lower for lanes that tell more: those of the execution's own steps before a map's."""
    if lane.outcome in (StepStatus.FAILED, StepStatus.TIMED_OUT):
        return 2 if lane.is_nested else 0
    if lane.is_nested:
        return 5 if lane.outcome else 4
    return 3 if lane.outcome else 1


def _count(story: Story) -> int:
    """Return how many lanes all steps and the children of maps would have."""
    return story.step_count + sum(step.total or 0 for step in story.steps if step.kind == StepKind.MAP)


def _own_lane(story: Story) -> Lane:
    ticks = tuple(at for _, at in attempts_begun(story.steps))
    return _execution_lane(
        story.execution, short_name(story.execution.task), _("this execution"), story.steps, story.now, ticks, own=True
    )


def _other_lanes(story: Story) -> Iterator[Lane]:
    of_maps: dict[str, list[Execution]] = defaultdict(list)
    for row in story.tree.values():
        if row.parent_id == story.execution.pk and row.position is not None:
            of_maps[row.step].append(row)
    for step in story.steps:
        child = story.child_of(step)
        # The child that decided a map stands there, too; it has a lane among its siblings.
        if child is not None and step.kind in (StepKind.INVOKE, StepKind.START):
            waits = story.waits.get(child.pk, ())
            ticks = tuple(at for _, at in attempts_begun(waits))
            yield _execution_lane(child, step.name, step.get_kind_display(), waits, story.now, ticks)
            continue
        yield _step_lane(step, story.execution.finished_at or story.now)
        if step.kind == StepKind.MAP:
            for row in sorted(of_maps[step.name], key=lambda row: row.position or 0):
                waits = story.waits.get(row.pk, ())
                yield _execution_lane(
                    row, f"{step.name}[{row.position}]", _("child of a map"), waits, story.now, nested=True
                )


def _execution_lane(
    row: Execution,
    name: str,
    kind: str,
    steps: Sequence[Step],
    now: dt.datetime,
    ticks: tuple[dt.datetime, ...] = (),
    *,
    own: bool = False,
    nested: bool = False,
) -> Lane:
    status = ExecutionStatus(row.status)
    end = max(row.finished_at or now, row.created_at)
    return Lane(
        name=visible(name),
        kind=kind,
        segments=tuple(_segments(row, steps, end)),
        begin=row.created_at,
        end=end,
        outcome=status.value if row.is_final else "",
        mark=MARKS[status],
        execution=row,
        ticks=ticks,
        attempts=row.attempt,
        is_current=own,
        is_nested=nested,
    )


def _step_lane(step: Step, now: dt.datetime) -> Lane:
    end = max(step.finished_at or now, step.created_at)
    state = RUNNING if step.kind == StepKind.STEP else WAITING
    status = StepStatus(step.status)
    return Lane(
        name=visible(step.name),
        kind=step.get_kind_display(),
        segments=(Segment(state, step.created_at, end),),
        begin=step.created_at,
        end=end,
        outcome="" if status == StepStatus.PENDING else status.value,
        mark=STEP_MARKS[status],
        attempts=step.attempt,
    )


def _segments(row: Execution, steps: Sequence[Step], end: dt.datetime) -> Iterator[Segment]:
    """Yield what an execution did from its creation to ``end``, without gaps.

    Between two waits it counts as running: when a woken execution's next run began is not stored.
    """
    if row.started_at is None:
        yield Segment(QUEUED, row.created_at, end)
        return
    begin = min(max(row.started_at, row.created_at), end)
    yield Segment(QUEUED, row.created_at, begin)
    waits = _waits(steps, begin, end)
    active = end
    if row.status == ExecutionStatus.QUEUED:
        # It has failed an attempt or was woken since the last that is known of it.
        known = [when for step in steps for when in (step.created_at, step.finished_at) if when is not None]
        active = min(max([begin, *known]), end)
    elif row.status == ExecutionStatus.WAITING and not waits:
        waits = [(begin, end)]  # for something that was not read
    for wait_begin, wait_end in waits:
        if wait_begin > begin:
            yield Segment(RUNNING, begin, wait_begin)
        yield Segment(WAITING, wait_begin, wait_end)
        begin = wait_end
    if active > begin:
        yield Segment(RUNNING, begin, active)
    if end > active:
        yield Segment(QUEUED, max(active, begin), end)


def _waits(steps: Iterable[Step], begin: dt.datetime, end: dt.datetime) -> list[tuple[dt.datetime, dt.datetime]]:
    """Return when no worker was held, as stretches that do not overlap."""
    merged: list[tuple[dt.datetime, dt.datetime]] = []
    spans = (
        (min(max(step.created_at, begin), end), min(max(step.finished_at or end, begin), end))
        for step in steps
        if step.kind in WAITING_KINDS
    )
    for since, until in sorted(spans):
        if until <= since:
            continue
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((since, until))
    return merged


# ---------------------------------------------------------------------------------------------------------------- SVG


def svg(drawn: Timeline) -> SafeString:
    """Return the lanes as an image; their names stand beside it, in lines of ``LANE_HEIGHT`` below ``AXIS_HEIGHT``."""
    height = AXIS_HEIGHT + LANE_HEIGHT * len(drawn.lanes) + 4
    return format_html(
        '<svg class="cd-timeline__image" role="img" aria-labelledby="cd-timeline-title cd-timeline-desc" width="100%" '
        'height="{}" xmlns="http://www.w3.org/2000/svg">'
        '<title id="cd-timeline-title">{}</title><desc id="cd-timeline-desc">{}</desc>'
        '<defs><pattern id="cd-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" class="cd-hatch__ground"/>'
        '<rect width="2.5" height="6" class="cd-hatch__line"/></pattern></defs>'
        '<svg x="0.5%" width="95%" height="{}" overflow="visible">{}{}</svg></svg>',
        height,
        _("Timeline"),
        describe(drawn),
        height,
        _axis(drawn, height),
        format_html_join("", "{}", ((_lane(drawn, lane, row),) for row, lane in enumerate(drawn.lanes))),
    )


def describe(drawn: Timeline) -> str:
    """Return in one sentence what the image shows; the table beside it has the figures."""
    return _("%(lanes)d lanes over %(time)s. The table below holds the same times.") % {
        "lanes": len(drawn.lanes),
        "time": duration(drawn.seconds),
    }


def _axis(drawn: Timeline, height: int) -> SafeString:
    marks = drawn.marks()
    lines = (
        (
            _percent(100 * seconds / drawn.seconds),
            str(AXIS_HEIGHT - 4),
            str(height),
            "start" if not seconds else "middle",
            axis_label(seconds, marks[1] if len(marks) > 1 else seconds),
        )
        for seconds in marks
    )
    return format_html_join(
        "",
        '<line class="cd-axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>'
        '<text class="cd-axis__label" x="{0}" y="13" text-anchor="{3}">{4}</text>',
        lines,
    )


def axis_label(seconds: float, interval: float) -> str:
    """Return a mark's label in the unit in which the marks are whole: ``0``, ``500 ms``, ``90 s``, ``10 min``."""
    if not seconds:
        return "0"
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s")):
        if interval >= size:
            return f"{seconds / size:,.4g} {unit}"
    return f"{seconds * 1_000:,.4g} ms"


def _lane(drawn: Timeline, lane: Lane, row: int) -> SafeString:
    middle = AXIS_HEIGHT + LANE_HEIGHT * row + LANE_HEIGHT // 2
    top = middle - BAR_HEIGHT // 2
    if lane.seconds <= 0:
        bars: Iterable[tuple[str, ...]] = ()
        point = format_html(
            '<circle class="cd-point cd-point--{}" cx="{}" cy="{}" r="4"/>',
            lane.outcome or "open",
            _percent(drawn.place(lane.begin)),
            middle,
        )
    else:
        bars = ((*_bar(drawn, segment), str(top), str(BAR_HEIGHT)) for segment in lane.segments if segment.seconds > 0)
        point = SafeString("")
    return format_html(
        '<g class="cd-lane{}">{}{}{}{}</g>',
        " cd-lane--current" if lane.is_current else "",
        format_html_join("", '<rect class="cd-bar cd-bar--{}"{} x="{}" width="{}" y="{}" height="{}" rx="2"/>', bars),
        point,
        format_html_join(
            "",
            '<line class="cd-tick" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>',
            ((_percent(drawn.place(at)), str(top - 3), str(top + BAR_HEIGHT + 3)) for at in lane.ticks),
        ),
        _end(drawn, lane, middle),
    )


def _bar(drawn: Timeline, segment: Segment) -> tuple[str, SafeString, str, str]:
    begin = drawn.place(segment.begin)
    width = max(drawn.place(segment.end) - begin, _NARROWEST)
    fill = SafeString(' fill="url(#cd-hatch)"') if segment.state == WAITING else SafeString("")
    return segment.state, fill, _percent(min(begin, 100 - _NARROWEST)), _percent(width)


def _end(drawn: Timeline, lane: Lane, middle: int) -> SafeString:
    if not lane.outcome:
        return SafeString("")
    return format_html(
        '<text class="cd-end cd-end--{}" x="{}" dx="6" y="{}">{}</text>',
        lane.outcome,
        _percent(drawn.place(lane.end)),
        middle + 4,
        lane.mark,
    )


def _percent(value: float) -> str:
    """Return a length as SVG wants it, whatever the language: with a point."""
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def totals(drawn: Timeline) -> list[tuple[Lane, str, str, str]]:
    """Return for each lane how long it was queued, ran and waited, for the table."""
    return [
        (lane, *(duration(lane.total(state)) if lane.total(state) else "" for state in (QUEUED, RUNNING, WAITING)))  # type: ignore[misc]
        for lane in drawn.lanes
    ]
