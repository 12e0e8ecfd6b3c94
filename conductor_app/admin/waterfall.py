"""The whole tree of an execution as a waterfall: a bar for each, from its creation to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.http import HttpRequest
from django.utils.translation import gettext as _

from conductor_app.admin import pieces
from conductor_app.admin.timeline import Lane, Timeline, svg
from conductor_app.states import ExecutionStatus
from conductor_app.telling.labels import MARKS
from conductor_app.telling.runs import QUEUED, WAITING, Segment
from conductor_app.telling.story import Story
from conductor_app.telling.tree import Branch
from conductor_app.telling.words import duration, middle, short_name, visible

#: Most rows that are drawn.
MOST_ROWS = 40
#: In an address: what stands first.
PARAMETER, SLOWEST = "tree", "slowest"
#: Deeper rows are not moved further to the right.
DEEPEST = 6
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Waterfall:
    """The rows as lanes, with how deep each stands in the tree."""

    drawn: Timeline
    depths: tuple[int, ...]


def context(request: HttpRequest, story: Story, url: Callable[[UUID], str | None]) -> dict[str, Any]:
    """Return what an execution's page shows of it.

    Args:
        request: Its address says what stands first.
        story: Of which execution.
        url: Returns the address of an execution's page, if there is one.
    """
    is_slowest_first = request.GET.get(PARAMETER) == SLOWEST
    fall = waterfall(story, slowest_first=is_slowest_first)
    return {
        "waterfall_svg": svg(fall.drawn, "cd-waterfall", _("Waterfall of the tree")),
        "waterfall_rows": [
            {
                "lane": lane,
                "url": url(lane.execution.pk) if lane.execution and not lane.is_current else None,
                "took": duration(lane.seconds),
                "task": visible(lane.execution.task) if lane.execution else "",
                "depth": min(depth, DEEPEST),
            }
            for lane, depth in zip(fall.drawn.lanes, fall.depths, strict=True)
        ],
        "waterfall_hidden": pieces.left_out(fall.drawn.hidden),
        "is_slowest_first": is_slowest_first,
    }


def waterfall(story: Story, *, slowest_first: bool = False) -> Waterfall:
    """Return the rows of the tree.

    Args:
        story: Of which execution.
        slowest_first: Those that took longest first, instead of each below its parent. Beyond ``MOST_ROWS`` the same
            ones are kept in either order: those on the way to the execution, then the longest.
    """
    branches = list(_in_order(story.branches()))
    lanes = [_lane(branch, story) for branch in branches]
    places = range(len(lanes))
    kept = sorted(places, key=lambda place: (not branches[place].is_on_path, -lanes[place].seconds))[:MOST_ROWS]
    kept.sort(key=(lambda place: (-lanes[place].seconds, place)) if slowest_first else None)
    shown = tuple(lanes[place] for place in kept)
    return Waterfall(
        Timeline(
            lanes=shown,
            begin=min(lane.begin for lane in shown),
            end=max(lane.end for lane in shown),
            hidden=story.node_count - len(shown),
        ),
        tuple(0 if slowest_first else branches[place].depth for place in kept),
    )


def _in_order(root: Branch) -> Iterator[Branch]:
    """Yield each execution before its children, without recursion: a tree may be deep."""
    following = [root]
    while following:
        branch = following.pop()
        yield branch
        following.extend(reversed(branch.children))


def _lane(branch: Branch, story: Story) -> Lane:
    """Return one row: the time in the queue before the first run, then all of the rest in the tone of the status.

    What it did in between is on its own page: the runs of a whole tree are not read here.
    """
    row = branch.execution
    status = ExecutionStatus(row.status)
    end = max(row.finished_at or story.now, row.created_at)
    started = min(row.started_at or end, end)
    # While it goes on it is striped if it waits, as in the timeline.
    state = WAITING if status == ExecutionStatus.WAITING else status.value
    place = "" if row.position is None else f"[{row.position}]"
    name = middle(short_name(row.task), _LONGEST_NAME)
    return Lane(
        name=visible(f"{row.step}{place}: {name}" if row.step else name),
        kind="",
        segments=(Segment(QUEUED, row.created_at, started), Segment(state, started, end)),
        begin=row.created_at,
        end=end,
        outcome=status.value if row.is_final else "",
        mark=MARKS[status],
        execution=row,
        attempts=row.attempt,
        is_current=branch.is_current,
    )
