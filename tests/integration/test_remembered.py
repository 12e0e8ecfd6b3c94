"""What a body can catch is what it meets on each replay: errors of functions, of the database, of its memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connection, connections, transaction

from conductor_app import ExecutionContext, api, transitions
from conductor_app.engine import hand_off
from conductor_app.exceptions import ChildCancelled, LeaseLost, OutcomeLost
from conductor_app.models import Execution, Step
from conductor_app.store import clock, moves, serving, transactions
from conductor_app.store.process import process
from conductor_app.transitions import steps
from conductor_app.values.failures import describe, load_failure
from tests.app import endings, scenarios
from tests.app.ledger import count, note
from tests.app.models import Ledger
from tests.integration.test_commits import answers_lost
from tests.support.bodies import advance, class_name, durable, failure, go_on, reload, start
from tests.support.executions import committing


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """What is committed here has to be: only then is a transaction run again."""
    with committing(django_db_blocker):
        yield
        clock.reset()
        Ledger.objects.all().delete()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "pause_after_conflict", lambda number: None)
    monkeypatch.setattr(transactions, "pause_after_outage", lambda number: None)


def query(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def raising(state: str) -> str:
    """PostgreSQL's statement that fails with a SQLSTATE."""
    return f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"


def signalling(number: int) -> str:
    """MariaDB's statement that fails with a number."""
    return f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'no'"


def wait_for_a_lock() -> None:
    """Ask for a row that another session has locked, for no longer than a moment."""
    locked, done = threading.Event(), threading.Event()

    def lock() -> None:
        with transaction.atomic():
            Execution.objects.select_for_update().first()
            locked.set()
            done.wait(20)
        connections.close_all()

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        assert locked.wait(20)
        query(
            "SET LOCAL lock_timeout = 50"
            if connection.vendor == "postgresql"
            else "SET SESSION innodb_lock_wait_timeout = 1"
        )
        list(Execution.objects.select_for_update())
    finally:
        done.set()
        thread.join()
        if connection.vendor == "mysql":
            query("SET SESSION innodb_lock_wait_timeout = 50")


def fill_up() -> None:
    """Meet a limit of the database's."""
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            sizes = {}
            for name in ("page_count", "freelist_count", "page_size"):
                cursor.execute(f"PRAGMA {name}")
                (sizes[name],) = cursor.fetchone()
            cursor.execute(f"PRAGMA max_page_count = {sizes['page_count']}")
            try:
                # More than the pages hold that earlier tests have left free.
                note(None, "full", "x" * (sizes["freelist_count"] + 1_000) * sizes["page_size"])
            finally:
                cursor.execute("PRAGMA max_page_count = 1073741823")
    elif connection.vendor == "postgresql":
        query("SELECT repeat(repeat('x', 1000000), 2000)")
    else:
        query(signalling(1021))


def run_too_long() -> None:
    if connection.vendor == "postgresql":
        query("SET LOCAL statement_timeout = 30; SELECT pg_sleep(5)")
    elif connection.vendor == "mysql":
        query("SET STATEMENT max_statement_time = 0.05 FOR SELECT SLEEP(5)")
    else:
        thread = threading.Timer(0.05, connection.connection.interrupt)
        thread.start()
        query("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n")


#: What fails with an error that says nothing about the session.
TROUBLE: dict[str, Callable[[], None]] = {
    "statement timeout": run_too_long,
    "limit": fill_up,
    "syntax": lambda: query("SELEKT 1"),
    "missing table": lambda: query("SELECT * FROM no_such_table_is_here"),
    "lock timeout": wait_for_a_lock,
}


@pytest.mark.parametrize("call", ["step", "atomic_step"])
@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_database_error_that_the_body_catches_is_remembered(call: str, trouble: str) -> None:
    """Refunded once, and neither charged nor shipped on a replay."""
    if trouble == "lock timeout" and connection.vendor == "sqlite":
        pytest.skip("SQLite has no lock on a row")
    caught: list[str] = []
    act = TROUBLE[trouble]

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        def charge() -> str:
            note(None, "charge")
            if count("calls") == 0:
                with transaction.atomic():  # so that only this is undone by the first error
                    act()
            return "charged"

        try:
            getattr(ctx, call)("charge", charge)
        except DatabaseError as error:
            caught.append(type(error).__name__)
            ctx.step("calls", note, None, "calls")
            ctx.step("refund", note, None, "refund")
            ctx.sleep("nap", 5)
            return "refunded"
        ctx.step("ship", note, None, "ship")
        return "shipped"

    root = start(body)
    assert root.status == "waiting", failure(root).traceback
    advance(6)
    assert reload(root).get_result() == "refunded"
    assert (count("refund"), count("ship"), len(caught)) == (1, 0, 2)
    assert steps.recall(root.pk)["charge"].status == "failed"
    assert count("charge") == (0 if call == "atomic_step" else 1)
    assert len(set(caught)) == 1


def _undoing() -> list[tuple[str, str]]:
    if connection.vendor == "postgresql":
        return [("deadlock", raising("40P01")), ("serialization", raising("40001"))]
    if connection.vendor == "mysql":
        return [("deadlock", signalling(1213)), ("changed", signalling(1020))]
    return []


@pytest.mark.parametrize("times", [1, transactions.CONFLICT_TRIES])
def test_an_atomic_step_that_was_undone_is_run_again(times: int) -> None:
    if not (undoing := _undoing()):
        pytest.skip("SQLite lets one write at a time")
    for name, statement in undoing:
        calls: list[int] = []

        @durable(max_retries=0)
        def body(ctx: ExecutionContext, name: str = name, statement: str = statement, calls: Any = calls) -> Any:
            def work() -> int:
                calls.append(1)
                note(None, name)
                if len(calls) <= times:
                    query(statement)
                return len(calls)

            return ctx.atomic_step("work", work)

        root = start(body)
        assert (root.get_result(), count(name)) == (times + 1, 1)


def test_an_atomic_step_that_is_undone_each_time_fails_as_what_it_is_and_stays_failed() -> None:
    if not (undoing := _undoing()):
        pytest.skip("SQLite lets one write at a time")
    calls: list[int] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        def work() -> None:
            calls.append(1)
            query(undoing[0][1])

        try:
            ctx.atomic_step("work", work)
        except OperationalError:
            ctx.sleep("nap", 5)
            return "gave up"
        return "done"

    root = start(body)
    calls_made = len(calls)
    advance(6)
    assert (reload(root).get_result(), calls_made, len(calls)) == (
        "gave up",
        transactions.CONFLICT_TRIES + 1,
        calls_made,
    )


def end_own_session() -> None:
    if connection.vendor == "postgresql":
        query("SELECT pg_terminate_backend(pg_backend_pid())")
    elif connection.vendor == "mysql":
        end_session_from_elsewhere()
        query("SELECT 1")


def end_session_from_elsewhere() -> None:
    kill = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL CONNECTION %s"}[connection.vendor]
    kill %= serving._session_id(connection.connection)
    thread = threading.Thread(target=lambda: (query(kill), connections.close_all()))
    thread.start()
    thread.join()


@pytest.mark.parametrize("where", ["before", "inside", "at the end"])
def test_an_atomic_step_whose_session_was_ended_is_run_again(where: str) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no sessions")
    calls: list[int] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        def work() -> int:
            calls.append(1)
            note(None, "work")
            if where == "inside" and len(calls) == 1:
                end_own_session()
            if where == "at the end" and len(calls) == 1:
                try:
                    end_own_session()
                except DatabaseError:
                    return 0  # what the function makes of it is undone, too
            return len(calls)

        if where == "before":
            with pytest.raises(DatabaseError):
                end_own_session()
        return ctx.atomic_step("work", work)

    root = start(body)
    assert root.status == "succeeded", failure(root).traceback
    assert (root.get_result(), count("work")) == (1 if where == "before" and len(calls) == 1 else 2, 1)


def test_an_atomic_step_whose_session_ends_at_its_commit_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no sessions")
    commit = connection._commit
    ended: list[BaseException] = []

    def end_and_commit() -> None:
        if not ended and count("work"):
            end_session_from_elsewhere()
            try:
                commit()
            except DatabaseError as error:
                ended.append(error)
                raise
        commit()

    monkeypatch.setattr(connection, "_commit", end_and_commit)
    root = start(durable(lambda ctx: ctx.atomic_step("work", lambda: note(None, "work") or "done"), max_retries=0))
    assert root.status == "succeeded", failure(root).traceback
    assert (root.get_result(), count("work"), len(ended)) == ("done", 1, 1)


def test_an_atomic_step_that_ends_its_session_each_time_fails_as_what_it_is() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no sessions")
    calls: list[int] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        def work() -> None:
            calls.append(1)
            end_own_session()

        try:
            ctx.atomic_step("work", work)
        except (DatabaseError, OperationalError):
            ctx.sleep("nap", 5)
            return "gave up"
        return "done"

    root = start(body)
    calls_made = len(calls)
    advance(6)
    assert (reload(root).get_result(), calls_made, len(calls)) == ("gave up", 6, 6)


def test_an_atomic_step_whose_commit_got_no_answer_is_done_and_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        with answers_lost(monkeypatch):
            try:
                return ctx.atomic_step("work", lambda: note(None, "work") or "done")
            except Exception as error:
                caught.append(error)
                raise

    root = start(body)
    assert (root.get_result(), count("work"), caught) == ("done", 1, [])


def test_an_error_of_another_database_is_the_functions_own_and_is_not_repeated() -> None:
    calls: list[int] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        def work() -> None:
            calls.append(1)
            raise OperationalError("could not connect to the other server")

        try:
            ctx.atomic_step("work", work)
        except OperationalError as error:
            ctx.sleep("nap", 5)
            return str(error)
        return "done"

    root = start(body)
    advance(6)
    assert (reload(root).get_result(), calls) == ("could not connect to the other server", [1])


def test_an_atomic_step_is_not_run_again_after_a_cancel_or_a_takeover() -> None:
    if not (undoing := _undoing()):
        pytest.skip("SQLite lets one write at a time")
    for change, ends in (({"cancel_requested_at": clock.now()}, "cancelled"), ({"fence": 7}, "running")):
        calls: list[int] = []

        @durable(max_retries=0)
        def body(ctx: ExecutionContext, calls: Any = calls, change: Any = change) -> None:
            def work() -> None:
                calls.append(1)
                thread = threading.Thread(target=lambda: _update(ctx.execution_id, **change))
                thread.start()
                thread.join()
                query(undoing[0][1])

            ctx.atomic_step("work", work)

        root = start(body)
        assert (root.status, calls) == (ends, [1])


def _update(execution_id: Any, **values: Any) -> None:
    Execution.objects.filter(pk=execution_id).update(**values)
    connections.close_all()


@pytest.mark.parametrize("kind", [asyncio.CancelledError, endings.Panic])
@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_what_is_no_exception_and_is_caught_is_remembered(call: str, kind: type[BaseException]) -> None:
    charges: list[int] = []

    def interrupted() -> None:
        charges.append(1)
        raise kind("once") if len(charges) == 1 else AssertionError("it was called again")

    @durable
    def refunds(ctx: ExecutionContext) -> str:
        try:
            getattr(ctx, call)("charge", interrupted)
        except kind as error:
            note(ctx, "refund", error.args)
        ctx.sleep("nap", 0)
        return "refunded"

    execution = start(refunds)
    assert (execution.get_result(), charges) == ("refunded", [1])
    assert count("refund") == 2
    step = execution.steps.get(name="charge")
    assert (step.status, load_failure(step.error).type) == ("failed", class_name(kind))


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_what_is_to_end_a_process_is_no_outcome_of_a_step(end: type[BaseException]) -> None:
    @durable(max_retries=0)
    def goes_on(ctx: ExecutionContext) -> str:
        def ends() -> None:
            raise end

        with contextlib.suppress(end):
            ctx.step("charge", ends)
        ctx.sleep("nap", 0)
        return "done"

    assert not start(goes_on).steps.filter(name="charge").exists()


@pytest.mark.parametrize("then", ["step", "sleep", "checkpoint"])
@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_failure_that_the_body_has_caught_is_remembered_by_the_call_that_ends_the_body(call: str, then: str) -> None:
    charges: list[int] = []

    def declined() -> None:
        charges.append(1)
        raise ValueError("declined")

    @durable
    def refunds(ctx: ExecutionContext) -> str:
        try:
            getattr(ctx, call)("charge", declined)
        except ValueError:
            note(ctx, "refund")
        if count("refund") == 1:
            api.cancel(ctx.execution_id)
            process.keeper.note_cancel(ctx.execution_id)
        arguments = {"step": ("ship", str), "sleep": ("nap", 0), "checkpoint": ()}[then]
        getattr(ctx, then)(*arguments)
        return "refunded"

    execution = start(refunds)
    assert (execution.status, charges) == ("cancelled", [1])
    api.retry(execution)
    go_on()
    assert reload(execution).status == "succeeded"
    assert charges == [1]
    assert count("refund") == (3 if then == "sleep" else 2)


def test_a_callback_that_fails_after_an_atomic_steps_commit_ends_the_attempt_and_not_the_step() -> None:
    caught: list[Any] = []

    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> Any:
        def work() -> str:
            note(None, "work")
            transaction.on_commit(lambda: {}["no"])
            return "done"

        try:
            return ctx.atomic_step("work", work)
        except Exception as error:
            caught.append(error)
            raise

    root = start(body)
    assert (root.get_result(), root.attempt, count("work"), caught) == ("done", 2, 1, [])


# ------------------------------------------------------------------------------------------------ our own statements


def refusing(pattern: str, error: Callable[[], Exception]) -> Any:
    """Let each statement of this connection that matches be refused."""

    def refuse(execute: Any, statement: str, params: Any, many: bool, context: Any) -> Any:
        if re.search(pattern, statement):
            raise error()
        return execute(statement, params, many, context)

    return connection.execute_wrapper(refuse)


REFUSED: dict[str, tuple[str, Callable[[ExecutionContext], Any]]] = {
    "step": (r"INSERT INTO \S*conductor_app_step", lambda ctx: ctx.step("a", int)),
    "start": (r"INSERT INTO \S*conductor_app_step", lambda ctx: ctx.start("a", scenarios.echo)),
    "checkpoint": (r"^SELECT .*cancel_requested_at", lambda ctx: ctx.checkpoint()),
}


@pytest.mark.parametrize("call", REFUSED)
def test_an_error_of_a_statement_of_ours_ends_the_attempt_and_nobody_catches_it(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor_app.body.context.CHECKPOINT_INTERVAL_SECONDS", 0)
    pattern, act = REFUSED[call]
    caught: list[Any] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        with refusing(pattern, lambda: DatabaseError("no room for this")):
            try:
                act(ctx)
            except Exception as error:  # noqa: BLE001 - what nothing remembers must not come here
                caught.append(error)
        ctx.step("refund", note, None, "refund")
        return "refunded"

    root = start(body)
    assert (root.status, caught, count("refund")) == ("failed", [], 0)
    assert failure(root).error_class == class_name(DatabaseError)
    assert "no room for this" in failure(root).message
    assert "act(ctx)" in failure(root).traceback


def test_a_body_that_swallows_such_an_error_gets_no_further() -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        for name in ("a", "b"):
            refused = refusing(r"INSERT INTO \S*conductor_app_step", lambda: DatabaseError("no room for this"))
            with refused, contextlib.suppress(BaseException):
                ctx.step(name, int)
        with contextlib.suppress(BaseException):
            ctx.step("refund", note, None, "refund")
        return "refunded"

    root = start(body)
    assert (root.status, count("refund")) == ("failed", 0)
    assert failure(root).message == "no room for this"


def test_a_lost_lease_is_lost_for_each_later_call() -> None:
    seen: list[str] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> None:
        Execution.objects.filter(pk=ctx.execution_id).update(fence=7)
        for name in ("a", "b"):
            try:
                ctx.step(name, note, None, name)
            except LeaseLost:
                seen.append(name)

    start(body)
    # Before the first function it asks the database, if that has not said for a moment that the run goes on.
    assert (seen, count("a") <= 1, count("b")) == (["a", "b"], True, 0)


# ----------------------------------------------------------------------------------- what was recorded and is gone


def two_of(ctx: ExecutionContext) -> list[Any]:
    handles = [ctx.start(f"s{number}", scenarios.echo, {"value": number}) for number in (1, 2)]
    return ctx.gather(*handles, return_exceptions=True)


#: How each kind of outcome is asked for, and what holds it: of which step a child or a column may go.
LOST: dict[str, tuple[Callable[[ExecutionContext], Any], str]] = {
    "step": (lambda ctx: ctx.step("a", str, "x"), "a"),
    "atomic_step": (lambda ctx: ctx.atomic_step("a", str, "x"), "a"),
    "invoke": (lambda ctx: ctx.invoke("a", scenarios.echo, {"value": 1}), "a"),
    "gather": (two_of, "s1"),
    "map": (lambda ctx: ctx.map("a", scenarios.echo, [{"value": 1}, {"value": 2}], return_exceptions=True), "a"),
    "event": (lambda ctx: ctx.wait_for("a", "approved"), "a"),
}
HELD_BY_CHILDREN = ("invoke", "gather", "map")


def lose_outcome(root: Execution, step: str, how: str) -> None:
    children = Execution.objects.filter(parent=root, step=step)
    if how == "deleted":
        children.order_by("position").first().delete()  # type: ignore[union-attr]
    elif how == "deleted by hand":
        children.order_by("-position")[:1].get()
        query(f"DELETE FROM conductor_app_execution WHERE step = '{step}'")
    elif how == "unlinked":
        Step.objects.filter(execution=root, name=step).update(child=None)
    elif how == "emptied child":
        children.update(result=None)
    elif how == "damaged child":
        children.update(result='{"a": ')
    else:
        Step.objects.filter(execution=root, name=step).update(result=None if how == "emptied" else '{"a": ')


CASES = [
    *(
        (kind, how)
        for kind in HELD_BY_CHILDREN
        for how in ("deleted", "deleted by hand", "emptied child", "damaged child")
    ),
    *((kind, "unlinked") for kind in ("invoke", "gather")),
    *((kind, how) for kind in ("step", "atomic_step", "event") for how in ("emptied", "damaged")),
]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_a_replay_that_finds_less_than_was_recorded_fails_and_says_which_step(kind: str, how: str) -> None:
    ask, step = LOST[kind]
    caught: list[Any] = []

    @durable(max_retries=3)
    def body(ctx: ExecutionContext) -> Any:
        try:
            got = ask(ctx)
        except Exception as error:  # noqa: BLE001 - another branch than the run before has taken
            caught.append(error)
            ctx.step("refund", note, None, "refund")
            return "refunded"
        ctx.sleep("nap", 5)
        return [got]

    root = start(body)
    if kind == "event":
        api.send_event(root, "approved", {"by": "a"})
    advance(1)
    assert steps.recall(root.pk)["nap"].is_pending
    lose_outcome(root, step, how)
    advance(6)
    row = reload(root)
    assert (row.status, row.attempt, caught, count("refund")) == ("failed", 1, [], 0)
    failed = failure(row)
    assert (failed.error_class, failed.step) == (class_name(OutcomeLost), step)
    assert f"Step '{step}' was recorded as succeeded, and its " in failed.message
    assert "ask(ctx)" in failed.traceback
    # Retried as it is, it fails again; restored, it goes on.
    Step.objects.filter(execution=root, name=step, kind="step").update(result='"x"')
    if kind in ("step", "atomic_step"):
        api.retry(root)
        advance(1)
        assert reload(root).get_result() == ["x"]


@pytest.mark.parametrize(
    "form", [contextlib.nullcontext, moves.as_scripts], ids=["one statement", "several statements"]
)
def test_a_failure_that_was_recorded_and_is_gone_fails_too(
    form: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    caught: list[str] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        try:
            ctx.invoke("a", scenarios.boom)
        except Exception as error:  # noqa: BLE001
            caught.append(str(error))
        ctx.sleep("nap", 5)

    with form():
        root = start(body)
        Execution.objects.filter(parent=root).delete()
        advance(6)
    assert failure(root).message.startswith("Step 'a' was recorded as failed, and its error is gone: the child")
    assert caught == ["Child execution failed: card declined"]


@pytest.mark.parametrize("call", ["invoke", "start", "map"])
def test_a_step_whose_row_was_deleted_while_its_child_is_there_is_lost(call: str) -> None:
    @durable(max_retries=3)
    def body(ctx: ExecutionContext) -> Any:
        if call == "start":
            ctx.gather(ctx.start("a", scenarios.echo))
        elif call == "map":
            ctx.map("a", scenarios.echo, [{"value": 1}])
        else:
            ctx.invoke("a", scenarios.echo)
        ctx.sleep("nap", 5)

    root = start(body)
    Step.objects.filter(execution=root, name="a").delete()
    advance(6)
    assert failure(root).error_class == class_name(OutcomeLost)
    assert (failure(root).step, reload(root).attempt) == ("a", 1)
    assert "Step 'a' has a child, and what was recorded of the step is gone" in failure(root).message


def test_a_child_of_a_map_that_was_deleted_while_it_was_waited_for_is_a_recorded_outcome() -> None:
    """Nothing was recorded of it before, so the body may be told, and is told the same on each replay."""

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        got = ctx.map("a", scenarios.naps, [{"seconds": 1}, {"seconds": 50}], return_exceptions=True)
        ctx.sleep("nap", 5)
        return [value if isinstance(value, str) else [type(value).__name__, str(value)] for value in got]

    root = start(body)
    Execution.objects.filter(parent=root, position=1).delete()
    advance(2)
    assert transitions.wake_stranded(root.pk)
    advance(0)
    advance(6)
    text = "Child execution was cancelled (step 'a'): Cancelled: its row was deleted"
    assert reload(root).get_result() == ["rested", [ChildCancelled.__name__, text]]


@pytest.mark.parametrize("value", [None, 0, "", [], {}])
def test_what_is_empty_is_not_gone(value: Any) -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        got = [
            ctx.step("a", lambda: value),
            ctx.atomic_step("b", lambda: value),
            ctx.invoke("c", scenarios.echo, {"value": value}),
            *ctx.map("d", scenarios.echo, [{"value": value}]),
            *ctx.gather(ctx.start("e", scenarios.echo, {"value": value})),
            ctx.wait_for("f", "approved"),
        ]
        ctx.sleep("nap", 5)
        return got

    root = start(body)
    api.send_event(root, "approved", value)
    advance(1)
    advance(6)
    assert reload(root).get_result() == [value] * 6


def test_a_result_that_is_gone_is_no_none_to_who_asks_from_outside() -> None:
    root = start(scenarios.echo, value=1)
    Execution.objects.filter(pk=root.pk).update(result=None)
    with pytest.raises(OutcomeLost, match="has succeeded, and its result is gone"):
        api.get_result(root, timeout=1)
    with pytest.raises(OutcomeLost):
        reload(root).get_result()


def test_what_a_process_keeps_for_a_parent_has_no_outcome_before_the_child_has() -> None:
    parent = Execution(pk=start(scenarios.echo).pk, fence=1)
    delivery = hand_off.Delivery(parent.pk)
    wait = transitions.Invocation("a", _child(parent), "", None, "cancel")  # type: ignore[arg-type]
    delivery.keep(parent, wait, {})
    assert delivery.recall(Execution(pk=parent.pk, fence=2)) is None


def _child(parent: Execution) -> Any:
    return transitions.NewExecution(parent.pk, scenarios.echo.name, "q", "[[],{}]", 1)


def test_an_outcome_that_is_gone_travels_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(OutcomeLost("gone", step="a")))
    assert (str(error), error.step, describe(error, 100).type) == ("gone", "a", class_name(OutcomeLost))
