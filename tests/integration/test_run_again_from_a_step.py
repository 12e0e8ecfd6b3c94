"""``api.fork``: a new root that remembers what another one had recorded before a step."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction
from django.db.models import Q

from conductor_app import ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, api, transitions
from conductor_app.engine import acting, pruner
from conductor_app.exceptions import (
    ActionRefused,
    ChildCancelled,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    StepMismatch,
    UnknownTask,
)
from conductor_app.models import CopiedOutcome, Event, Execution, Fork, Operation, OperationItem, Step
from conductor_app.states import ExecutionStatus, OperationKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import forking
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support.bodies import advance, child, durable, failure, go_on, redeploy, reload, run, start
from tests.support.executions import claimed, queued

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    bodies = {task: task.run for task in (caught, everything_short)}
    yield
    clock.reset()
    for task, body in bodies.items():
        redeploy(task, body)


@durable(max_retries=0)
def declines(ctx: ExecutionContext, number: int = 0) -> int:
    note(None, "declines")
    if number % 2 == 0:
        raise ValueError(f"card {number} declined")
    return number


@durable
def sleepy(ctx: ExecutionContext) -> None:
    ctx.sleep("long", 3_600)


def _outcome(call: Any) -> list[Any]:
    """Return what a call of a body gives it: a value, or all that it can see of an error."""
    try:
        return ["value", call()]
    except (ChildFailed, ChildTimedOut, ChildCancelled, EventTimedOut, ValueError) as error:
        return [type(error).__name__, str(error), error.__dict__ and sorted(map(str, error.__dict__.values()))]


def _refuse() -> None:
    note(None, "refuse")
    raise ValueError("no")


def _shown(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        return [type(outcome).__name__, str(outcome), str(outcome.child_id)]  # type: ignore[attr-defined]
    return outcome


@durable
def everything(ctx: ExecutionContext, name: str = "a") -> list[Any]:
    """Records a step of each kind, with each kind of outcome, and tells what it has seen of them."""
    note(None, "body")
    seen: list[Any] = []

    def see(what: str, call: Any) -> None:
        seen.append([what, _outcome(call)])

    see("step", lambda: ctx.step("step", lambda: note(None, "step") or {"at": [1, None]}))
    see("none", lambda: ctx.step("none", note, None, "none"))
    see("refused", lambda: ctx.step("refused", _refuse))
    see("atomic", lambda: ctx.atomic_step("atomic", lambda: note(None, "atomic") or 7))
    see("invoke", lambda: ctx.invoke("invoke", scenarios.echo, {"value": "child"}))
    see("nothing", lambda: ctx.invoke("nothing", scenarios.echo, {"value": None}))
    see("declined", lambda: ctx.invoke("declined", declines, {"number": 2}))
    see("late", lambda: ctx.invoke("late", sleepy, timeout=10))
    see("left", lambda: ctx.invoke("left", sleepy, timeout=10, on_timeout="abandon"))
    see("sleep", lambda: ctx.sleep("sleep", 5))
    see("event", lambda: ctx.wait_for("event", "approved"))
    see("no-event", lambda: ctx.wait_for("no-event", "denied", timeout=0))
    see("map", lambda: ctx.map("map", scenarios.echo, [{"value": n} for n in range(5)]))
    see("empty", lambda: ctx.map("empty", scenarios.echo, []))
    see("failing-map", lambda: ctx.map("failing-map", declines, [{"number": n} for n in range(3)]))
    see(
        "mixed-map",
        lambda: [
            _shown(one)
            for one in ctx.map("mixed-map", declines, [{"number": n} for n in range(4)], return_exceptions=True)
        ],
    )
    see(
        "late-map",
        lambda: [_shown(one) for one in ctx.map("late-map", sleepy, [None, None], timeout=10, return_exceptions=True)],
    )
    handles = [ctx.start(f"start-{n}", declines, {"number": n}) for n in (1, 2, 3)]
    see("gather", lambda: ctx.gather(*handles))
    see("all", lambda: [_shown(one) for one in ctx.gather(*handles, return_exceptions=True)])
    one = ctx.start("one", scenarios.echo, {"value": 1})
    see("gather-one", lambda: ctx.gather(one))
    note(None, "replays" if ctx.is_replaying else "goes on")
    ctx.step("cut", note, None, f"cut {name}")
    ctx.invoke("after", scenarios.echo, {"value": "after"})
    return [seen, str(ctx.idempotency_key("cut"))]


def whole() -> Execution:
    """An execution of ``everything`` that has ended."""
    source = start(everything)
    api.send_event(source, "approved", {"by": "ana"})
    for _ in range(10):
        advance(10)
    source = reload(source)
    assert source.status == ExecutionStatus.SUCCEEDED, failure(source)
    return source


def prune(*roots: Execution) -> None:
    """Prune trees that have ended."""
    keys = [root.pk for root in roots]
    # What was abandoned goes on.
    for row in Execution.objects.filter(root_id__in=keys).open():
        api.cancel(row)
    Execution.objects.filter(pk__in=keys).update(finished_at=clock.after(-3_600))
    pruner.prune(dt.timedelta(minutes=30))
    assert not Execution.objects.filter(root_id__in=keys).exists()


def ended(execution: Execution) -> Execution:
    """Run what is due, and return an execution that has succeeded."""
    go_on()
    execution = reload(execution)
    assert execution.status == ExecutionStatus.SUCCEEDED, (execution.status, execution.error_message)
    return execution


NOT_REPEATED = ("step", "none", "refused", "atomic", "declines")


def test_a_fork_sees_what_its_source_has_seen_and_runs_the_rest_again() -> None:
    source = whole()
    before = {name: count(name) for name in NOT_REPEATED}
    fork = api.fork(source, before="cut")
    assert fork.pk != source.pk
    assert (fork.parent_id, fork.root_id, fork.status) == (None, fork.pk, ExecutionStatus.QUEUED)
    assert (fork.task, fork.payload, fork.queue) == (source.task, source.payload, source.queue)
    kept = list(Step.objects.filter(execution=source).order_by("id").values_list("name", "kind", "status"))
    cut = [name for name, _kind, _status in kept].index("cut")
    assert list(Step.objects.filter(execution=fork).order_by("id").values_list("name", "kind", "status")) == kept[:cut]
    fork = ended(fork)
    (seen, key), (theirs, theirs_key) = fork.get_result(), source.get_result()
    assert seen == theirs
    assert count("goes on") == 2
    assert key != theirs_key
    assert {name: count(name) for name in NOT_REPEATED} == before
    assert count("cut a") == 2
    assert child(fork, "after").pk != child(source, "after").pk
    assert list(Execution.objects.filter(parent=fork).values_list("step", flat=True)) == ["after"]
    assert fork.fence == 2  # one wait, for "after": nothing else is waited for


def test_a_fork_needs_nothing_of_its_source() -> None:
    source = whole()
    theirs = source.get_result()[0]
    fork = api.fork(source, before="cut")
    prune(source)
    fork = ended(fork)
    assert fork.get_result()[0] == theirs
    again = api.fork(fork, before="cut")
    prune(fork)
    assert not Fork.objects.filter(pk=fork.pk).exists()
    again = ended(again)
    assert again.get_result()[0] == theirs
    third = api.fork(again, before="after")
    prune(again)
    assert ended(third).get_result()[0] == theirs
    prune(third)
    assert not CopiedOutcome.objects.exists()
    assert not Step.objects.exists()


def test_a_fork_says_where_it_comes_from() -> None:
    source = run(everything_short)
    fork = api.fork(source.pk, "second", actor="ana", reason="stock is back")
    assert (fork.fork.forked_from_id, fork.fork.before) == (source.pk, "second")
    assert [row.pk for row in source.forks.all()] == [fork.pk]
    item = OperationItem.objects.get(created=fork)
    assert (item.execution_id, item.operation.kind, item.operation.actor, item.operation.reason) == (
        source.pk,
        OperationKind.FORK,
        "ana",
        "stock is back",
    )


@durable
def everything_short(ctx: ExecutionContext, order: int = 1) -> list[Any]:
    first = ctx.step("first", lambda: note(None, "first") or order)
    second = ctx.invoke("second", scenarios.echo, {"value": [order, first]})
    return [order, first, second, ctx.step("third", lambda: note(None, "third") or "third")]


def test_a_fork_before_the_first_step_keeps_none() -> None:
    source = run(everything_short)
    fork = api.fork(source, "first")
    assert not Step.objects.filter(execution=fork).exists()
    assert ended(fork).get_result() == source.get_result()
    assert count("first") == 2


def test_another_payload_is_that_of_what_runs_again() -> None:
    source = run(everything_short)
    fork = ended(api.fork(source, "second", {"order": 2}))
    assert fork.kwargs == {"order": 2}
    assert fork.get_result() == [2, 1, [2, 1], "third"]
    positional = ended(api.fork(source, "third", 3))
    assert positional.args == [3]
    assert positional.get_result() == [3, 1, [1, 1], "third"]


def test_a_payload_is_checked_as_a_call_checks_it() -> None:
    source = run(everything_short)
    with pytest.raises(InvalidArgumentType, match=r"payload of .* does not fit .*oder"):
        api.fork(source, "second", {"oder": 2})
    with pytest.raises(UnknownTask):
        gone = run(everything_short)
        Execution.objects.filter(pk=gone.pk).update(task="tests.bodies.gone")
        api.fork(gone, "second", {"order": 2})
    assert not Fork.objects.exists()
    assert not Operation.objects.exists()
    # Without one nobody has to know the task here.
    assert api.fork(gone, "second").task == "tests.bodies.gone"


def test_what_is_impossible_is_refused_and_nothing_is_stored() -> None:
    source = run(everything_short)
    with pytest.raises(ActionRefused, match=r'no step "secnod". Did you mean "second"') as refused:
        api.fork(source, "secnod")
    assert refused.value.reason == "no such step"
    with pytest.raises(ActionRefused, match=rf"is a child: .* Fork the root {source.pk} instead"):
        api.fork(child(source, "second"), "first")
    with pytest.raises(ActionRefused, match=r"is queued. Only one that has ended"):
        api.fork(queued(), "first")
    with pytest.raises(InvalidArgumentType, match="before must be str, the name of a step, got int"):
        api.fork(source, 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="before must be the name of a step, got an empty text"):
        api.fork(source, "")
    with pytest.raises(Execution.DoesNotExist):
        api.fork(uuid.uuid4(), "first")
    assert not Fork.objects.exists()
    assert not Operation.objects.exists()


def test_a_key_makes_one_fork() -> None:
    source, other = run(everything_short), run(everything_short)
    first = api.fork(source, "second", idempotency_key="ticket-1")
    assert api.fork(source, "second", idempotency_key="ticket-1").pk == first.pk
    assert first.idempotency_key == "ticket-1"
    for another in (
        lambda: api.fork(source, "third", idempotency_key="ticket-1"),
        lambda: api.fork(source, "second", {"order": 2}, idempotency_key="ticket-1"),
        lambda: api.fork(other, "second", idempotency_key="ticket-1"),
    ):
        with pytest.raises(IdempotencyConflict, match=f"belongs to execution {first.pk}"):
            another()
    assert api.rerun(other, idempotency_key="ticket-2")
    with pytest.raises(IdempotencyConflict):
        api.fork(other, "second", idempotency_key="ticket-2")
    # It may have ended, and its source be pruned.
    ended(first)
    prune(source)
    with pytest.raises(Execution.DoesNotExist):
        api.fork(source, "second", idempotency_key="ticket-1")


def test_tags_and_options_are_kept_and_keys_and_callbacks_are_not() -> None:
    result = everything_short.apply_async(
        kwargs={"order": 4},
        idempotency_key="order-4",
        queue="slow",
        priority=3,
        expires=60,
        headers={"tenant": "acme"},
        link=scenarios.echo.s(),
        tags={"order": "4"},
    )
    go_on()
    api.tag(result, {"desk": "returns"})
    source = reload(result)
    fork = api.fork(source, "third", {"order": 5})
    assert (fork.queue, fork.priority, fork.max_attempts) == ("slow", 3, source.max_attempts)
    assert fork.idempotency_key is None
    assert fork.deadline_at is None
    assert "link" not in fork.get_options()
    assert fork.get_options()["headers"]["tenant"] == "acme"
    assert api.get_tags(fork) == {"order": "4", "desk": "returns"}


def test_a_fork_joins_the_transaction() -> None:
    source = run(everything_short)
    with transaction.atomic():
        api.fork(source, "second")
        transaction.set_rollback(True)
    assert not Fork.objects.exists()
    assert Step.objects.filter(fence=0).count() == 0


# ------------------------------------------------------------------------------------------------ what is an outcome


@durable(max_retries=0)
def caught(ctx: ExecutionContext) -> str:
    try:
        ctx.invoke("charge", declines)
    except ChildFailed as error:
        if ctx.step("flag", lambda: count("repaired")):
            return f"caught {error}"
        raise RuntimeError("not repaired") from None
    return "paid"


def test_an_operators_retry_of_a_fork_leaves_the_children_of_its_source_alone() -> None:
    source = run(caught)
    assert source.status == ExecutionStatus.FAILED
    fork = start_again(source, "flag")
    assert fork.status == ExecutionStatus.FAILED
    # The code of today catches nothing.
    uncaught = api.fork(source, "flag")
    redeploy(caught, lambda ctx: ctx.invoke("charge", declines))
    go_on()
    assert failure(uncaught).step == "charge"
    theirs = child(source, "charge")
    number = count("declines")
    api.retry(uncaught)
    assert reload(theirs).status == ExecutionStatus.FAILED
    assert reload(uncaught).status == ExecutionStatus.QUEUED
    go_on()
    assert failure(uncaught).message == "Child execution failed: card 0 declined"
    assert count("declines") == number


def start_again(source: Execution, before: str) -> Execution:
    fork = api.fork(source, before)
    go_on()
    return reload(fork)


@durable(max_retries=0)
def together(ctx: ExecutionContext) -> list[Any]:
    handles = [ctx.start(f"ask-{n}", declines, {"number": n}) for n in (1, 2, 3)]
    ctx.step("note", note, None, "note")
    return ctx.gather(*handles)


def test_what_failed_the_source_runs_again_wherever_it_was_recorded() -> None:
    source = run(together)
    assert source.status == ExecutionStatus.FAILED
    planned = forking.plan(source, "note")
    # The third one was cancelled for the second one's sake.
    assert [step.name for step in planned.kept] == ["ask-1"]
    assert [step.name for step in planned.again] == ["ask-2", "ask-3", "note", "gather(ask-1,ask-2,ask-3)"]
    fork = start_again(source, "note")
    assert sorted(Execution.objects.filter(parent=fork).values_list("step", flat=True)) == ["ask-2", "ask-3"]
    assert failure(fork).step == "ask-2"
    # What ran again is the fork's own, and an operator's retry takes it up.
    api.retry(fork)
    assert reload(child(fork, "ask-2")).status == ExecutionStatus.QUEUED


def test_the_gather_may_be_what_runs_again() -> None:
    source = run(everything_with_gather)
    fork = ended(api.fork(source, "gather(a,b)"))
    assert fork.get_result() == source.get_result()
    assert not Execution.objects.filter(parent=fork).exists()


@durable
def everything_with_gather(ctx: ExecutionContext) -> list[Any]:
    handles = [ctx.start(name, scenarios.echo, {"value": name}) for name in ("a", "b")]
    return ctx.gather(*handles)


@durable
def leaves_a_child(ctx: ExecutionContext) -> str:
    ctx.start("beside", sleepy)
    return ctx.step("last", str, "done")


def test_a_child_that_still_runs_is_waited_for_first() -> None:
    source = start(leaves_a_child)
    assert source.status == ExecutionStatus.SUCCEEDED
    with pytest.raises(ActionRefused, match=r'Step "beside" .* is undecided') as refused:
        api.fork(source, "last")
    assert refused.value.reason == "a child that it has started still runs"
    assert start_again(source, "beside").status == ExecutionStatus.SUCCEEDED  # that one is started anew
    api.cancel(child(source, "beside"))
    assert start_again(source, "last").status == ExecutionStatus.SUCCEEDED


@durable
def waits_and_goes_on(ctx: ExecutionContext) -> list[Any]:
    one = ctx.start("one", scenarios.echo, {"value": 1})
    two = ctx.start("two", sleepy)
    return [*ctx.gather(one), ctx.step("between", str, "between"), *ctx.gather(two)]


def test_what_only_a_cancellation_has_decided_runs_again() -> None:
    source = start(waits_and_goes_on)
    api.cancel(source)
    source = reload(source)
    assert child(source, "two").status == ExecutionStatus.CANCELLED
    planned = forking.plan(source, "between")
    assert [step.name for step in planned.kept] == ["one", "gather(one)"]
    fork = start_again(source, "between")
    assert list(Execution.objects.filter(parent=fork).values_list("step", flat=True)) == ["two"]
    assert fork.status == ExecutionStatus.WAITING


def test_an_awaited_event_that_never_came_is_awaited_again() -> None:
    source = start(everything)
    for _ in range(4):
        advance(10)
    api.cancel(source)
    assert Step.objects.get(execution=source, name="event").status == StepStatus.CANCELLED
    fork = api.fork(source, "event")
    assert not Event.objects.filter(execution=fork).exists()
    go_on()
    assert Step.objects.get(execution=fork, status=StepStatus.PENDING).name == "event"


def test_events_that_no_step_had_taken_stay_with_the_source() -> None:
    source = start(everything)
    api.send_event(source, "approved", 1)
    api.send_event(source, "approved", 2)
    for _ in range(10):
        advance(10)
    fork = api.fork(source, "event")
    assert not Event.objects.filter(execution=fork).exists()


def test_an_outcome_that_is_gone_is_not_copied() -> None:
    source = run(everything_short)
    Execution.objects.filter(parent=source)._raw_delete("default")  # type: ignore[attr-defined]
    with pytest.raises(ActionRefused, match=r'outcome of step "second" .* is gone') as refused:
        api.fork(source, "third")
    assert refused.value.reason == "a child of it has been deleted"
    assert api.fork(source, "second")


@durable
def maps(ctx: ExecutionContext) -> list[Any]:
    ctx.map("many", scenarios.echo, [{"value": n} for n in range(3)])
    return ctx.step("last", str, "done")  # type: ignore[no-any-return]


def test_a_map_that_has_lost_a_child_is_not_copied() -> None:
    source = run(maps)
    Execution.objects.filter(parent=source, position=1)._raw_delete("default")  # type: ignore[attr-defined]
    with pytest.raises(ActionRefused, match=r'outcome of step "many" .* is gone'):
        api.fork(source, "last")


def test_a_step_that_was_copied_is_protected_as_any_other() -> None:
    source = run(everything_short)
    fork = api.fork(source, "third")
    redeploy(everything_short, lambda ctx, order=1: ctx.step("second", str, "x"))
    go_on()
    assert failure(fork).error_class.endswith(StepMismatch.__name__)
    assert 'Step "second" was recorded as invoke' in failure(fork).message


def test_no_run_has_woken_the_first_one_of_a_fork() -> None:
    source = run(everything_short)
    fork = api.fork(source, "third")
    redeploy(everything_short, lambda ctx, order=1: ctx.sleep("other", 5))
    go_on()
    assert reload(fork).astray is None


def test_a_failure_that_was_copied_is_told_when_its_child_is_pruned() -> None:
    source = run(caught)
    redeploy(caught, lambda ctx: ctx.invoke("charge", declines))
    fork = api.fork(source, "flag")
    prune(source)
    go_on()
    assert reload(fork).error_message == "Child execution failed: card 0 declined"
    assert failure(fork).step == "charge"


def test_the_plan_and_the_fork_are_the_same() -> None:
    source = whole()
    for cut in Step.objects.filter(execution=source).values_list("name", flat=True):
        planned = acting.fork_plan(source, cut)
        fork = api.fork(source, cut)
        copied = list(Step.objects.filter(execution=fork).order_by("id").values_list("name", flat=True))
        assert copied == [step.name for step in planned.kept]
        assert not Step.objects.filter(execution=fork).exclude(Q(fence=0) & Q(attempt=0)).exists()
        assert transitions.request_cancel(fork.pk, "", lambda **_: None)


def test_running_and_claimed_executions_are_not_forked() -> None:
    with pytest.raises(ActionRefused, match="is running"):
        api.fork(claimed(queued()), "first")
