"""A parent and its children as an explicit model: every order of their transactions, with kills and doubled messages.

Not the product, but its design, small enough to be searched to the end. A transaction is one move, except where the
product relies on a lock inside of one: whatever decides a step and then wakes the parent is two moves, and the
suspension on a step that is pending three (lock, look, commit), with the locks in between.

Messages are not counted: a copy of each may come at any moment, which is more than any broker does. A run that is
fenced can do nothing for ever after, so it is forgotten at once. Both are exact, but for the mutants that are about
them.

The names of executions: 0 is the parent, 1 and following are its children.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

OPEN, FINAL = frozenset("QHRW"), frozenset("SFC")
#: Attempts that an execution has.
MOST_ATTEMPTS = 2

#: An execution is claimed once for each attempt, and once for each time it is woken; more is a loop.
MOST_CLAIMS = MOST_ATTEMPTS + 3

#: What the model can leave out.
MUTANTS = (
    "a run writes with any fence",
    "a claim asks for no status",
    "the wake-up has a condition on the status",
    "a suspension does not look again",
    "an end does not wake the parent",
    "nobody publishes again",
    "a crash is no attempt",
    "a decided step is decided again",
    "a map is decided one child too early",
    "a gather counts members that have ended",
    "an ending child lets no sibling go",
    "a child that was held back lets a sibling go",
    "a cancelled parent leaves its children alone",
    "a timeout does not wake the parent",
)


@dataclass(frozen=True)
class Design:
    """What is searched.

    Attributes:
        children: How many.
        is_gather: Whether they are started, and gathered afterwards; else the parent maps, or invokes a single one.
        fails_fast: Whether the first failure decides.
        max_parallel: Of a map; 0 is without limit.
        has_timeout: Whether the step may time out.
        cancels: Which executions somebody may cancel.
        may_rouse: Whether the parent may once be queued although its step is pending, as an operator's retry does that
            finds other children to wait for.
        mutant: What is left out.
    """

    children: int = 1
    is_gather: bool = False
    fails_fast: bool = True
    max_parallel: int = 0
    has_timeout: bool = False
    cancels: tuple[int, ...] = ()
    may_rouse: bool = False
    mutant: str = ""


class Row(NamedTuple):
    """An execution: Queued, Held back, Running, Waiting, Succeeded, Failed, Cancelled."""

    status: str
    fence: int = 0
    attempt: int = 1
    is_flagged: bool = False
    #: Of a child that was started: what the parent's step of it says, Pending or decided.
    member: str = ""
    ends: int = 0


class Step(NamedTuple):
    """The parent's map or gather; its status is empty before it is opened."""

    status: str = ""
    remaining: int = 0
    decisions: int = 0


class Run(NamedTuple):
    """A process that runs a body, up to ``at``."""

    who: int
    fence: int
    at: str


class World(NamedTuple):
    """One state."""

    rows: tuple[Row, ...]
    step: Step
    #: Of each execution, whether the broker has a message; empty where that does not matter.
    messages: tuple[int, ...]
    runs: tuple[Run, ...]
    #: Open transactions: who ends how, or ``(0, "suspend")``. They hold the locks of what they have written.
    open: tuple[tuple[int, str, int], ...]
    #: Whether a run without the right to has written.
    is_broken: bool = False


class Move(NamedTuple):
    """What can come next."""

    is_fault: bool
    name: str
    world: World


def begin(design: Design) -> World:
    """A parent that is queued, and whose message is published."""
    is_counted = design.mutant == "nobody publishes again"
    return World((Row("Q"),), Step(), (1,) * (design.children + 1) if is_counted else (), (), ())


class Model:
    """The moves of a design."""

    def __init__(self, design: Design) -> None:
        self._design = design

    def _lacks(self, mutant: str) -> bool:
        assert mutant in MUTANTS
        return self._design.mutant == mutant

    def moves(self, world: World) -> Iterator[Move]:
        """Yield all that can happen next."""
        for move in self._moves(world):
            yield move._replace(world=self._forget_fenced(move.world))

    def _forget_fenced(self, world: World) -> World:
        if self._lacks("a run writes with any fence"):
            return world
        runs = tuple(run for run in world.runs if self._holds(world, run) or _is_committing(run))
        return world if len(runs) == len(world.runs) else world._replace(runs=runs)

    @staticmethod
    def _holds(world: World, run: Run) -> bool:
        row = world.rows[run.who]
        return row.status == "R" and row.fence == run.fence

    def _moves(self, world: World) -> Iterator[Move]:
        for who, row in enumerate(world.rows):
            yield from self._of_messages(world, who, row)
            yield from self._of_sweepers(world, who, row)
        for run in world.runs:
            yield Move(True, f"kill a run of {run.who}", _killed(world, run))
            yield from self._of_run(world, run)
        for transaction in world.open:
            yield from self._commit(world, transaction)

    # --- messages and sweepers

    def _of_messages(self, world: World, who: int, row: Row) -> Iterator[Move]:
        if self._lacks("nobody publishes again"):
            if not world.messages[who]:
                return
            taken = world._replace(messages=_put(world.messages, who, 0))
            yield Move(True, f"lose the message of {who}", taken)
        else:
            taken = world
        may_claim = (row.status == "Q" and not row.is_flagged) or self._lacks("a claim asks for no status")
        if may_claim and not _is_locked(world, who):
            claimed = row._replace(status="R", fence=row.fence + 1)
            yield Move(False, f"claim {who}", _with_row(taken, who, claimed, Run(who, claimed.fence, "begin")))

    def _of_sweepers(self, world: World, who: int, row: Row) -> Iterator[Move]:
        if _is_locked(world, who):
            return
        if row.status == "R":
            is_alive = any(run.who == who and run.fence == row.fence for run in world.runs)
            if row.attempt < MOST_ATTEMPTS or row.is_flagged or self._lacks("a crash is no attempt"):
                attempt = row.attempt + (not row.is_flagged and not self._lacks("a crash is no attempt"))
                lost = _with_row(world, who, row._replace(status="Q", attempt=attempt))
                yield Move(is_alive, f"lose {who}", _ring(lost, who))
            else:
                yield from self._end(world, who, "F", is_fault=is_alive)
        if row.is_flagged and row.status in "QHW":
            yield from self._end(world, who, "C")
        if who in self._design.cancels and row.status in OPEN and not row.is_flagged:
            yield Move(True, f"cancel {who}", _with_row(world, who, row._replace(is_flagged=True)))
        if who == 0 and self._design.may_rouse and (row.status, row.fence) == ("W", 1):
            yield Move(True, "rouse the parent", _ring(_with_row(world, 0, row._replace(status="Q")), 0))
        if who == 0 and self._design.has_timeout and world.step.status == "P" and not _is_step_locked(world):
            yield Move(False, "time out", world._replace(open=_added(world.open, (0, "T", 0))))

    # --- runs

    def _of_run(self, world: World, run: Run) -> Iterator[Move]:
        row = world.rows[run.who]
        holds = self._holds(world, run)
        if _is_committing(run):
            return  # in its transaction
        if run.at == "begin":
            yield Move(False, f"run {run.who}", _moved(world, run, self._after_begin(world, run)))
        elif _is_locked(world, run.who):
            return
        elif not holds and not (row.status == "R" and self._lacks("a run writes with any fence")):
            yield Move(False, f"a run of {run.who} is fenced", _ended(world, run))
        elif not holds:
            yield Move(False, f"a zombie of {run.who} writes", world._replace(is_broken=True))
        elif row.is_flagged and run.at != "end":
            yield from self._end(world, run.who, "C", run)
        elif run.at == "end" and run.who == 0:
            # What the step says is raised, or returned.
            yield from self._end(world, 0, "S" if world.step.status == "S" else "F", run)
        elif run.at == "end":
            yield from self._end(world, run.who, "S", run)
            yield from self._end(world, run.who, "F", run)
        elif run.at == "start":
            yield from self._start_child(world, run)
        elif run.at == "open":
            yield from self._open(world, run)
        elif run.at == "pending":
            suspending = world._replace(open=_added(world.open, (0, "suspend", run.fence)))
            yield Move(False, "begin to suspend", _moved(suspending, run, "suspending"))

    def _after_begin(self, world: World, run: Run) -> str:
        if run.who != 0:
            return "end"
        if self._design.is_gather and len(world.rows) <= self._design.children:
            return "start"
        return {"": "open", "P": "pending"}.get(world.step.status, "end")

    def _start_child(self, world: World, run: Run) -> Iterator[Move]:
        started = world._replace(rows=(*world.rows, Row("Q", member="P")))
        started = _ring(started, len(world.rows))
        yield Move(False, "start a child", _moved(started, run, "begin"))

    def _open(self, world: World, run: Run) -> Iterator[Move]:
        parent = world.rows[0]._replace(status="W")
        if not self._design.is_gather:
            limit = self._design.max_parallel or self._design.children
            children = [Row("Q" if number < limit else "H") for number in range(self._design.children)]
            opened = world._replace(rows=(parent, *children), step=Step("P", len(children)))
            for number in range(limit):
                opened = _ring(opened, number + 1)
            yield Move(False, "suspend on a map", _ended(opened, run))
            return
        if any(transaction[0] != 0 for transaction in world.open):
            return  # it locks the members
        members = [row.member for row in world.rows[1:]]
        pending = members.count("P")
        failed = next((member for member in members if member not in "PS"), "")
        remaining = len(members) if self._lacks("a gather counts members that have ended") else pending
        if (failed and self._design.fails_fast) or not remaining:
            decided = world._replace(step=Step(failed or "S", remaining, 1))
            yield Move(False, "gather what is decided", _moved(decided, run, "begin"))
        else:
            opened = world._replace(rows=_put(world.rows, 0, parent), step=Step("P", remaining))
            yield Move(False, "suspend on a gather", _ended(opened, run))

    # --- transactions in two moves

    def _end(
        self, world: World, who: int, how: str, run: Run | None = None, *, is_fault: bool = False
    ) -> Iterator[Move]:
        """Write the row; the step and the parent's row follow with the COMMIT."""
        if who and _is_step_locked(world):
            return  # it waits for the step's lock
        fence = run.fence if run is not None else 0
        ending = world._replace(open=_added(world.open, (who, how, fence)))
        if run is not None:
            ending = _moved(ending, run, "ending")
        yield Move(is_fault, f"end {who} as {how}", ending)

    def _commit(self, world: World, transaction: tuple[int, str, int]) -> Iterator[Move]:
        who, how, fence = transaction
        closed = world._replace(open=tuple(other for other in world.open if other != transaction))
        run = next((run for run in world.runs if (run.who, run.fence) == (who, fence) and _is_committing(run)), None)
        if how == "suspend":
            yield from self._commit_suspension(world, closed, run)
            return
        if how == "T":
            committed = self._decide(closed, "T", "a timeout does not wake the parent")
            rows = [
                row._replace(is_flagged=True) if row.status in OPEN and number else row
                for number, row in enumerate(committed.rows)
            ]
            if not _needs_parent(world, closed, self):
                yield Move(False, "commit the timeout", committed._replace(rows=tuple(rows)))
            return
        if who != 0 and _needs_parent(world, closed, self):
            return  # it waits for the parent's lock
        row = closed.rows[who]
        was_held = row.status == "H"
        ended = _with_row(closed, who, row._replace(status=how, ends=row.ends + 1, is_flagged=False))
        if who == 0:
            ended = self._flag_children(ended) if how == "C" else ended
        else:
            ended = self._settle(ended, who, how)
            ended = self._let_go(ended, was_held=was_held)
        yield Move(False, f"commit the end of {who}", ended if run is None else _ended(ended, run))

    def _commit_suspension(self, world: World, closed: World, run: Run | None) -> Iterator[Move]:
        if run is None:
            return
        if run.at == "looked":
            waiting = _with_row(closed, 0, closed.rows[0]._replace(status="W"))
            yield Move(False, "suspend", _ended(waiting, run))
        # In a new statement: what is committed now.
        elif closed.step.status == "P" or self._lacks("a suspension does not look again"):
            yield Move(False, "look at the step", _moved(world, run, "looked"))
        else:
            yield Move(False, "go on", _moved(closed, run, "begin"))

    def _flag_children(self, world: World) -> World:
        if self._lacks("a cancelled parent leaves its children alone"):
            return world
        rows = [row._replace(is_flagged=row.status in OPEN) for row in world.rows[1:]]
        return world._replace(rows=(world.rows[0], *rows))

    def _settle(self, world: World, who: int, how: str) -> World:
        """Hand a child's end to the parent's step."""
        row = world.rows[who]
        if row.member:
            if row.member != "P":
                return world
            world = _with_row(world, who, row._replace(member=how))
        step = world.step
        if not step.status or (step.status != "P" and not self._lacks("a decided step is decided again")):
            return world
        last = 2 if self._lacks("a map is decided one child too early") else 1
        counted = world._replace(step=step._replace(remaining=step.remaining - 1))
        if how != "S" and self._design.fails_fast:
            return self._decide(counted, how, "an end does not wake the parent")
        if step.remaining <= last:
            return self._decide(counted, "S", "an end does not wake the parent")
        return counted

    def _decide(self, world: World, how: str, unless: str) -> World:
        step = world.step
        if step.status != "P" and not self._lacks("a decided step is decided again"):
            return world
        world = world._replace(step=step._replace(status=how, decisions=step.decisions + 1))
        if self._lacks(unless) or world.rows[0].status != "W":
            return world
        return _ring(_with_row(world, 0, world.rows[0]._replace(status="Q")), 0)

    def _let_go(self, world: World, *, was_held: bool) -> World:
        if self._lacks("an ending child lets no sibling go"):
            return world
        if was_held and not self._lacks("a child that was held back lets a sibling go"):
            return world
        for who, row in enumerate(world.rows):
            if row.status == "H" and not row.is_flagged:
                return _ring(_with_row(world, who, row._replace(status="Q")), who)
        return world

    # --- what has to hold

    def wrong(self, world: World) -> str:
        """Say what must not be, or nothing."""
        parent, *children = world.rows
        step = world.step
        if world.is_broken:
            return "a zombie has written"
        if any(row.ends > 1 or (row.ends == 1) != (row.status in FINAL) for row in world.rows):
            return "an execution has ended twice"
        if step.decisions > 1:
            return "the step was decided twice"
        if parent.status == "W" and step.status != "P":
            return "a lost wake-up"
        if parent.status == "S" and any(row.status in OPEN for row in children):
            return "the parent has succeeded with an open child"
        if any(row.attempt > MOST_ATTEMPTS or row.fence > MOST_CLAIMS for row in world.rows):
            return "a body is run for ever"
        if parent.status == "C" and any(row.status in OPEN and not row.is_flagged for row in children):
            return "a child is open under a cancelled parent"
        limit = self._design.max_parallel
        if limit and sum(row.status in "QRW" for row in children) > limit:
            return "too many children in flight"
        return ""

    @staticmethod
    def is_done(world: World) -> bool:
        """Whether everything has ended."""
        return all(row.status in FINAL for row in world.rows)


def _needs_parent(world: World, closed: World, model: Model) -> bool:
    """Whether a transaction that decides a step has to wait for somebody who holds the parent's row."""
    if model._lacks("the wake-up has a condition on the status") and closed.rows[0].status != "W":
        return False
    return any(who == 0 and how != "T" for who, how, _ in world.open)


def _is_locked(world: World, who: int) -> bool:
    return any(other == who and how != "T" for other, how, _ in world.open)


def _is_step_locked(world: World) -> bool:
    return any(who != 0 or how == "T" for who, how, _ in world.open)


def _is_committing(run: Run) -> bool:
    return run.at in ("ending", "suspending", "looked")


def _put(items: tuple, number: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:number], item, *items[number + 1 :])


def _added(items: tuple, item: object) -> tuple:  # type: ignore[type-arg]
    return tuple(sorted((*items, item)))


def _with_row(world: World, who: int, row: Row, run: Run | None = None) -> World:
    runs = world.runs if run is None else _added(world.runs, run)
    return world._replace(rows=_put(world.rows, who, row), runs=runs)


def _ring(world: World, who: int) -> World:
    """Publish a message; that it may be lost is a move of its own."""
    return world._replace(messages=_put(world.messages, who, 1)) if world.messages else world


def _without(world: World, run: Run) -> tuple[Run, ...]:
    runs = list(world.runs)
    runs.remove(run)
    return tuple(runs)


def _ended(world: World, run: Run) -> World:
    return world._replace(runs=_without(world, run))


def _moved(world: World, run: Run, at: str) -> World:
    return world._replace(runs=_added(_without(world, run), run._replace(at=at)))


def _killed(world: World, run: Run) -> World:
    """A process dies, and its transaction with it."""
    open_ = world.open
    if _is_committing(run):
        open_ = tuple(item for item in open_ if not (item[0] == run.who and item[2] == run.fence))
    return _ended(world, run)._replace(open=open_)


class Finding(NamedTuple):
    """What a search has come to: how many states there are, and what is wrong, with the way there."""

    states: int
    wrong: str
    path: list[str]


def search(design: Design, *, limit: int = 1_000_000) -> Finding:
    """Go through all states of a design, the nearest first.

    Everything has to hold in each of them; and from each there has to be a way to an end on which nothing goes wrong.
    """
    model = Model(design)
    first = begin(design)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    before: dict[World, list[World]] = {}
    todo = deque([first])
    while todo:
        world = todo.popleft()
        wrong = model.wrong(world)
        if wrong or len(came_from) > limit:
            return Finding(len(came_from), wrong or "too many states", _path(came_from, world))
        for is_fault, name, then in model.moves(world):
            if not is_fault:
                before.setdefault(then, []).append(world)
            if then not in came_from:
                came_from[then] = (world, name)
                todo.append(then)
    good = {world for world in came_from if model.is_done(world)}
    todo.extend(good)
    while todo:
        for world in before.get(todo.popleft(), ()):
            if world not in good:
                good.add(world)
                todo.append(world)
    stuck = next((world for world in came_from if world not in good), None)
    return Finding(len(came_from), "stuck" if stuck else "", _path(came_from, stuck) if stuck else [])


def _path(came_from: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    names: list[str] = []
    link = came_from[world]
    while link is not None:
        world, name = link
        names.append(name)
        link = came_from[world]
    return names[::-1]
