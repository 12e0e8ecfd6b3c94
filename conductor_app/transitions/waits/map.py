"""``ctx.map``: one child for each payload, and one step that counts those that have not ended."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import BooleanField, Case, DateTimeField, DurationField, F, OuterRef, Q, QuerySet, Value, When
from django.utils.translation import gettext as _

from conductor_app import signals
from conductor_app.exceptions import RetryRefused
from conductor_app.models import Execution, Step, database
from conductor_app.states import OPEN_STATUSES, ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.moves import Insert, Move
from conductor_app.store.slots import NOW, Each, Found, each, given
from conductor_app.transitions import (
    cancelling,
    claiming,
    creating,
    dispatch,
    guards,
    parts,
    reopening,
    running,
    steps,
    waking,
)
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ManyKind, deleted_error, late_words, when_all_have_ended
from conductor_app.transitions.waits.wait import Wait
from conductor_app.values.payloads import dump_options, dumps, loads

#: Payloads of a map's children that one statement stores, in bytes; more are stored in batches.
_ONE_STATEMENT_BYTES = 16_777_216


@dataclass(frozen=True)
class Map(Wait):
    """Children of one task that do not exist yet, one for each payload."""

    task: str
    children: Sequence[creating.NewExecution]
    payload_digest: str
    timeout: float | None
    on_timeout: OnTimeout
    max_parallel: int | None
    fails_fast: bool
    max_failures: int | None = None

    kind = StepKind.MAP

    @property
    def opens_first(self) -> bool:
        """Whether there is nothing to wait for."""
        return not self.children

    @property
    def is_one_move(self) -> bool:
        """Whether there are children to store."""
        return bool(self.children)

    @property
    def has_keys(self) -> bool:
        """Whether its children have some."""
        return any(child.unique is not None for child in self.children)

    def suspend(self, execution: Execution, hand_off: claiming.HandOff | None, *, is_alone: bool) -> None:
        """Store the children."""
        _store_children(execution, self)

    def is_there(self, execution: Execution) -> bool:
        """Record a map of no children."""
        running.lock_held(execution)
        steps.insert(
            execution,
            self.step,
            StepKind.MAP,
            status=StepStatus.SUCCEEDED,
            task=self.task,
            payload_digest=self.payload_digest,
            total=0,
            remaining=0,
            max_parallel=self.max_parallel,
            fails_fast=self.fails_fast,
            max_failures=self.max_failures,
            timeout_seconds=self.timeout,
            on_timeout=self.on_timeout,
            finished_at=clock.now(),
        )
        return True

    @property
    def due_in(self) -> float | None:
        """Its timeout."""
        return self.timeout or None

    @property
    def detail(self) -> str:
        """How many children there are, and their task."""
        return f" ({len(self.children)} of {self.task})"


#: All are created at one instant, in however many statements.
_INSTANT = Found("waiting", "instant", DateTimeField())


def _suspend(timing: dict[str, Any]) -> Move:
    """Return the move of a run that stores a map's children, and the step that the last of them will settle."""
    own = {name: each(Execution, name) for name in (*creating.OWN, "position")}
    step = {
        **parts.OPENED,
        "kind": StepKind.MAP,
        "task": given(Step, "task"),
        "total": given(Step, "total"),
        "remaining": given(Step, "total"),
        "max_parallel": given(Step, "max_parallel"),
        "fails_fast": given(Step, "fails_fast"),
        "max_failures": given(Step, "max_failures"),
    }
    return Move(
        dataclasses.replace(parts.WAIT, returning=[("instant", NOW)]),
        parts.RUN_SUSPENDED,
        Insert("children", Execution, {**creating.CHILD, **own, **timing, "created_at": _INSTANT}, rows="children"),
        Insert("opened", Step, step),
    )


_is_due = Each("is_due", BooleanField())
#: A child that the map holds back is not due, and not to be published.
_DUE = {
    "status": ExecutionStatus.QUEUED,
    "due_at": Case(When(_is_due, then=_INSTANT)),
    "dispatch_at": Case(When(_is_due, then=parts.dispatch_at(Each("dispatch_in", DurationField())))),
}
_SUSPEND = {"due": _suspend(_DUE), "timed": _suspend(creating.timed(Each))}


def _store_children(execution: Execution, wait: Map) -> None:
    in_flight = _in_flight(wait)
    news = _children_of(wait)
    children = [
        creating.timeless_row(new, execution, wait.step, position=position) for position, new in enumerate(news)
    ]
    has_times = any(creating.has_times(new) for new in news)
    rows = []
    for position, (new, child) in enumerate(zip(news, children, strict=True)):
        is_held = position >= in_flight
        first = dispatch.first_publication(execution.root_id, position)
        rows.append(
            {
                **{name: getattr(child, name) for name in (*creating.OWN, "position")},
                **(creating.times(new, is_held=is_held) if has_times else {"is_due": not is_held}),
                "dispatch_in": clock.interval(first.seconds),
            }
        )
    stored = _SUSPEND["timed" if has_times else "due"].make(
        database(),
        at_once=sum(len(new.payload) for new in news) <= _ONE_STATEMENT_BYTES,
        children=rows,
        root_id=execution.root_id,
        depth=execution.depth + 1,
        task=wait.task,
        total=len(children),
        max_parallel=wait.max_parallel,
        fails_fast=wait.fails_fast,
        max_failures=wait.max_failures,
        **parts.opened(execution, wait.step, wait.payload_digest, wait.timeout, wait.on_timeout),
        **parts.published(dispatch.first_publication(execution.root_id)),
    )
    if not stored:
        raise guards.refusal_of_children(execution)
    for position, child in enumerate(children):
        child.created_at = stored[0][0]
        child.due_at = None if has_times or position >= in_flight else child.created_at
    dispatch.on_commit(*[child for child, new in zip(children[:in_flight], news, strict=False) if creating.is_due(new)])
    for child in children:
        guards.send_signal(signals.execution_created, child)


def _in_flight(wait: Map) -> int:
    return len(wait.children) if wait.max_parallel is None else min(wait.max_parallel, len(wait.children))


def _children_of(wait: Map) -> Sequence[creating.NewExecution]:
    is_throttled = _in_flight(wait) < len(wait.children)
    return [_throttled(child) for child in wait.children] if is_throttled else wait.children


def _throttled(child: creating.NewExecution) -> creating.NewExecution:
    """Return the child with the mark that its end lets a sibling go."""
    options = dict(loads(child.options) or {})
    return dataclasses.replace(child, options=dump_options({**options, "throttled": True}))


class MapKind(ManyKind):
    """A map."""

    has_children = True
    when_child_succeeds = {
        "finished_at": Case(When(remaining__lte=1, then=NOW), default=None, output_field=DateTimeField()),
        "status": Case(
            When(remaining__lte=1, then=Value(StepStatus.SUCCEEDED.value)), default=Value(StepStatus.PENDING.value)
        ),
        # Last: MySQL assigns from left to right.
        "remaining": F("remaining") - 1,
    }

    def child_ended(self, child: Execution, status: StepStatus, *, error: str | None) -> None:
        """Count a child as ended; let a sibling go, or cancel those that need not start any more."""
        assert child.parent_id is not None
        _settle_map(child, child.parent_id, status, error=error)

    def decided(self, step: Step, *, by: str | None) -> None:
        """Cancel the children that need not start any more, if that was not known before the step was locked."""
        del by
        if step.max_failures is not None and step.status != StepStatus.SUCCEEDED:
            waking.cancel_unstarted(steps.children_of(step.execution_id, step.name), _TOO_MANY_FAILED, skip=True)

    def cancel_late(self, step: Step) -> None:
        """Cancel the children that no run has started, and ask the others to stop."""
        reason = steps.late_reason(step)
        children = steps.children_of(step.execution_id, step.name)
        waking.cancel_unstarted(children, reason)
        cancelling.flag_all(children, reason)

    def note_late(self, step: Step) -> None:
        """Freeze which children of a map that has just timed out are late; call it while the step's row is locked.

        A child that has ended and is not committed yet is late too: it has still to count the map down, and will be
        told that it is decided.
        """
        children = steps.children_of(step.execution_id, step.name)
        positions = list(children.open().order_by("position").values_list("position", flat=True))
        Step.objects.using(database()).filter(pk=step.pk).update(result=dumps(positions, "positions"))

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Reopen the children that have no result, and wait for them."""
        return Next.WAIT if (yield _reopen_map(step)) else Next.ANYTHING

    def in_flight(self) -> QuerySet[Any] | None:
        """Return its children that go on. One that it holds back does not: those that end let it go."""
        is_open = Q(status__in=sorted(OPEN_STATUSES))
        return Execution.objects.using(database()).filter(
            is_open,
            ~Q(status=ExecutionStatus.QUEUED) | Q(due_at__isnull=False),
            parent=OuterRef("execution_id"),
            step=OuterRef("name"),
            position__isnull=False,
        )

    def recount(self, step: Step) -> None:
        """Count its children again: decide it, or let some go that it holds back itself."""
        children = steps.children_of(step.execution_id, step.name)
        remaining = children.open().count()
        if not remaining and step.total is not None and children.count() < step.total:
            waking.settle(step.execution_id, step.name, StepStatus.CANCELLED, error=deleted_error())
            return
        if not remaining:
            # Which of them failed, the next run sees when it reads them.
            waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)
            return
        Step.objects.using(database()).filter(pk=step.pk, status=StepStatus.PENDING).update(remaining=remaining)
        _release_held(children, step.max_parallel)

    def words(self, step: Step) -> Words:
        """Return what is said of a map."""
        is_counted = step.remaining is not None and step.total is not None
        waits = _('Waiting for %(children)s (step "%(step)s") since %(time)s ago. No worker is held.')
        what = _("%(children)s.")
        if step.max_parallel is not None:
            waits = _(
                'Waiting for %(children)s (step "%(step)s", at most %(limit)s at once) since %(time)s ago. '
                "No worker is held."
            )
            what = _("%(children)s, at most %(limit)s at once.")
        then = [_("It resumes %(condition)s.") % {"condition": when_all_have_ended(step)}]
        if step.max_failures is not None:
            then.append(_("If more of them fail than it lets pass, ChildFailed is raised here."))
        elif step.fails_fast:
            then.append(_("If one fails, ChildFailed is raised here, and the others are cancelled."))
        return Words(
            begun=_('step "%(step)s": %(total)s %(task)s queued, waits for them; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=waits,
            resumes=when_all_have_ended(step),
            what=what,
            then=tuple(then),
            at_deadline=late_words(step),
            children=_("%(left)s of %(total)s %(task)s") if is_counted else _("the %(task)s"),
        )


KIND = MapKind()

#: Why children of a map are cancelled that has let some failures pass.
_TOO_MANY_FAILED = "too many of its siblings have failed"


def _settle_map(child: Execution, parent_id: uuid.UUID, status: StepStatus, *, error: str | None) -> None:
    # Children before steps: the sibling that is let go, or those that are cancelled, may be changing just now, and
    # whoever changes one of them then asks for the step.
    counted = steps.of(parent_id, child.step)
    if status != StepStatus.SUCCEEDED and counted.filter(steps.TOO_MANY, status=StepStatus.PENDING).exists():
        with transaction.atomic(using=database()):
            waking.cancel_unstarted(steps.children_of(parent_id, child.step), f"its sibling {_name(child)} {status}")
            if not waking.count_down(counted, status, child_id=child.pk, error=error, root_id=child.root_id):
                # The map was decided by something else just before, which is to say what becomes of its children.
                transaction.set_rollback(True, using=database())
        return
    if child.get_options().get("throttled") and not _is_held(child):
        _release_sibling(child)
    waking.count_down(counted, status, child_id=child.pk, error=error, root_id=child.root_id)


def _is_held(child: Execution) -> bool:
    """Tell whether a child that is ending had never been let go; a running one had."""
    return child.status == ExecutionStatus.QUEUED and child.due_at is None


def _release_held(children: QuerySet[Execution], count: int | None) -> None:
    """held → queued, for so many children of a map of which none is in flight; the audit's repair.

    Past rows that others have locked: a transition that ends one of them lets another go.
    """
    for execution in list(locked(_held(children), skip=True)[:count]):
        _release(execution)


def _held(children: QuerySet[Execution]) -> QuerySet[Execution]:
    held = children.filter(status=ExecutionStatus.QUEUED, due_at__isnull=True, cancel_requested_at__isnull=True)
    return held.order_by("position")


def _release_sibling(child: Execution) -> None:
    """held → queued: a place in the map is free."""
    held = _held(Execution.objects.using(database()).filter(parent_id=child.parent_id, step=child.step))
    # Past those that other ending siblings are just letting go; then wait for these, lest one of them gives up.
    found = locked(held, skip=True).first() or locked(held).first()
    if found is not None:
        _release(found)


def _release(execution: Execution) -> None:
    """held → queued, for a row that is locked or that nobody else can change."""
    Execution.objects.using(database()).filter(
        pk=execution.pk, status=ExecutionStatus.QUEUED, due_at__isnull=True
    ).update(**guards.queue_now(execution))
    dispatch.on_commit(execution)


def _name(child: Execution) -> str:
    return f"{child.step}[{child.position}]"


def _reopen_map(step: Step) -> Walk:
    """Reopen the children of a map that have no result; tell whether there is something to wait for.

    There may be thousands, so those with nothing below them take some statements in all, and not some each.
    """
    children = steps.children_of(step.execution_id, step.name)
    if children.count() != step.total:
        raise RetryRefused(
            f"A child of step {step.name!r} of execution {step.execution_id} has been deleted, and its outcome with "
            "it. Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    without_success = list(children.exclude(status=ExecutionStatus.SUCCEEDED).order_by("position"))
    for child in without_success:
        if child.has_kept_result:
            yield reopening.reopen_one(child)
    undone = [child for child in without_success if not child.has_kept_result]
    in_flight = sum(not child.is_final and child.due_at is not None for child in undone)
    ended_on_steps = reopening.ended_on_steps(children)
    queued: list[Execution] = []
    held: list[Execution] = []
    for child in undone:
        is_held = child.is_final and step.max_parallel is not None and in_flight >= step.max_parallel
        in_flight += child.is_final and not is_held
        if child.pk in ended_on_steps:
            yield reopening.let_go_on(child, is_held=is_held)
        elif child.is_final:
            (held if is_held else queued).append(child)
    reopening.withdraw_cancel(*[child.pk for child in undone if not child.is_final])
    reopening.queue_anew(queued)
    reopening.change_all(held, due_at=None, **parts.NOT_QUEUED)
    if undone:
        steps.reopen(step, remaining=len(undone))
    else:
        steps.adopt(step, result=None, child_id=None)
    return bool(undone)
