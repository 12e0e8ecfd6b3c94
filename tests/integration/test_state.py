"""What bodies tell: ``ctx.progress`` and ``ctx.publish``, ``api.state``, and who may write it, and how often."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from collections.abc import Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from celery.result import AsyncResult
from django.contrib.auth.models import Permission
from django.db import DatabaseError, connection, transaction
from django.test.utils import CaptureQueriesContext

from conductor_app import ExecutionContext, api, testing, transitions
from conductor_app.body import state as telling
from conductor_app.body.journal import DatabaseJournal
from conductor_app.body.state import INTERVAL_SECONDS
from conductor_app.engine import pruner
from conductor_app.exceptions import (
    BlockingCallInEventLoop,
    ContextClosed,
    InvalidArgument,
    InvalidArgumentType,
    LeaseLost,
    NotSerializable,
    PayloadTooLarge,
)
from conductor_app.models import Execution, PublishedState
from conductor_app.store import clock
from conductor_app.transitions import stating
from conductor_app.values.state import MOST_BYTES, ChildrenProgress, Told
from tests.support import command
from tests.support.bodies import advance, child, class_name, durable, failure, go_on, reload, run, start
from tests.support.executions import OWNER, claimed, queued, running
from tests.support.results import using

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def one_write_and_the_last(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However long the machine stalls, no second passes within a run."""
    monkeypatch.setattr(telling, "INTERVAL_SECONDS", 3_600.0)
    yield
    clock.reset()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock by which a run writes, to be set."""
    seconds = [100.0]
    monkeypatch.setattr(telling, "INTERVAL_SECONDS", INTERVAL_SECONDS)
    monkeypatch.setattr(telling, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What has been written, in order."""
    told: list[Told] = []
    tell = DatabaseJournal.tell

    def note(journal: DatabaseJournal, what: Told, **how: Any) -> bool:
        told.append(what)
        return tell(journal, what, **how)

    monkeypatch.setattr(DatabaseJournal, "tell", note)
    return told


@pytest.fixture
def unthrottled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "INTERVAL_SECONDS", 0.0)


@durable(max_retries=0)
def counting(ctx: ExecutionContext, rows: int = 3, key: str = "", value: Any = None) -> str:
    for row in range(rows):
        ctx.progress(row + 1, rows, f"row {row + 1}")
    if key:
        ctx.publish(key, value)
    return "done"


@durable
def napping(ctx: ExecutionContext) -> str:
    ctx.progress(1, 3, "before the nap")
    ctx.publish("phase", "nap")
    ctx.sleep("nap", 60)
    ctx.progress(2, 3, "after it")
    ctx.sleep("another", 60)
    ctx.progress(3, 3)
    return "rested"


def states() -> list[tuple[Any, ...]]:
    return list(PublishedState.objects.values_list("done", "total", "note", "published"))


# ------------------------------------------------------------------------------------------------------------- reading


def test_the_last_word_of_a_body_is_there_at_its_end() -> None:
    execution = run(counting, key="url", value="https://example.com/7")

    state = api.state(execution)
    assert (state.done, state.total, state.note) == (3, 3, "row 3")
    assert isinstance(state.done, int)
    assert state.published == {"url": "https://example.com/7"}
    assert (state.status, state.is_final, state.fraction) == ("succeeded", True, 1.0)
    assert state.updated_at is not None


def test_a_state_is_json() -> None:
    when = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)
    execution = run(counting, key="of", value={"at": when, "price": Decimal("4.20"), "raw": b"abc", "n": None})

    assert api.state(execution.pk).published["of"]["at"] == when
    found = api.state(str(execution.pk)).as_dict()
    assert found.pop("updated_at") == api.state(execution).updated_at.isoformat()  # type: ignore[union-attr]
    assert found == {
        "execution_id": str(execution.pk),
        "status": "succeeded",
        "is_final": True,
        "done": 3,
        "total": 3,
        "fraction": 1.0,
        "note": "row 3",
        "published": {"of": {"at": "2026-11-30T12:00:00Z", "price": "4.20", "raw": "abc", "n": None}},
        "children": None,
    }


def test_an_execution_that_has_told_nothing_has_a_state() -> None:
    state = api.state(queued())
    assert (state.status, state.done, state.total, state.fraction, state.note) == ("queued", None, None, None, "")
    assert (state.published, state.children, state.updated_at) == ({}, None, None)


def test_there_is_no_state_of_what_there_is_not() -> None:
    with pytest.raises(Execution.DoesNotExist, match="There is no execution"):
        api.state("00000000-0000-0000-0000-000000000000")
    with pytest.raises(InvalidArgument, match="named by a UUID"):
        api.state("seven")


def test_a_state_is_read_in_two_queries_at_most() -> None:
    execution = start(napping)
    with CaptureQueriesContext(connection) as queries:
        api.state(execution.pk)
    assert len(queries) == 2


@pytest.mark.django_db(transaction=True)
def test_an_event_loop_reads_it_too() -> None:
    execution = run(counting)

    async def read() -> Any:
        with pytest.raises(BlockingCallInEventLoop, match=r"await api.astate\(…\)"):
            api.state(execution)
        return await api.astate(execution)

    assert asyncio.run(read()) == api.state(execution)


@pytest.mark.parametrize(
    ("done", "total", "fraction"), [(1, 4, 0.25), (0, 0, 1.0), (5, 4, 1.0), (0.5, 1, 0.5), (3, None, None)]
)
def test_a_fraction_is_between_nothing_and_all(done: float, total: float | None, fraction: float | None) -> None:
    @durable
    def telling_once(ctx: ExecutionContext) -> None:
        ctx.progress(done, total)

    state = api.state(run(telling_once))
    assert (state.done, state.total, state.fraction) == (done, total, fraction)


# ----------------------------------------------------------------------------------------------------- a map by itself


@durable
def sleeping(ctx: ExecutionContext, seconds: int) -> int:
    ctx.sleep("nap", seconds)
    return seconds


@durable
def mapping(ctx: ExecutionContext, with_progress: bool = False) -> list[int]:
    if with_progress:
        ctx.progress(1, 2, "phase one")
    return ctx.map("send", sleeping, [10, 20, 30])


def test_a_maps_progress_is_there_by_itself() -> None:
    execution = start(mapping)
    seen = [api.state(execution)]
    for _ in range(2):
        advance(11)
        seen.append(api.state(execution))

    assert [(state.done, state.total) for state in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[1].children == ChildrenProgress("send", 1, 3)
    assert seen[1].as_dict()["children"] == {"step": "send", "done": 1, "total": 3}
    assert not PublishedState.objects.exists()
    advance(11)
    assert (api.state(execution).status, api.state(execution).children) == ("succeeded", None)


def test_what_a_body_says_itself_stands_beside_a_maps_progress() -> None:
    execution = start(mapping, with_progress=True)
    advance(11)

    state = api.state(execution)
    assert (state.done, state.total, state.note) == (1, 2, "phase one")
    assert state.children == ChildrenProgress("send", 1, 3)


def test_a_gathers_progress_is_there_by_itself() -> None:
    @durable
    def gathering(ctx: ExecutionContext) -> list[Any]:
        ctx.publish("kind", "gather")
        return ctx.gather(ctx.start("a", sleeping, 10), ctx.start("b", sleeping, 20))

    execution = start(gathering)
    advance(11)
    state = api.state(execution)
    assert (state.done, state.total, state.published) == (1, 2, {"kind": "gather"})


# --------------------------------------------------------------------------------------------------- how it is written


def test_a_run_writes_at_once_and_at_its_end_and_no_more_often_than_once_a_second(written: list[Told]) -> None:
    run(counting, rows=1_000)
    assert [told.done for told in written] == [1, 1_000]


def test_a_second_later_it_is_written_again(written: list[Told], now: list[float]) -> None:
    @durable
    def slowly(ctx: ExecutionContext) -> None:
        for row in range(10):
            ctx.progress(row)
            now[0] += 0.4

    run(slowly)
    assert [told.done for told in written] == [0, 3, 6, 9]


def test_a_later_call_passes_on_what_waited(written: list[Told], now: list[float]) -> None:
    def second() -> None:
        now[0] += 1

    @durable
    def stepping(ctx: ExecutionContext) -> None:
        ctx.progress(1)
        ctx.publish("a", 1)
        ctx.step("one", second)
        assert len(written) == 1
        ctx.step("two", second)
        assert len(written) == 2
        ctx.publish("a", 2)
        ctx.checkpoint()
        assert len(written) == 3

    assert run(stepping).status == "succeeded"


def test_a_replay_neither_writes_nor_rewinds(written: list[Told]) -> None:
    seen: list[Any] = []

    @durable
    def looking(ctx: ExecutionContext) -> None:
        ctx.progress(1, 3, "before the nap")
        ctx.publish("phase", "nap")
        seen.append(api.state(ctx.execution_id).done)
        ctx.sleep("nap", 60)
        ctx.progress(2, 3, "after it")
        ctx.sleep("another", 60)
        ctx.progress(3, 3)

    execution = start(looking)
    assert states() == [(1, 3, "before the nap", '{"phase":"nap"}')]
    advance(61)
    assert states() == [(2, 3, "after it", '{"phase":"nap"}')]
    before = len(written)
    advance(61)
    assert reload(execution).status == "succeeded"
    assert [told.done for told in written[before:]] == [3]
    assert seen == [1, 1, 2]


def test_a_run_that_tells_nothing_costs_no_statement() -> None:
    @durable
    def silent(ctx: ExecutionContext) -> None:
        ctx.sleep("nap", 60)

    with CaptureQueriesContext(connection) as queries:
        start(silent)
        advance(61)
    assert not [query for query in queries if "publishedstate" in query["sql"]]


def test_a_first_run_reads_nothing() -> None:
    with CaptureQueriesContext(connection) as queries:
        run(counting, rows=1)
    assert len([query for query in queries if "publishedstate" in query["sql"]]) == 1


def test_a_retry_keeps_the_state_until_it_tells_another() -> None:
    @durable(max_retries=1, default_retry_delay=10, retry_backoff=False)
    def failing(ctx: ExecutionContext) -> None:
        if ctx.attempt == 1:
            ctx.progress(5, 10)
            ctx.publish("kept", True)
            raise ValueError("again")
        ctx.publish("more", ctx.attempt)
        ctx.sleep("nap", 60)

    execution = start(failing)
    assert (api.state(execution).done, api.state(execution).published) == (5, {"kept": True})
    advance(11)
    assert (api.state(execution).done, api.state(execution).published) == (5, {"kept": True, "more": 2})


def test_a_failure_has_its_last_word() -> None:
    @durable(max_retries=0)
    def failing(ctx: ExecutionContext) -> None:
        ctx.progress(1, 10)
        ctx.progress(2, 10, "row 2")
        raise ValueError("no")

    state = api.state(run(failing))
    assert (state.status, state.done, state.note) == ("failed", 2, "row 2")


def test_a_cancelled_body_has_its_last_word() -> None:
    @durable
    def cancelling(ctx: ExecutionContext) -> None:
        ctx.progress(1, 10)
        ctx.progress(2, 10)
        transitions.request_cancel(ctx.execution_id, "enough")
        ctx.step("next", int)

    state = api.state(run(cancelling))
    assert (state.status, state.done) == ("cancelled", 2)


def test_a_published_value_is_the_one_of_the_call() -> None:
    @durable
    def changing(ctx: ExecutionContext) -> None:
        rows = [1]
        ctx.progress(0)
        ctx.publish("rows", rows)
        rows.append(2)

    assert api.state(run(changing)).published == {"rows": [1]}


def test_the_function_of_a_step_may_tell(written: list[Told]) -> None:
    @durable
    def importing(ctx: ExecutionContext) -> int:
        def rows() -> int:
            for row in range(3):
                ctx.progress(row + 1, 3)
            return 3

        return ctx.step("rows", rows) + ctx.atomic_step("again", rows)

    execution = run(importing)
    assert execution.get_result() == 6
    assert [told.done for told in written] == [1, 3]


def test_an_atomic_step_does_not_take_what_is_told_along(written: list[Told], unthrottled: None) -> None:
    @durable
    def importing(ctx: ExecutionContext) -> None:
        def fails() -> None:
            ctx.progress(1)
            assert not written
            raise ValueError("undone")

        with pytest.raises(ValueError, match="undone"):
            ctx.atomic_step("rows", fails)
        ctx.checkpoint()
        assert [told.done for told in written] == [1]

    assert run(importing).status == "succeeded"


def test_nothing_is_written_in_a_transaction_of_the_bodys(written: list[Told]) -> None:
    @durable
    def inside(ctx: ExecutionContext) -> None:
        with transaction.atomic():
            ctx.progress(1)
            ctx.publish("a", 1)
            assert not written
            transaction.set_rollback(True)
        ctx.progress(2)
        assert len(written) == 1

    assert run(inside).status == "succeeded"
    assert api.state(Execution.objects.get()).published == {"a": 1}


def test_a_context_tells_nothing_after_its_run() -> None:
    kept: list[ExecutionContext] = []

    @durable
    def keeping(ctx: ExecutionContext) -> None:
        kept.append(ctx)

    run(keeping)
    with pytest.raises(ContextClosed, match=r"ctx.progress\(\) was called after the run had ended"):
        kept[0].progress(1)
    with pytest.raises(ContextClosed):
        kept[0].publish("a", 1)


# ------------------------------------------------------------------------------------------------------ who may write


def test_a_zombie_cannot_tell() -> None:
    zombie = running()
    assert stating.state(zombie, Told(done=1), is_new=True)
    transitions.lose(zombie.pk, owner=OWNER)
    for waits in (False, True):
        for is_new in (False, True):
            with pytest.raises(LeaseLost):
                stating.state(zombie, Told(done=2), is_new=is_new, waits=waits)
    now = claimed(zombie, "test@host/2")
    with pytest.raises(LeaseLost):
        stating.state(zombie, Told(done=2), is_new=False)
    assert stating.state(now, Told(done=3), is_new=False)
    assert states() == [(3, None, "", "")]


def test_a_zombie_is_told_so_at_its_call() -> None:
    @durable(max_retries=3)
    def losing(ctx: ExecutionContext) -> None:
        transitions.lose(ctx.execution_id, owner=reload(ctx.execution_id).lease_owner)
        with pytest.raises(LeaseLost):
            ctx.progress(1)
        raise AssertionError("no outcome of a zombie's counts")

    execution = start(losing)
    assert (execution.status, states()) == ("queued", [])


def test_what_a_run_before_this_one_has_stored_after_the_look_is_overwritten() -> None:
    execution = running()
    assert stating.state(execution, Told(done=1), is_new=True)
    assert stating.state(execution, Told(done=2), is_new=True)
    assert states() == [(2, None, "", "")]


def test_the_database_may_be_away(monkeypatch: pytest.MonkeyPatch, written: list[Told]) -> None:
    away = [True]
    tell = stating.state

    def tell_unless_away(*args: Any, **kwargs: Any) -> bool:
        if away[0]:
            raise DatabaseError("away")
        return tell(*args, **kwargs)

    monkeypatch.setattr(stating, "state", tell_unless_away)

    @durable(max_retries=0)
    def telling_on(ctx: ExecutionContext) -> str:
        for row in range(10):
            ctx.progress(row)
        assert len(written) == 1  # it does not try again at once
        away[0] = False
        return "done"

    execution = run(telling_on)
    assert (execution.status, states()) == ("succeeded", [(9, None, "", "")])


def test_an_outage_at_the_end_of_a_run_does_not_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **kwargs: Any) -> bool:
        raise DatabaseError("away")

    monkeypatch.setattr(stating, "state", away)
    monkeypatch.setattr(stating, "told_by", away)
    execution = start(napping)
    advance(61)
    advance(61)
    assert (reload(execution).status, states()) == ("succeeded", [])


def test_what_a_lost_run_had_not_stored_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    @durable(max_retries=3)
    def dying(ctx: ExecutionContext) -> None:
        ctx.progress(1, 2)
        ctx.publish("receipt", 7)  # a moment after a write
        ctx.step("pay", int)
        if ctx.attempt == 1:
            monkeypatch.setattr(ctx._teller, "finish", lambda *args, **kwargs: None)
            raise ValueError("as if it had died")

    execution = start(dying)
    assert api.state(execution).published == {}
    advance(600)
    assert reload(execution).status == "succeeded"
    assert api.state(execution).published == {"receipt": 7}
    assert api.state(execution).done == 1


# -------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda ctx: ctx.progress("1"), InvalidArgumentType, "done must be a number, got str '1'"),
        (lambda ctx: ctx.progress(True), InvalidArgumentType, "done must be a number, got bool"),
        (lambda ctx: ctx.progress(None), InvalidArgumentType, "done must be a number, got NoneType"),
        (lambda ctx: ctx.progress(1, "2"), InvalidArgumentType, "total must be a number, got str '2'"),
        (lambda ctx: ctx.progress(-1), InvalidArgument, "done must be a finite number from 0"),
        (lambda ctx: ctx.progress(1, -1), InvalidArgument, "total must be a finite number from 0"),
        (lambda ctx: ctx.progress(math.nan), InvalidArgument, "done must be a finite number"),
        (lambda ctx: ctx.progress(1, math.inf), InvalidArgument, "total must be a finite number"),
        (lambda ctx: ctx.progress(2**53 + 1), InvalidArgument, "done must be a finite number"),
        (lambda ctx: ctx.progress(10**400), InvalidArgument, "done must be a finite number"),
        (lambda ctx: ctx.progress(1, 2, 3), InvalidArgumentType, "note must be str, got int 3"),
        (lambda ctx: ctx.progress(1, 2, "a\0b"), NotSerializable, "note"),
        (lambda ctx: ctx.progress(1, 2, "n" * MOST_BYTES), PayloadTooLarge, "note"),
        (lambda ctx: ctx.publish(7, 1), InvalidArgumentType, "key of ctx.publish"),
        (lambda ctx: ctx.publish("", 1), InvalidArgument, "key of ctx.publish"),
        (lambda ctx: ctx.publish("ä", 1), InvalidArgument, "key of ctx.publish"),
        (lambda ctx: ctx.publish("a", object()), NotSerializable, r'value of ctx.publish\("a"\)'),
        (lambda ctx: ctx.publish("a", {"b": math.nan}), NotSerializable, r'\("a"\)\["b"\]|ctx.publish'),
        (lambda ctx: ctx.publish("a", "v" * MOST_BYTES), PayloadTooLarge, r'value of ctx.publish\("a"\)'),
    ],
)
def test_what_cannot_be_told_is_refused_at_the_call(call: Any, error: type[Exception], text: str) -> None:
    @durable(max_retries=0)
    def misusing(ctx: ExecutionContext) -> None:
        ctx.progress(1, 2, "before")
        ctx.publish("kept", 1)
        with pytest.raises(error, match=text):
            call(ctx)
        call(ctx)

    execution = run(misusing)
    assert failure(execution).error_class == class_name(error)
    assert states() == [(1, 2, "before", '{"kept":1}')]


def test_all_that_is_told_has_16_kib(unthrottled: None) -> None:
    @durable(max_retries=0)
    def filling(ctx: ExecutionContext) -> None:
        ctx.publish("a", "v" * 8_000)
        ctx.publish("b", "v" * 8_000)
        with pytest.raises(PayloadTooLarge, match="may have 16384 bytes; this would make 24"):
            ctx.publish("c", "v" * 8_000)
        with pytest.raises(PayloadTooLarge, match="may have 16384 bytes"):
            ctx.progress(1, note="n" * 500)
        ctx.publish("a", "")
        ctx.publish("c", "v" * 8_000)

    assert sorted(api.state(run(filling)).published) == ["a", "b", "c"]


def test_what_earlier_runs_have_told_counts() -> None:
    @durable(max_retries=0)
    def filling(ctx: ExecutionContext) -> None:
        ctx.publish("a", "v" * 10_000)
        ctx.sleep("nap", 60)
        ctx.publish("b", "v" * 10_000)

    execution = start(filling)
    advance(61)
    assert failure(execution).error_class == class_name(PayloadTooLarge)
    assert list(api.state(execution).published) == ["a"]


# ------------------------------------------------------------------------------------------------- other ways to see it


def test_a_result_says_it_beside_what_is_waited_for() -> None:
    with using("django-db"):
        result = napping.delay()
        go_on()
        told = {"progress": {"done": 1, "total": 3, "note": "before the nap"}, "published": {"phase": "nap"}}
        assert AsyncResult(result.id).info == {"waiting_for": "nap", "child": None, **told}
        advance(61)
        info = AsyncResult(result.id).info
        assert (info["waiting_for"], info["progress"]["done"], info["published"]) == ("another", 2, {"phase": "nap"})


def test_a_result_says_what_an_earlier_run_has_told() -> None:
    @durable
    def telling_first(ctx: ExecutionContext) -> None:
        ctx.progress(1, 2)
        ctx.sleep("nap", 60)
        ctx.sleep("another", 60)

    with using("django-db"):
        result = telling_first.delay()
        go_on()
        advance(61)
        info = AsyncResult(result.id).info
        assert (info["waiting_for"], info["progress"]) == ("another", {"done": 1, "total": 2, "note": ""})


def test_a_body_that_runs_alone_tells_a_test() -> None:
    seen: dict[str, Any] = {}
    testing.run(napping, state=seen)
    assert seen == {"done": 3, "total": 3, "note": "", "published": {"phase": "nap"}}


def test_a_child_that_runs_in_a_test_has_a_state_of_its_own() -> None:
    @durable
    def telling_parent(ctx: ExecutionContext) -> Any:
        ctx.publish("parent", 1)
        return ctx.invoke("count", counting)

    seen: dict[str, Any] = {}
    testing.run(telling_parent, children={counting: counting}, state=seen)
    assert seen == {"done": None, "total": None, "note": "", "published": {"parent": 1}}


# -------------------------------------------------------------------------------------------------- afterwards


def test_a_rerun_begins_without_a_state() -> None:
    execution = run(counting)
    again = api.rerun(execution)
    assert api.state(again).done is None


def test_a_fork_tells_itself_what_its_copied_steps_passed() -> None:
    @durable
    def forked(ctx: ExecutionContext) -> None:
        ctx.publish("order", 7)
        ctx.step("one", int)
        ctx.progress(1, 2)
        ctx.step("two", int)

    execution = run(forked)
    fork = api.fork(execution, before="two")
    assert api.state(fork).published == {}
    go_on()
    state = api.state(fork)
    assert (state.status, state.done, state.published) == ("succeeded", 1, {"order": 7})


def test_a_fork_whose_calls_are_all_before_its_last_step_tells_them_too() -> None:
    @durable
    def forked(ctx: ExecutionContext, naps: bool = True) -> None:
        ctx.publish("order", 7)
        ctx.step("one", int)
        ctx.step("two", int)

    fork = api.fork(run(forked), before="two")
    go_on()
    assert api.state(fork).published == {"order": 7}


def test_a_state_is_pruned_with_its_execution() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.progress(1)
        ctx.invoke("count", counting)

    execution = run(parent)
    assert api.state(child(execution, "count")).done == 3
    assert PublishedState.objects.count() == 2
    clock.shift(dt.timedelta(days=1))
    assert pruner.prune(dt.timedelta(0)) == 2
    assert not PublishedState.objects.exists()


# ------------------------------------------------------------------------------------------------- the admin, commands


@pytest.fixture
def told() -> Execution:
    """One that has told something, and waits for the children of a map."""

    @durable
    def telling_much(ctx: ExecutionContext) -> Any:
        ctx.progress(2, 8, "rows of <Ana>")
        ctx.publish("account", {"password": "s3cret", "name": "Ana"})
        return ctx.map("send", sleeping, [10, 20])

    return start(telling_much)


def page(client: Any, execution: Execution) -> str:
    return str(client.get(f"/admin/conductor_app/execution/{execution.pk}/change/").content.decode())


def test_the_page_of_an_execution_has_a_bar(admin_client: Any, told: Execution) -> None:
    html = page(admin_client, told)
    assert (
        html.count('<progress class="cd-progress" value="0.2500" max="1" aria-label="progress">') == 2
    )  # and the tree
    assert "<span>2 of 8</span> <bdi>rows of &lt;Ana&gt;</bdi>" in html
    assert "Ana&quot;" in html
    assert "s3cret" not in html


def test_whoever_may_not_see_payloads_sees_the_bar_alone(client: Any, django_user_model: Any, told: Execution) -> None:
    user = django_user_model.objects.create_user("viewer", password="x", is_staff=True)
    user.user_permissions.add(*Permission.objects.filter(codename="view_execution"))
    client.force_login(user)
    html = page(client, told)
    assert "<span>2 of 8</span>" in html
    assert "Ana" not in html
    document = client.get(f"/admin/conductor_app/execution/{told.pk}/json/").json()
    assert (document["progress"]["done"], "note" in document["progress"], "published" in document) == (2, False, False)


def test_a_map_has_a_bar_by_itself(admin_client: Any) -> None:
    execution = start(mapping)
    advance(11)
    assert "<span>1 of 3</span>" in page(admin_client, execution)


def test_the_json_of_an_execution_has_its_state(admin_client: Any, told: Execution) -> None:
    document = admin_client.get(f"/admin/conductor_app/execution/{told.pk}/json/").json()
    assert document["progress"].pop("updated_at")
    assert document["progress"] == {"done": 2, "total": 8, "note": "rows of <Ana>"}
    assert document["published"] == {"account": {"password": "********", "name": "Ana"}}


def test_a_state_that_is_damaged_is_shown_all_the_same(admin_client: Any, told: Execution) -> None:
    PublishedState.objects.update(published='{"a":', done=1e300)
    assert "{&quot;a&quot;:" in page(admin_client, told)
    assert "{" in command.told("show", told.pk).out


def test_the_command_shows_it(told: Execution) -> None:
    text = command.told("show", told.pk).out
    assert "2 of 8 (25%), rows of <Ana>" in text
    assert '{"account": {"password": "********", "name": "Ana"}}' in text
    document = command.told("show", told.pk, "--json").json["execution"]
    assert document["progress"]["done"] == 2
    assert document["published"] == {"account": {"password": "********", "name": "Ana"}}
