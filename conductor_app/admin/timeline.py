"""When an execution and its children were queued, ran and waited: as lanes, and the lanes as SVG.

Only classes and presentation attributes, so that it may be shown under the strictest content security policy.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.telling import runs
from conductor_app.telling.labels import MARKS, STEP_MARKS
from conductor_app.telling.runs import QUEUED, RUNNING, WAITING, Segment, Spans
from conductor_app.telling.story import Story
from conductor_app.telling.words import duration, short_name, visible
from conductor_app.transitions import kinds

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
    own = [step for step in story.steps if not step.is_copied]
    of_maps = sum(step.total or 0 for step in own if kinds.of(step.kind).has_children)
    return story.step_count - (len(story.steps) - len(own)) + of_maps


def _own_lane(story: Story) -> Lane:
    execution = story.execution
    spans = runs.spans(execution, story.attempts, story.steps, story.now)
    return _execution_lane(execution, short_name(execution.task), _("this execution"), spans, story.now, own=True)


def _other_lanes(story: Story) -> Iterator[Lane]:
    of_maps: dict[str, list[Execution]] = defaultdict(list)
    for row in story.tree.values():
        if row.parent_id == story.execution.pk and row.position is not None:
            of_maps[row.step].append(row)
    for step in story.steps:
        if step.is_copied:
            continue  # nothing of it took any time here
        child = story.child_of(step)
        # The child that decided a map stands there, too; it has a lane among its siblings.
        if child is not None and kinds.of(step.kind).has_child:
            yield _execution_lane(child, step.name, step.get_kind_display(), _spans_of(child, story), story.now)
            continue
        yield _step_lane(step, story.execution.finished_at or story.now)
        if kinds.of(step.kind).has_children:
            for row in sorted(of_maps[step.name], key=lambda row: row.position or 0):
                spans, name = _spans_of(row, story), f"{step.name}[{row.position}]"
                yield _execution_lane(row, name, _("child of a map"), spans, story.now, nested=True)


def _spans_of(child: Execution, story: Story) -> Spans:
    return runs.spans(child, story.attempts_of.get(child.pk, ()), story.waits.get(child.pk, ()), story.now)


def _execution_lane(
    row: Execution,
    name: str,
    kind: str,
    spans: Spans,
    now: dt.datetime,
    *,
    own: bool = False,
    nested: bool = False,
) -> Lane:
    status = ExecutionStatus(row.status)
    end = max(row.finished_at or now, row.created_at)
    return Lane(
        name=visible(name),
        kind=kind,
        segments=spans.segments,
        begin=row.created_at,
        end=end,
        outcome=status.value if row.is_final else "",
        mark=MARKS[status],
        execution=row,
        ticks=spans.attempts,
        attempts=row.attempt,
        is_current=own,
        is_nested=nested,
    )


def _step_lane(step: Step, now: dt.datetime) -> Lane:
    end = max(step.finished_at or now, step.created_at)
    state = WAITING if kinds.of(step.kind).is_wait else RUNNING
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


# ---------------------------------------------------------------------------------------------------------------- SVG


def svg(drawn: Timeline, key: str = "cd-timeline", title: str = "") -> SafeString:
    """Return the lanes as an image; their names stand beside it, in lines of ``LANE_HEIGHT`` below ``AXIS_HEIGHT``.

    Args:
        drawn: What to draw.
        key: What the image's ids begin with, unique on its page.
        title: What the image is, for those who do not see it.
    """
    height = AXIS_HEIGHT + LANE_HEIGHT * len(drawn.lanes) + 4
    return format_html(
        '<svg class="cd-timeline__image" role="img" aria-labelledby="{key}-title {key}-desc" width="100%" '
        'height="{height}" xmlns="http://www.w3.org/2000/svg">'
        '<title id="{key}-title">{title}</title><desc id="{key}-desc">{text}</desc>'
        '<defs><pattern id="{key}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" class="cd-hatch__ground"/>'
        '<rect width="2.5" height="6" class="cd-hatch__line"/></pattern></defs>'
        '<svg x="0.5%" width="95%" height="{height}" overflow="visible">{axis}{lanes}</svg></svg>',
        key=key,
        height=height,
        title=title or _("Timeline"),
        text=describe(drawn),
        axis=_axis(drawn, height),
        lanes=format_html_join("", "{}", ((_lane(drawn, lane, row, key),) for row, lane in enumerate(drawn.lanes))),
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


def _lane(drawn: Timeline, lane: Lane, row: int, key: str) -> SafeString:
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
        bars = (
            (*_bar(drawn, segment, key), str(top), str(BAR_HEIGHT)) for segment in lane.segments if segment.seconds > 0
        )
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


def _bar(drawn: Timeline, segment: Segment, key: str) -> tuple[str, SafeString, str, str]:
    begin = drawn.place(segment.begin)
    width = max(drawn.place(segment.end) - begin, _NARROWEST)
    fill = format_html(' fill="url(#{}-hatch)"', key) if segment.state == WAITING else SafeString("")
    state = f"{segment.state} cd-bar--failed" if segment.has_failed else segment.state
    return state, fill, _percent(min(begin, 100 - _NARROWEST)), _percent(width)


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
