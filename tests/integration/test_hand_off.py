"""What a process goes on with, without a message, when a run ends; and what it leaves to the broker."""

from __future__ import annotations

import os
import pickle
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import signals as celery_signals
from celery.app.trace import build_tracer
from celery.exceptions import WorkerShutdown
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from conductor_app import signals, transitions
from conductor_app.engine import claims, hand_off
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import ChildFailed
from conductor_app.host import commands, durable_runs, news
from conductor_app.host.gate import SharedGate, Shutdown
from conductor_app.host.request import DurableRequest
from conductor_app.host.sweeper_thread import SweeperThread
from conductor_app.models import Execution, Step
from conductor_app.store import clock, owners
from conductor_app.store.moves import Move
from conductor_app.store.process import Gate, process
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app import plain, scenarios
from tests.support import history, invariants
from tests.support.bodies import durable, reload
from tests.support.executions import OWNER, claimed, committing, fresh, invocation, napping, queued, running, step_of
from tests.support.process import note_published

NODE = "node@test"


class OpenGate(Gate):
    """A worker's, with the pool's bodies in its own process."""

    is_open_now = True

    def __init__(self) -> None:
        self.shown: list[uuid.UUID | None] = []

    def is_open(self) -> bool:
        return self.is_open_now

    def show(self, execution_id: uuid.UUID | None) -> None:
        self.shown.append(execution_id)


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    with committing(django_db_blocker), history.recording():
        yield


@pytest.fixture(autouse=True)
def published() -> list[Any]:
    """The ids of executions whose messages were published, in the place of a broker."""
    return note_published()


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> OpenGate:
    gate = OpenGate()
    process.worker.gate = gate
    # On a busy machine, two seconds are soon over.
    monkeypatch.setattr(hand_off, "MAX_SECONDS", 60.0)
    return gate


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """The task ids that Celery's tracers have run, in order."""
    ids: list[str] = []

    def note(task_id: str, **_kwargs: Any) -> None:
        ids.append(task_id)

    celery_signals.task_prerun.connect(note, weak=False)
    yield ids
    celery_signals.task_prerun.disconnect(note)


def traced(*tasks: Any) -> None:
    """Give tasks the tracers that they have in a worker."""
    for task in tasks:
        plain: Any = task._get_current_object() if hasattr(task, "_get_current_object") else task
        plain.__trace__ = durable_runs.guard(plain, build_tracer(plain.name, plain, app=app, hostname=NODE))


def deliver(execution: Any, **request: Any) -> Any:
    """Deliver an execution's message, as a worker does."""
    row = reload(execution)
    task = app.tasks[row.task]
    fields = {
        "id": str(row.pk),
        "task": row.task,
        "hostname": NODE,
        "delivery_info": {},
        "timelimit": [None, None],
        dispatch.HEADER: dispatch.DOORBELL,
        **request,
    }
    return task.__trace__(str(row.pk), [], {}, fields)


def statuses() -> set[str]:
    return set(Execution.objects.values_list("status", flat=True))


def pair(**options: Any) -> tuple[Any, Any]:
    """A child, made with ``options``, and its parent."""

    @durable(**options)
    def child(ctx: Any, value: int = 1) -> int:
        return value

    @durable
    def parent(ctx: Any) -> list[int]:
        return [ctx.invoke(step, child, {"value": number}) for number, step in enumerate("ab")]

    traced(child, parent)
    return child, parent


# --------------------------------------------------------------------------------------------------- one after another


def test_a_tree_runs_in_one_process_as_if_each_run_had_been_delivered(
    published: list[Any], ran: list[str], gate: OpenGate
) -> None:
    _child, parent = pair()
    result = parent.delay()
    assert published == [uuid.UUID(result.id)]
    outcome = deliver(result)
    root = reload(result)
    assert (root.status, root.get_result(), root.fence, root.attempt) == ("succeeded", [0, 1], 3, 1)
    first, second = Execution.objects.filter(parent=root).order_by("step")
    assert ran == [result.id, str(first.pk), result.id, str(second.pk), result.id]
    assert published == [root.pk]
    assert gate.shown == [root.pk, first.pk, root.pk, second.pk, root.pk, None]
    # The main process hears of the run that was delivered.
    assert outcome.info.retval.what == "suspended"
    invariants.check()


def test_the_main_process_gets_the_events_of_the_runs_that_followed() -> None:
    _child, parent = pair()
    runtime = deliver(parent.delay()).runtime
    assert [kind for kind, _ in runtime.events] == [
        *("task-received", "task-started", "task-succeeded"),
        *("task-received", "task-started", "task-suspended"),
        *("task-received", "task-started", "task-succeeded"),
        *("task-received", "task-started", "task-succeeded"),
    ]
    assert runtime.due_at is None
    uuids = {fields["uuid"] for _, fields in runtime.events}
    assert uuids == {str(pk) for pk in Execution.objects.values_list("pk", flat=True)}


def test_the_main_process_hears_when_the_sweeper_is_needed() -> None:
    @durable
    def naps(ctx: Any) -> None:
        ctx.sleep("nap", 60)

    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("naps", naps)

    traced(naps, parent)
    before = durable_runs.time.time()
    assert 55 < deliver(parent.delay()).runtime.due_at - before < 65
    assert statuses() == {"waiting"}


def test_a_failed_child_hands_its_failure_to_its_parent(published: list[Any], ran: list[str]) -> None:
    @durable(max_retries=0)
    def fails(ctx: Any) -> None:
        raise ValueError("card declined")

    @durable
    def catches(ctx: Any) -> str:
        try:
            ctx.invoke("pay", fails)
        except ChildFailed as error:
            return str(error)
        return ""

    traced(fails, catches)
    result = catches.delay()
    deliver(result)
    assert reload(result).get_result() == "Child execution failed: card declined"
    assert (len(ran), len(published)) == (3, 1)
    invariants.check()


def test_the_last_child_of_a_map_hands_over_and_the_others_are_published(published: list[Any]) -> None:
    @durable
    def child(ctx: Any, n: int) -> int:
        return n

    @durable
    def parent(ctx: Any) -> list[int]:
        return ctx.map("all", child, [{"n": n} for n in range(3)])

    traced(child, parent)
    result = parent.delay()
    deliver(result)
    children = list(Execution.objects.filter(parent=result.id).order_by("position"))
    assert published[1:] == [row.pk for row in children]
    for row in children:
        deliver(row)
    assert reload(result).get_result() == [0, 1, 2]
    assert published[4:] == []
    invariants.check()


def test_a_request_is_the_one_that_a_worker_would_make_of_the_message() -> None:
    seen: list[dict[str, Any]] = []

    @durable
    def child(ctx: Any) -> None:
        seen.append(dict(vars(ctx.task.request)))

    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("child", child)

    traced(child, parent)
    deliver(parent.delay(), hostname=NODE)
    row = Execution.objects.get(task=child.name)
    options = dispatch.message_of(row)
    message = app.amqp.as_task_v2(str(row.pk), row.task, **options)
    (request,) = seen
    expected = {**message.headers, **options["headers"]}
    # Celery's tracer, and ours, change these.
    changed = {"ignore_result", "origin"}
    assert {name: request[name] for name in expected if name not in changed} == {
        name: value for name, value in expected.items() if name not in changed
    }
    assert (request["hostname"], request["correlation_id"]) == (NODE, str(row.pk))
    assert request["delivery_info"]["routing_key"] == row.queue


def test_a_replay_does_not_read_what_this_process_has_just_written() -> None:
    _child, parent = pair()
    result = parent.delay()
    with CaptureQueriesContext(connection) as queries:
        deliver(result)
    table = Step._meta.db_table
    reads = [
        query["sql"] for query in queries if query["sql"].startswith("SELECT") and f'FROM "{table}"' in query["sql"]
    ]
    assert not [sql for sql in reads if "result" in sql]
    assert reload(result).get_result() == [0, 1]


def test_a_replay_reads_what_others_may_have_changed() -> None:
    """A started child that has ended meanwhile."""

    @durable
    def beside(ctx: Any) -> str:
        return "beside"

    @durable
    def child(ctx: Any) -> str:
        if ctx.attempt == 1:
            executor_run(Execution.objects.get(task=beside.name))
        return "child"

    @durable
    def parent(ctx: Any) -> list[str]:
        handle = ctx.start("beside", beside)
        return [ctx.invoke("child", child), *ctx.gather(handle)]

    def executor_run(row: Execution) -> None:
        transitions.succeed(claimed(row), '"beside"')

    traced(beside, child, parent)
    result = parent.delay()
    deliver(result)
    assert reload(result).get_result() == ["child", "beside"]
    invariants.check()


# ------------------------------------------------------------------------------------------------ what goes the old way


@pytest.mark.parametrize(
    "options",
    [{"queue": "another"}, {"priority": 3}, {"time_limit": 60}, {"soft_time_limit": 60}, {"rate_limit": "10/s"}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_broker_or_the_worker_has_a_say_in_is_published(published: list[Any], options: dict[str, Any]) -> None:
    _child, parent = pair(**options)
    result = parent.delay()
    deliver(result)
    (child,) = Execution.objects.filter(parent=result.id)
    assert published == [uuid.UUID(result.id), child.pk]
    assert (child.status, child.fence) == ("queued", 0)


def test_a_plain_task_is_published(published: list[Any]) -> None:
    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("plain", plain.echo)

    traced(parent)
    deliver(parent.delay())
    assert Execution.objects.get(parent__isnull=False).status == "queued"
    assert len(published) == 2


@pytest.mark.parametrize("request_fields", [{"timelimit": [60, None]}, {"timelimit": [None, 60]}])
def test_nothing_follows_a_delivery_with_a_time_limit(published: list[Any], request_fields: dict[str, Any]) -> None:
    _child, parent = pair()
    deliver(parent.delay(), **request_fields)
    assert len(published) == 2


def test_a_worker_that_shuts_down_hands_off_no_more(published: list[Any], gate: OpenGate) -> None:
    @durable
    def child(ctx: Any) -> None:
        gate.is_open_now = False

    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("child", child)

    traced(child, parent)
    result = parent.delay()
    deliver(result)
    assert (published, reload(result).status) == ([uuid.UUID(result.id)] * 2, "queued")


@pytest.mark.parametrize(("limit", "value"), [("MAX_RUNS", 1), ("MAX_SECONDS", 0.0)])
def test_the_runs_that_follow_a_delivery_are_bounded(
    published: list[Any], ran: list[str], monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(hand_off, limit, value)
    _child, parent = pair()
    deliver(parent.delay())
    assert len(ran) == 2
    assert len(published) == 2


def test_a_tree_that_runs_eagerly_inside_a_body_is_its_own(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    child, parent = pair()

    def inner() -> Any:
        monkeypatch.setitem(app.conf, "task_always_eager", True)
        result = parent.delay().get()
        monkeypatch.setitem(app.conf, "task_always_eager", False)
        return result

    @durable
    def outer(ctx: Any) -> Any:
        return ctx.step("inner", inner)

    traced(outer)
    result = outer.delay()
    deliver(result)
    assert reload(result).get_result() == [0, 1]
    assert Execution.objects.filter(task=child.name).count() == 2
    invariants.check()


def test_a_run_without_an_outcome_has_no_traceback_to_copy() -> None:
    @durable
    def naps(ctx: Any) -> None:
        ctx.sleep("nap", 60)

    @durable(max_retries=0)
    def fails(ctx: Any) -> None:
        raise ValueError("card declined")

    traced(naps, fails)
    durable_runs.guard_tasks(app)
    suspended = deliver(naps.delay()).retval
    assert isinstance(suspended, durable_runs.EndInfo)
    for info in (suspended, pickle.loads(pickle.dumps(suspended))):
        assert (info.type, repr(info.exception), info.internal) == (
            RunEnded,
            "<run suspended: waiting for step 'nap'>",
            True,
        )
        assert (info.exc_info[2], str(info)) == (None, "")
    failed = deliver(fails.delay()).retval
    assert type(failed) is ExceptionInfo
    assert "card declined" in failed.traceback


# ------------------------------------------------------------------------------------------------------ what goes wrong


@contextmanager
def answer_lost(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Let a transaction, counted from 1, be committed and the answer get lost."""
    commits: list[int] = []
    commit, make = connection.commit, Move.make

    def lose() -> None:
        commits.append(1)
        if len(commits) == number:
            raise OperationalError(2013, "Lost connection to server during query")

    def commit_and_lose() -> None:
        commit()
        lose()

    def make_and_lose(*args: Any, **values: Any) -> Any:
        known = len(commits)
        rows = make(*args, **values)
        if not connection.in_atomic_block and len(commits) == known:
            lose()  # a single statement, which has committed itself
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(connection, "commit", commit_and_lose)
        patched.setattr(Move, "make", make_and_lose)
        yield
    assert len(commits) >= number


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_claim_whose_commit_got_no_answer_is_taken_up(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    _child, parent = pair()
    result = parent.delay()
    with answer_lost(monkeypatch, number):
        deliver(result)
    assert statuses() == {"succeeded"}
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert reload(result).get_result() == [0, 1]


def test_a_claim_of_another_run_in_this_process_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = running()
    with process.keeper.hold(execution):
        assert claims._claimed_unheard(execution, OWNER) is None
    assert fresh(execution).fence == 1
    taken = claims._claimed_unheard(execution, OWNER)
    assert taken is not None
    assert taken.fence == 2


def test_what_was_claimed_and_cannot_be_run_is_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _child, parent = pair()
    result = parent.delay()

    def stop(sender: Any, task_id: str, **_kwargs: Any) -> None:
        if task_id == result.id:
            raise WorkerShutdown(0)

    celery_signals.task_postrun.connect(stop, weak=False)
    try:
        with pytest.raises(WorkerShutdown):
            deliver(result)
    finally:
        celery_signals.task_postrun.disconnect(stop)
    (child,) = Execution.objects.filter(parent=result.id)
    assert (child.status, child.attempt, child.lease_owner) == ("queued", 1, "")
    assert hand_off.current.get() is None


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_body_that_ends_its_thread_costs_that_execution_an_attempt(error: type[BaseException]) -> None:
    @durable
    def ends(ctx: Any) -> None:
        raise error

    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("ends", ends)

    traced(ends, parent)
    result = parent.delay()
    outcome = deliver(result)
    assert outcome.info.retval.what == "suspended"
    (child,) = Execution.objects.filter(parent=result.id)
    assert (child.status, child.attempt) == ("queued", 2)
    assert (reload(result).status, reload(result).attempt) == ("waiting", 1)


def test_a_body_that_ends_its_pool_process_has_its_attempt_stored_and_the_main_process_hears_of_it(
    gate: OpenGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenGate, "is_own_process", True)

    @durable
    def ends(ctx: Any) -> None:
        raise SystemExit

    @durable
    def parent(ctx: Any) -> None:
        ctx.invoke("ends", ends)

    traced(ends, parent)
    with pytest.raises(SystemExit):
        deliver(parent.delay())
    child = Execution.objects.get(parent__isnull=False)
    assert (child.status, child.attempt) == ("queued", 2)
    assert "SystemExit" in (child.error or "")
    assert gate.shown[-1] == child.pk


# -------------------------------------------------------------------------------------------- the worker's main process


def shared_gate(**worker_options: Any) -> SharedGate:
    limits = ("time_limit", "soft_time_limit", "max_tasks_per_child", "max_memory_per_child")
    options = {**dict.fromkeys(limits), **worker_options}
    return SharedGate(SimpleNamespace(**options), Shutdown())


@pytest.mark.parametrize("option", ["time_limit", "soft_time_limit", "max_tasks_per_child"])
def test_a_worker_that_counts_or_times_its_jobs_hands_off_nothing(option: str) -> None:
    assert shared_gate().is_open()
    assert not shared_gate(**{option: 5}).is_open()


def test_a_process_that_has_grown_over_its_limit_hands_off_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool replaces it when its job ends, and each run that follows would put that off."""
    used = 100
    monkeypatch.setattr("conductor_app.host.gate.mem_rss", lambda: used)
    gate = shared_gate(max_memory_per_child=200)
    gate._main_pid = 0  # a pool process
    assert gate.is_open()
    used = 201
    assert not gate.is_open()
    assert shared_gate(max_memory_per_child=200).is_open(), "threads have no process of their own"
    unlimited = shared_gate()
    unlimited._main_pid = 0
    assert unlimited.is_open()


def test_the_setting_turns_it_off(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "HAND_OFF": False}
    assert not shared_gate().is_open()


def test_commands_that_change_what_a_worker_may_run_close_the_gate() -> None:
    gate = shared_gate()
    process.worker.gate = gate
    called: list[Any] = []
    commands._closing_the_gate(lambda state, **kwargs: called.append(kwargs))(None, task_name="x")
    assert (called, gate.is_open()) == ([{"task_name": "x"}], False)


def test_pool_processes_show_what_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = shared_gate()
    main, ids = os.getpid(), [uuid.uuid4() for _ in range(3)]
    gate.show(ids[0])
    assert gate.running_in(main) is None  # not a pool process
    # Two of one place: the first one dies in the middle of a run, and keeps it until that is noticed.
    first, second = 100, 100 + SharedGate.SLOTS
    for pid, run in ((first, ids[0]), (second, ids[1]), (second, ids[2])):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        assert gate.is_open()
        gate.show(run)
    assert (gate.running_in(first), gate.running_in(second)) == (ids[0], ids[2])
    assert gate.process_of(str(ids[2])) == second
    gate.show(None)
    assert gate.running_in(second) is None
    gate.forget(first)
    assert gate.running_in(first) is None
    assert gate.process_of(str(ids[0])) is None


def test_a_pool_process_without_a_place_hands_off_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = shared_gate()
    for number in range(SharedGate.PLACES + 1):
        monkeypatch.setattr(os, "getpid", lambda number=number: 100 + number * SharedGate.SLOTS)
        assert gate.is_open() is (number < SharedGate.PLACES)
        gate.show(uuid.uuid4())


def delivery_of(row: Execution, pid: int) -> DurableRequest:
    """A worker's request for an execution's message, which a pool process runs."""
    message = SimpleNamespace(
        headers={"id": str(row.pk), "task": row.task, dispatch.HEADER: dispatch.DOORBELL},
        body=b"[[],{},{}]",
        content_type="application/json",
        content_encoding="utf-8",
        payload=([], {}, {}),
        delivery_info={},
        properties={},
    )
    request = DurableRequest(message, app=app, task=scenarios.echo, hostname=NODE)
    request.time_start, request.worker_pid = 1.0, pid  # type: ignore[assignment]
    return request


def sweeper_of_node() -> SweeperThread:
    """The sweeper's thread of a worker without a pool, which is fed nothing, however long a sweep takes."""
    thread = SweeperThread(SimpleNamespace(app=app, hostname=NODE), Shutdown())
    thread._feed = SimpleNamespace(fill=lambda: None)  # type: ignore[assignment]
    return thread


#: More than a process id can be, so that nobody has it.
DEAD = 2**22 + 77


def test_a_message_that_is_gone_with_its_process_is_published_again_at_once_and_once(published: list[Any]) -> None:
    """The process died before it claimed anything."""
    row = queued()
    Execution.objects.filter(pk=row.pk).update(dispatch_at=clock.after(3_600))
    sweeper = sweeper_of_node()
    sweeper._embedded = False
    for expected in ([row.pk], []):
        del published[:]
        delivery_of(row, DEAD)._report_death()
        sweeper._next_sweep = float("inf")
        sweeper._tick()
        assert published == expected
    assert Execution.objects.get().attempt == 1


def test_a_second_worker_of_ones_name_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    sweeper = sweeper_of_node()
    later = time.monotonic() + 10_000
    claimed(queued(), owners.lease_owner(NODE, DEAD))
    claimed(queued(), "another@host/0badcafe/1")
    sweeper._look_for_namesakes(later)
    assert caplog.text == ""
    claimed(queued(), f"{NODE}/0badcafe/1")
    sweeper._look_for_namesakes(time.monotonic())
    assert caplog.text == "", "it may have been left by a worker that this one replaces"
    for _ in range(2):
        sweeper._look_for_namesakes(later)
    assert caplog.text.count(f"Another worker is called {NODE}, too") == 1


@pytest.mark.parametrize("is_delivered", [True, False], ids=["of a delivery", "of a process"])
def test_what_a_dead_process_had_not_begun_costs_no_attempt(
    monkeypatch: pytest.MonkeyPatch, published: list[Any], is_delivered: bool
) -> None:
    """And what it ran does, whatever was delivered to it, and whichever report comes first."""
    gate = shared_gate()
    process.worker.gate = gate
    owner = owners.lease_owner(NODE, DEAD)
    parent = running()
    unbegun, begun = claimed(queued(), owner), claimed(queued(), owner)
    others = claimed(queued(), owners.lease_owner(NODE, DEAD + 1))
    # In another container: the same node name, the same process id.
    namesakes = claimed(queued(), f"{NODE}/0badcafe/{DEAD}")
    older = claimed(queued(), f"{NODE}/{DEAD}")
    with monkeypatch.context() as in_pool:
        in_pool.setattr(os, "getpid", lambda: DEAD)
        gate.show(begun.pk)
    if is_delivered:
        delivery_of(unbegun, DEAD)._report_death()
    news.news().process_ended(DEAD)
    assert gate.running_in(DEAD) is None
    sweeper = sweeper_of_node()
    sweeper._next_sweep = float("inf")
    sweeper._tick()
    rows = {row.pk: (row.status, row.attempt) for row in Execution.objects.all()}
    assert rows == {
        parent.pk: ("running", 1),
        unbegun.pk: ("queued", 1),
        begun.pk: ("queued", 2),
        others.pk: ("running", 1),
        namesakes.pk: ("running", 1),
        older.pk: ("running", 1),
    }
    assert unbegun.pk in published


def test_an_end_that_a_dead_process_had_not_told_celery_of_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = shared_gate()
    process.worker.gate = gate
    _child, parent = pair()
    root = claimed(reload(parent.delay()), f"{NODE}/{DEAD}")
    with monkeypatch.context() as in_pool:
        in_pool.setattr(os, "getpid", lambda: DEAD)
        gate.show(root.pk)
    transitions.succeed(root, "[0, 1]")
    assert fresh(root).announce_at is not None
    news.news().process_ended(DEAD)
    sweeper = sweeper_of_node()
    sweeper._next_sweep = float("inf")
    sweeper._tick()
    assert fresh(root).announce_at is None


def test_terminate_kills_no_process_that_has_gone_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = shared_gate()
    process.worker.gate = gate
    request = delivery_of(queued(), 4242)
    killed: list[Any] = []
    pool = SimpleNamespace(terminate_job=lambda pid, signum: killed.append(pid))
    monkeypatch.setattr(os, "getpid", lambda: 4242)
    follower = uuid.uuid4()
    gate.show(follower)
    request.terminate(pool)
    assert killed == []
    assert news.news().take("revoked") == [], "an operator's retry may have followed the command"
    commands._terminate_follower(SimpleNamespace(consumer=SimpleNamespace(pool=pool)), str(follower), None)
    assert killed == [4242]


def test_a_transition_alone_hands_off_nothing(published: list[Any]) -> None:
    parent = running()
    transitions.suspend(parent, invocation(parent))
    assert len(published) == 2


def test_what_receivers_of_signals_wake_is_published(published: list[Any]) -> None:
    """It is no business of the run whose commit they follow."""
    _child, parent = pair()
    others = [napping(), napping()]

    def wake(execution: Execution, **_kwargs: Any) -> None:
        if others and execution.parent_id is not None:
            Step.objects.filter(execution=others[0].pk).update(deadline_at=clock.now())
            transitions.decide_overdue(step_of(others.pop(0), "nap"))

    for signal in (signals.execution_created, signals.execution_started):
        signal.connect(wake)
    try:
        result = parent.delay()
        deliver(result)
    finally:
        for signal in (signals.execution_created, signals.execution_started):
            signal.disconnect(wake)
    assert reload(result).get_result() == [0, 1]
    assert set(Execution.objects.exclude(root=result.id).values_list("status", "fence")) == {("queued", 1)}
