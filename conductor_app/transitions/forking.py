"""A new root that begins with what another one has recorded. The only writer of ``Fork`` and ``CopiedOutcome``."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import Case, Count, F, OuterRef, Q, QuerySet, Subquery, When

from conductor_app.exceptions import ActionRefused
from conductor_app.models import CopiedOutcome, Execution, Fork, Step, database
from conductor_app.states import CHILD_KINDS, ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.statements import insert_selected
from conductor_app.transitions import creating, guards, kinds
from conductor_app.transitions.reopening import blocking_steps
from conductor_app.values.payloads import loads

#: So many steps are named to whoever has named none that there is.
_SHOWN_STEPS = 10


@dataclass(frozen=True)
class Plan:
    """What a fork keeps of its source, in the order in which the source has recorded it."""

    kept: list[Step]
    #: Recorded, and not kept: the body comes to them again, if it calls them then.
    again: list[Step]


#: What is read of a step for a plan.
_PLANNED = ("id", "execution_id", "name", "kind", "status", "task", "child_id", "fence", "total")


def plan(source: Execution, before: str) -> Plan:
    """Return what a fork would keep, as it stands now.

    Kept are the outcomes of the steps that were recorded before ``before``: steps get their ids when they are opened,
    by one run at a time, so their order is that of the ids. What a retry of the source would take up again is no
    outcome, and is not kept: the failure that ended it, and what only its cancellation has decided.

    Args:
        source: A root that has ended.
        before: Name of one of its steps.

    Raises:
        ActionRefused: It has recorded no such step, a child that it has started before still runs, or what one of them
            held is gone.
    """
    steps = Step.objects.using(database()).filter(execution_id=source.pk)
    recorded = list(steps.only(*_PLANNED).order_by("id"))
    place = next((number for number, step in enumerate(recorded) if step.name == before), None)
    if place is None:
        raise _no_such_step(source, before, [step.name for step in recorded])
    open_again = _taken_up_again(source, recorded[:place])
    kept = [step for step in recorded[:place] if step.pk not in open_again]
    for step in kept:
        if step.status == StepStatus.PENDING:
            raise ActionRefused(
                f'Step "{step.name}" of execution {source.pk} is undecided: a child that it has started still runs. '
                "Wait for its end, or cancel it.",
                reason="a child that it has started still runs",
            )
    _check_held(source, kept)
    return Plan(kept, [step for step in recorded[:place] if step.pk in open_again] + recorded[place:])


def _no_such_step(source: Execution, before: str, names: list[str]) -> ActionRefused:
    nearest = difflib.get_close_matches(before, names, n=1, cutoff=0.6)
    hint = f'Did you mean "{nearest[0]}"? ' if nearest else ""
    shown = ", ".join(names[:_SHOWN_STEPS]) + (" …" if len(names) > _SHOWN_STEPS else "")
    return ActionRefused(
        f'Execution {source.pk} has recorded no step "{before}". {hint}It has recorded: {shown or "nothing"}.',
        reason="no such step",
    )


def _taken_up_again(source: Execution, earlier: list[Step]) -> set[int]:
    """Return the keys of those steps that are no outcomes, since they were decided by the end of their execution."""
    found = {step.pk for step in blocking_steps(source) if step.finished_at is not None}
    # Nobody else decides these.
    found |= {step.pk for step in earlier if _was_ended(step)}
    names = {step.name for step in earlier if step.pk in found}
    gathers = [step.pk for step in earlier if kinds.of(step.kind).has_members]
    if names and gathers:
        rows = Step.objects.using(database()).filter(pk__in=gathers).values_list("pk", "result")
        found |= {key for key, members in rows if names.intersection(loads(members) or ())}
    return found


def _was_ended(step: Step) -> bool:
    return kinds.of(step.kind).ends_with_execution and step.status in (StepStatus.PENDING, StepStatus.CANCELLED)


def _check_held(source: Execution, kept: list[Step]) -> None:
    """Refuse if an outcome is gone that a child held: a replay of the source could not go on, either.

    Raises:
        ActionRefused: It is.
    """
    rows = Step.objects.using(database()).filter(execution_id=source.pk, pk__lte=max((s.pk for s in kept), default=0))
    no_result = Q(kind__in=sorted(CHILD_KINDS), status=StepStatus.SUCCEEDED, result=None, child__result=None)
    no_error = Q(status=StepStatus.FAILED, error=None, child__error=None)
    lost = set(rows.filter(no_result | no_error).values_list("pk", flat=True))
    maps = {step.name: step for step in kept if _has_rows(step) and step.status == StepStatus.SUCCEEDED}
    if maps:
        whole = _children(source).filter(step__in=maps).exclude(status=ExecutionStatus.SUCCEEDED, result=None)
        numbers = dict(whole.order_by().values_list("step").annotate(number=Count("pk")))
        lost |= {step.pk for name, step in maps.items() if numbers.get(name, 0) != step.total}
    for step in kept:
        if step.pk in lost:
            raise ActionRefused(
                f'The outcome of step "{step.name}" of execution {source.pk} is gone: the child that held it has been '
                "deleted or changed. Fork it before that step, or start a new execution.",
                reason="a child of it has been deleted",
            )


def _has_rows(step: Step) -> bool:
    return kinds.of(step.kind).has_children and not step.is_copied


def _children(source: Execution) -> QuerySet[Execution]:
    return Execution.objects.using(database()).filter(parent_id=source.pk, position__isnull=False)


def fork(
    source_id: uuid.UUID, before: str, new: Callable[[Execution], creating.NewExecution]
) -> tuple[Execution, bool]:
    """Store a root, queued, with copies of the steps that another one has recorded before ``before``.

    Args:
        source_id: That other one.
        before: Name of one of its steps.
        new: Returns the root, or refuses; it is called while the source is locked.

    Returns:
        The execution, and whether it is new: the same id or idempotency key gives the existing one.

    Raises:
        Execution.DoesNotExist: There is no source.
        ActionRefused: See ``plan``.
    """

    def work() -> tuple[Execution, bool]:
        with transaction.atomic(using=database()):
            # An operator's retry of the source writes this row last of all: it is either seen here, or waits until the
            # copies are committed. No step is locked, so the two never wait for each other.
            source = locked(Execution.objects.using(database()).filter(pk=source_id)).first()
            if source is None:
                raise Execution.DoesNotExist(f"There is no execution {source_id}. It has been pruned.")
            about = new(source)
            known = creating.find_existing(about)
            if known is not None:
                return known, False
            planned = plan(source, before)
            execution, is_new = creating.create(about)
            if is_new:
                Fork.objects.using(database()).create(execution=execution, forked_from=source, before=before)
                _copy(source, execution, planned)
        return execution, is_new

    return guards.persist_briefly(work)


def _copy(source: Execution, execution: Execution, planned: Plan) -> None:
    """Copy steps with all that a replay needs of them; none of it leaves the database."""
    using, kept = database(), planned.kept
    if not kept:
        return
    rows = Step.objects.using(using).filter(execution_id=source.pk, pk__lte=kept[-1].pk)
    if left_out := [step.pk for step in planned.again if step.pk < kept[-1].pk]:
        rows = rows.exclude(pk__in=left_out)
    of_child = Q(kind__in=sorted(CHILD_KINDS), status=StepStatus.SUCCEEDED, result__isnull=True)
    of_failed_child = Q(status=StepStatus.FAILED, error__isnull=True)
    as_they_are = ("name", "kind", "status", "task", "payload_digest", "child_id", "total", "remaining", "counted")
    options = ("max_parallel", "fails_fast", "max_failures", "failures", "timeout_seconds", "on_timeout")
    insert_selected(
        Step,
        rows.order_by("pk"),
        {
            **{name: F(name) for name in (*as_they_are, *options)},
            "execution_id": execution.pk,
            "result": Case(When(of_child, then=F("child__result")), default=F("result")),
            "error": Case(When(of_failed_child, then=F("child__error")), default=F("error")),
            # Of no run and of no attempt: nothing that they have woken, and nothing that a retry takes up.
            "fence": 0,
            "attempt": 0,
            "created_at": clock.now(),
            "finished_at": clock.now(),
        },
    )
    many = [step for step in kept if kinds.of(step.kind).has_children]
    if not many:
        return
    mine = Step.objects.using(using).filter(execution_id=execution.pk)
    copied = CopiedOutcome.objects.using(using)
    if names := [step.name for step in many if not step.is_copied]:
        _copy_outcomes(_children(source).filter(step__in=names), "pk", mine.filter(name=OuterRef("step")))
    if names := [step.name for step in many if step.is_copied]:
        of_source = copied.filter(step__execution_id=source.pk, step__name__in=names)
        _copy_outcomes(of_source, "child_id", mine.filter(name=OuterRef("step__name")))


def _copy_outcomes(children: QuerySet[Any], key: str, step: QuerySet[Step]) -> None:
    values: dict[str, Any] = {name: F(name) for name in ("position", "status", "result", "error")}
    new_step = Subquery(step.values("pk")[:1])
    insert_selected(CopiedOutcome, children.order_by("position"), {"step_id": new_step, "child_id": F(key), **values})
