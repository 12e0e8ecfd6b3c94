"""Limits: who may run, be open, or start; parked executions, and who gets a place when one is free."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import random
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from conductor_app import ChildFailed, Limit, LimitDeadlock, api, transitions
from conductor_app.engine import claims, pruner, sweeper
from conductor_app.engine.hand_off import Delivery
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import ActionRefused, InvalidArgument, InvalidArgumentType
from conductor_app.models import Execution, FailedExecution, LimitKey, Place
from conductor_app.store import clock
from conductor_app.store.owners import lease_owner
from conductor_app.store.statements import fetch
from conductor_app.testing import advance
from conductor_app.transitions import limiting, limiting_at_once
from tests.support.bodies import durable, go_on, reload
from tests.support.command import told
from tests.support.executions import committing

pytestmark = pytest.mark.django_db(transaction=True)

_names = itertools.count(1)
#: The year in which a parked execution is due, and not a part of an id.
YEAR = re.compile(r"(?<![0-9a-f-])9000(?![0-9a-f])")


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test, and takes a second for that."""
    with committing(django_db_blocker):
        yield
    clock.reset()


@pytest.fixture(autouse=True, params=["one statement", "script"] if connection.vendor == "postgresql" else ["script"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test with both forms of the moves of limits."""
    if request.param == "script":
        monkeypatch.setattr(limiting_at_once, "is_possible", lambda _using: False)
    return str(request.param)


def limit(number: int | None = None, **options: Any) -> Limit:
    return Limit(f"limit-{next(_names)}", number, **options)


def take(task: Any, execution: Any) -> Execution:
    """Claim as a worker does."""
    return claims.take(task, uuid.UUID(str(getattr(execution, "id", execution))), "w@h")


def parked(task: Any, execution: Any) -> str:
    """Let a worker try, which is to park it; return for what it waits."""
    with pytest.raises(RunEnded, match="waits for a place") as ended:
        take(task, execution)
    row = reload(execution)
    assert (row.status, row.attempt, row.fence) == ("queued", 1, 0)
    assert Place.objects.get(execution=row, state="parked")
    return str(ended.value)


def states() -> dict[str, int]:
    found = Place.objects.values_list("state", flat=True)
    return {state: list(found).count(state) for state in sorted(set(found))}


def due(execution: Any) -> bool:
    return bool(Execution.objects.filter(pk=execution.id).claimable().exists())


# ------------------------------------------------------------------------------------------------------------ declared


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Limit("x"), InvalidArgument, "needs either a number"),
        (lambda: Limit("x", 1, rate="1/s"), InvalidArgument, "needs either a number"),
        (lambda: Limit("x", 1), InvalidArgument, 'holds="run" counts bodies that run'),
        (lambda: Limit("x", 1, holds="ever"), InvalidArgument, "has to say what it counts"),  # type: ignore[arg-type]
        (lambda: Limit("x", 0, holds="run"), InvalidArgument, "must be ≥ 1, got 0"),
        (lambda: Limit("x", True, holds="run"), InvalidArgumentType, "must be int, got bool"),
        (lambda: Limit("x", 1.5, holds="run"), InvalidArgumentType, "must be int"),  # type: ignore[arg-type]
        (lambda: Limit("x", 1, holds="run", burst=2), InvalidArgument, "burst belongs to a rate"),
        (lambda: Limit("x", rate="1/s", holds="run"), InvalidArgument, "holds belongs to a number"),
        (lambda: Limit("x", rate="0/s"), InvalidArgument, "above 0"),
        (lambda: Limit("x", rate="often"), InvalidArgument, "\"100/m\", got 'often'"),
        (lambda: Limit("x", rate=5), InvalidArgumentType, "rate must be str"),  # type: ignore[arg-type]
        (lambda: Limit("x", rate="1/s", burst=0), InvalidArgument, "burst must be ≥ 1"),
        (lambda: Limit("", 1, holds="run"), InvalidArgument, "1–100 printable"),
        (lambda: Limit(" x", 1, holds="run"), InvalidArgument, "without spaces at its ends"),
        (lambda: Limit(7, 1, holds="run"), InvalidArgumentType, "name of a limit must be str"),  # type: ignore[arg-type]
        (lambda: Limit("x", 1, holds="run", per=3), InvalidArgumentType, "argument or a function"),  # type: ignore[arg-type]
    ],
)
def test_a_limit_that_means_nothing_is_refused_where_it_is_written(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_two_limits_of_one_name_that_differ_are_refused() -> None:
    first = limit(1, holds="run")
    assert Limit(first.name, 1, holds="run") == first
    with pytest.raises(InvalidArgument, match=r"Two limits are called .* and differ"):
        Limit(first.name, 2, holds="run")


def test_a_task_refuses_limits_that_it_cannot_have() -> None:
    def decorate(limits: Any) -> None:
        @durable(limits=limits)
        def body(ctx: Any, account: str) -> None: ...

    one = limit(1, holds="run")
    for given, error, message in (
        ([limit(1, holds="run", per="customer")], InvalidArgument, "has no such argument: it has account"),
        (one, InvalidArgumentType, r"Write limits=\[…\]"),
        (["bank"], InvalidArgumentType, "one of str"),
        ([one, one], InvalidArgument, "counts once"),
        ([limit(1, holds="run") for _ in range(5)], InvalidArgument, "4 limits at most"),
    ):
        with pytest.raises(error, match=message):
            decorate(given)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, InvalidArgumentType, "must be str, int or UUID, got NoneType"),
        (1.5, InvalidArgumentType, "got float"),
        ("", InvalidArgument, "must have 1–255 bytes, got 0"),
        ("ä" * 128, InvalidArgument, "got 256"),
        ("a ", InvalidArgument, "without spaces"),
        (["a"], InvalidArgumentType, "got list"),
    ],
)
def test_a_key_that_cannot_be_one_is_an_error_of_the_call(value: Any, error: Any, message: str) -> None:
    bank = limit(1, holds="run", per="account")

    @durable(limits=[bank])
    def body(ctx: Any, account: Any = None) -> None: ...

    with pytest.raises(error, match=message):
        body.delay(account=value)
    assert not Execution.objects.exists()


def test_a_key_is_an_argument_however_it_is_given_or_what_a_function_says() -> None:
    named, computed = limit(1, holds="run", per="account"), limit(1, holds="run", per=lambda account, **_: account * 2)

    @durable(limits=[named, computed])
    def body(ctx: Any, account: Any, region: str = "eu") -> None: ...

    @durable(limits=[named])
    def other(ctx: Any, **given: Any) -> None: ...

    assert [key for _, key in body.limit_keys([7], {})] == ["7", "14"]
    assert [key for _, key in body.limit_keys([], {"account": "a"})] == ["a", "aa"]
    assert other.limit_keys([], {"account": "b"}) == [(named, "b")]
    with pytest.raises(InvalidArgument, match='the payload has no "account"'):
        other.delay(region="us")


# ---------------------------------------------------------------------------------------------------------- run, open


def test_at_most_so_many_run_and_the_next_one_gets_the_place_of_the_first_that_ends() -> None:
    bank = limit(2, holds="run")

    @durable(limits=[bank])
    def body(ctx: Any) -> str:
        return "done"

    first, second, third, fourth = [body.delay() for _ in range(4)]
    running = [take(body, first), take(body, second)]
    assert f'limit "{bank.name}"' in parked(body, third)
    parked(body, fourth)
    assert sweeper.sweep(publish=False)["places"] == 0, "nothing is free"

    transitions.release(running[0])
    assert due(third)
    assert not due(fourth)
    assert states() == {"granted": 1, "held": 1, "parked": 1}
    # Granted is taken: the one that has just been put back waits, too.
    with pytest.raises(RunEnded, match="waits for a place"):
        take(body, first)
    take(body, third)
    assert states() == {"held": 2, "parked": 2}


def test_an_open_place_is_kept_while_its_execution_waits_and_a_run_place_is_not() -> None:
    open_, run = limit(1, holds="open"), limit(1, holds="run")

    @durable(limits=[open_])
    def keeps(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    @durable(limits=[run])
    def gives(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    first, second = keeps.delay(), keeps.delay()
    go_on()
    assert [reload(one).status for one in (first, second)] == ["waiting", "queued"]
    others = [gives.delay() for _ in range(2)]
    go_on()
    assert [reload(one).status for one in others] == ["waiting", "waiting"]

    api.send_event(first, "approved")
    go_on()
    assert [reload(one).status for one in (first, second)] == ["succeeded", "waiting"]


@pytest.mark.parametrize("holds", ["run", "open"])
def test_nobody_else_is_admitted_while_a_dead_workers_execution_waits_for_its_next_run(holds: Any) -> None:
    bank = limit(1, holds=holds)

    @durable(limits=[bank], max_retries=3)
    def body(ctx: Any) -> None: ...

    first, second = body.delay(), body.delay()
    running = take(body, first)
    parked(body, second)
    transitions.lose(running.pk, owner=running.lease_owner)
    assert reload(first).status == "queued"
    sweeper.sweep(publish=False)
    assert not due(second)
    clock.shift(dt.timedelta(hours=1))
    assert take(body, first).attempt == 2
    assert not due(second)


def test_a_pause_between_attempts_gives_the_place_of_a_run_to_others() -> None:
    bank = limit(1, holds="run")

    @durable(limits=[bank], max_retries=3, default_retry_delay=3_600, retry_backoff=False)
    def fails(ctx: Any, fails: bool) -> str:
        if fails and ctx.attempt == 1:
            raise ValueError("declined")
        return "done"

    first, second = fails.delay(fails=True), fails.delay(fails=False)
    go_on()
    assert [reload(one).status for one in (first, second)] == ["queued", "succeeded"]
    advance(3_600)
    assert reload(first).status == "succeeded"
    assert not Place.objects.exists()


@pytest.mark.parametrize("end", ["cancel", "expire", "fail"])
def test_each_way_to_end_hands_an_open_place_on(end: str) -> None:
    bank = limit(1, holds="open")

    @durable(limits=[bank], max_retries=0)
    def body(ctx: Any) -> None:
        ctx.wait_for("answer", "approved", timeout=60)

    first, second, third = body.delay(), body.apply_async(expires=30), body.delay()
    go_on()
    assert Place.objects.filter(state="parked").count() == 2
    if end == "cancel":
        api.cancel(second)
        api.cancel(first)
    elif end == "expire":
        clock.shift(dt.timedelta(seconds=40))
        sweeper.sweep(publish=False)
        assert reload(second).status == "cancelled"
        api.cancel(first)
    else:
        api.cancel(second)
        clock.shift(dt.timedelta(seconds=70))
    go_on()
    assert reload(first).is_final
    assert reload(third).status == "waiting"
    assert states() == {"held": 1}
    # An operator's retry asks for a place when it runs next.
    api.retry(first)
    assert reload(first).status == "waiting"
    api.send_event(first, "approved")
    go_on()
    assert reload(first).status == "queued"
    assert states() == {"held": 1, "parked": 1}


def test_keys_do_not_know_each_other_and_tasks_that_share_a_limit_do() -> None:
    bank = limit(1, holds="open", per="account")

    @durable(limits=[bank])
    def one(ctx: Any, account: str) -> None:
        ctx.wait_for("answer", "approved")

    @durable(limits=[bank])
    def other(ctx: Any, account: str) -> None:
        ctx.wait_for("answer", "approved")

    executions = [one.delay(account="a"), other.delay(account="a"), other.delay(account="b")]
    go_on()
    assert [reload(one).status for one in executions] == ["waiting", "queued", "waiting"]


def test_all_places_or_none() -> None:
    first, second = limit(1, holds="open"), limit(1, holds="open")

    @durable(limits=[second])
    def holder(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    @durable(limits=[first, second])
    def needs_both(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    @durable(limits=[first])
    def needs_one(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    holds = holder.delay()
    go_on()
    both = needs_both.delay()
    go_on()
    one = needs_one.delay()
    go_on()
    assert [reload(each).status for each in (both, one)] == ["queued", "waiting"], "it held nothing while it waited"
    api.send_event(holds, "approved")
    go_on()
    assert reload(both).status == "queued", "now for the other one"
    api.send_event(one, "approved")
    go_on()
    assert reload(both).status == "waiting"


def test_a_changed_number_applies_at_once_and_ends_nobody() -> None:
    bank = limit(3, holds="open")

    @durable(limits=[bank])
    def body(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    executions = [body.delay() for _ in range(5)]
    go_on()
    assert states() == {"held": 3, "parked": 2}
    bank.number = 1
    go_on()
    assert states() == {"held": 3, "parked": 2}
    api.send_event(executions[0], "approved")
    go_on()
    assert states() == {"held": 2, "parked": 2}
    bank.number = 4
    go_on()
    assert states() == {"held": 4}


def test_what_nobody_has_handed_on_the_next_sweep_does() -> None:
    bank = limit(1, holds="open")

    @durable(limits=[bank])
    def body(ctx: Any) -> None:
        ctx.wait_for("answer", "approved")

    first, second = body.delay(), body.delay()
    go_on()
    # Whoever ended it died before it could say so.
    Execution.objects.filter(pk=first.id).update(status="cancelled", finished_at=clock.now())
    assert not due(second)
    assert sweeper.sweep(publish=False)["places"] == 1
    assert due(second)
    assert sweeper.sweep(publish=False)["places"] == 0


def test_a_child_that_would_wait_for_its_own_parent_is_refused() -> None:
    bank = limit(1, holds="open", per="customer")

    @durable(limits=[bank])
    def sync(ctx: Any, customer: str) -> str:
        return "synced"

    @durable(limits=[bank], max_retries=0)
    def parent(ctx: Any, customer: str, childs: str, way: str) -> Any:
        if way == "map":
            return ctx.map("sync", sync, [{"customer": childs}])
        if way == "start":
            return ctx.gather(ctx.start("sync", sync, {"customer": childs}))
        return ctx.invoke("sync", sync, {"customer": childs})

    for way in ("invoke", "map", "start"):
        refused = parent.delay(customer=way, childs=way, way=way)
        go_on()
        row = reload(refused)
        assert row.status == "failed"
        assert not row.children.exists()
        failure = FailedExecution.objects.get(execution=row)
        assert failure.error_class.endswith("LimitDeadlock")
        assert f'needs a place of limit "{bank.name}" (key "{way}"), which its parent {row.pk} holds' in failure.message
        assert 'Use holds="run", or another key.' in failure.message
        fine = parent.delay(customer=f"{way}-1", childs=f"{way}-2", way=way)
        go_on()
        assert reload(fine).status == "succeeded"


def test_a_child_whose_grandparent_has_the_place_is_refused_and_one_of_two_places_is_not() -> None:
    one, two = limit(1, holds="open"), limit(2, holds="open")

    def tree(bank: Limit) -> Execution:
        @durable(limits=[bank])
        def leaf(ctx: Any) -> str:
            return "leaf"

        @durable(max_retries=0)
        def middle(ctx: Any) -> str:
            return str(ctx.invoke("leaf", leaf))

        @durable(limits=[bank], max_retries=0)
        def top(ctx: Any) -> str:
            try:
                return str(ctx.invoke("middle", middle))
            except ChildFailed as failed:
                return failed.error_class.rpartition(".")[2]

        result = top.delay()
        go_on()
        return reload(result)

    assert tree(one).get_result() == LimitDeadlock.__name__
    assert tree(two).get_result() == "leaf"


def test_a_map_lets_the_next_child_go_when_a_parked_one_is_cancelled() -> None:
    bank = limit(1, holds="open")

    @durable(limits=[bank])
    def child(ctx: Any, number: int) -> None:
        ctx.wait_for("answer", "approved")

    @durable
    def parent(ctx: Any) -> Any:
        outcomes = ctx.map("each", child, [{"number": n} for n in range(4)], max_parallel=2, return_exceptions=True)
        return len(outcomes)

    result = parent.delay()
    go_on()
    children = list(Execution.objects.filter(parent_id=result.id).order_by("position"))
    assert [Place.objects.filter(execution=one).count() for one in children] == [1, 1, 0, 0]
    waiting = next(one for one in children[:2] if one.status == "queued")
    api.cancel(waiting)
    go_on()
    assert Place.objects.filter(execution=children[2], state="parked").exists()
    for one in children:
        if not reload(one.pk).is_final:
            go_on()
            api.send_event(one.pk, "approved")
            go_on()
    assert reload(result).get_result() == 4


# --------------------------------------------------------------------------------------------------------------- rates


def test_a_rate_lets_a_burst_start_and_then_one_after_another() -> None:
    rate = limit(rate="6/h", burst=2)

    @durable(limits=[rate])
    def body(ctx: Any) -> float:
        return ctx.attempt

    executions = [body.delay() for _ in range(5)]
    assert go_on() == 5
    ended = [reload(one).is_final for one in executions]
    assert sum(ended) == 2
    for number in (3, 4, 5):
        advance(600)
        assert sum(reload(one).is_final for one in executions) == number


def test_an_attempt_takes_a_token_and_a_run_after_a_suspension_does_not() -> None:
    rate = limit(rate="1/h")

    @durable(limits=[rate])
    def child(ctx: Any) -> str:
        return "done"

    @durable
    def other(ctx: Any) -> str:
        return "done"

    slow = limit(rate="1/h")

    @durable(limits=[slow], max_retries=3, retry_backoff=1.0, retry_jitter=False)
    def body(ctx: Any) -> int:
        ctx.invoke("child", other)
        if ctx.attempt == 1:
            raise ValueError("declined")
        return int(ctx.attempt)

    result = body.delay()
    go_on()
    assert reload(result).attempt == 2
    advance(60)
    assert reload(result).status == "queued"
    advance(3_600)
    assert reload(result).get_result() == 2
    key = LimitKey.objects.get(limit=slow.name)
    assert key.paid_until is not None
    assert not Place.objects.exists()


def test_many_that_wait_for_a_rate_are_handed_instants_and_not_woken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = limit(rate="1/m")
    monkeypatch.setattr(limiting, "_horizon", lambda: dt.timedelta(minutes=5))

    @durable(limits=[rate])
    def body(ctx: Any) -> str:
        return "done"

    for _ in range(30):
        body.delay()
    go_on()
    assert Execution.objects.filter(status="succeeded").count() == 1
    granted = Place.objects.filter(state="granted")
    instants = sorted(granted.values_list("execution__due_at", flat=True))
    assert 5 <= len(instants) <= 6, "as far ahead as the next sweeps reach"
    assert all(dt.timedelta(seconds=59) <= later - earlier for earlier, later in itertools.pairwise(instants))
    for ended in range(2, 31):
        advance(60)
        assert Execution.objects.filter(status="succeeded").count() == ended
    assert Execution.objects.filter(status="succeeded").count() == 30
    assert not Place.objects.exists()


def test_one_that_is_cancelled_takes_no_start_from_the_others() -> None:
    rate = limit(rate="1/h")

    @durable(limits=[rate])
    def body(ctx: Any) -> str:
        return "done"

    first, second, third = body.delay(), body.delay(), body.delay()
    go_on()
    assert [reload(one).is_final for one in (first, second, third)] == [True, False, False]
    api.cancel(second)
    go_on()
    advance(3_600)
    assert reload(third).status == "succeeded"


@pytest.mark.parametrize(("each_minute", "burst"), [(30, 1), (30, 4), (7.5, 1)])
def test_no_window_has_more_starts_than_the_rate_and_the_burst_however_late_they_begin(
    each_minute: float, burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "_horizon", lambda: dt.timedelta(minutes=1))
    rate = limit(rate=f"{each_minute}/m", burst=burst)

    @durable(limits=[rate])
    def body(ctx: Any) -> None: ...

    for _ in range(40):
        body.delay()
    chance = random.Random(f"{each_minute} {burst}")
    starts: list[dt.datetime] = []
    pauses = 0
    while len(starts) < 40:
        limiting.hand_on((rate.name, ""))
        for row in Execution.objects.claimable().filter(due_at__lte=clock.now()).order_by("due_at"):
            with suppress(RunEnded):
                run = take(body, row.pk)
                assert run.run_started_at is not None
                starts.append(run.run_started_at)
        # Workers that lag, a machine that stalls, and a minute and a half in which nobody is there.
        clock.shift(dt.timedelta(seconds=chance.choice([0.1, 2, 3, 7, 25, 90])))
        pauses += 1
        assert pauses < 100, "they begin in the end"
    starts.sort()
    for first in starts:
        assert sum(first <= start <= first + dt.timedelta(minutes=1) for start in starts) <= each_minute + burst


def test_starts_that_come_too_late_get_the_next_instants_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiting, "_horizon", lambda: dt.timedelta(hours=1))
    rate = limit(rate="6/h")

    @durable(limits=[rate])
    def body(ctx: Any, number: int) -> None: ...

    executions = [body.delay(number) for number in range(8)]
    for one in executions:
        with suppress(RunEnded):
            take(body, one)
    clock.shift(dt.timedelta(minutes=45))
    late = [one for one in executions if due(one)]
    assert len(late) == 4
    for one in late:
        with suppress(RunEnded):
            take(body, one)
    assert [reload(one).status for one in executions] == ["running"] * 2 + ["queued"] * 6
    instants = [reload(one).due_at for one in executions[2:7]]
    assert all(later - earlier >= dt.timedelta(seconds=599) for earlier, later in itertools.pairwise(instants))
    clock.shift(dt.timedelta(seconds=660))
    assert [due(one) for one in executions[2:]] == [True] + [False] * 5


# ---------------------------------------------------------------------------------------------------------------- rest


def test_a_key_that_nobody_uses_is_forgotten() -> None:
    bank = limit(1, holds="run")

    @durable(limits=[bank])
    def body(ctx: Any) -> None: ...

    body.delay()
    go_on()
    assert LimitKey.objects.filter(limit=bank.name).exists()
    limiting.forget_old()
    assert LimitKey.objects.filter(limit=bank.name).exists()
    clock.shift(limiting.KEPT + dt.timedelta(seconds=1))
    limiting.forget_old()
    assert not LimitKey.objects.filter(limit=bank.name).exists()


def test_a_key_of_a_message_that_others_sent_fails_the_execution() -> None:
    bank = limit(1, holds="run", per="account")

    @durable(limits=[bank], max_retries=0)
    def body(ctx: Any, account: Any) -> None: ...

    result = body.delay(account="a")
    Execution.objects.filter(pk=result.id).update(payload='[[],{"account":null}]')
    go_on()
    row = reload(result)
    assert row.status == "failed"
    assert "must be str, int or UUID, got NoneType" in FailedExecution.objects.get(execution=row).message


def test_a_limited_child_is_not_handed_off() -> None:
    bank = limit(1, holds="run")

    @durable(limits=[bank])
    def child(ctx: Any) -> None: ...

    row = reload(child.delay())
    assert not Delivery(row.pk)._accepts(row, row)


def test_owner_of_a_place_is_no_process() -> None:
    """A second claim by the same process counts like any other."""
    bank = limit(1, holds="run")

    @durable(limits=[bank])
    def body(ctx: Any) -> None: ...

    first, second = body.delay(), body.delay()
    assert take(body, first).lease_owner == lease_owner("w@h")
    parked(body, second)


def statements(act: Callable[[], Any]) -> list[str]:
    """Return the statements that something takes, without BEGIN and COMMIT."""
    with CaptureQueriesContext(connection) as queries:
        act()
    return [query["sql"] for query in queries if query["sql"] not in ("BEGIN", "COMMIT")]


@pytest.mark.parametrize(
    "options", [{"number": 9, "holds": "run"}, {"number": 9, "holds": "open"}, {"rate": "9/s", "burst": 9}]
)
def test_a_limited_attempt_pays_two_statements_more(options: dict[str, Any], form: str) -> None:
    """One to read the payload, of which its keys are made, and one to hand on; its claim is one as any."""
    bank = limit(**options)

    @durable
    def plain(ctx: Any) -> None: ...

    @durable(limits=[bank])
    def limited(ctx: Any) -> None: ...

    counts = []
    for task in (limited, plain, limited):
        row = reload(task.delay())

        def attempt(task: Any = task, row: Any = row) -> None:
            transitions.succeed(take(task, row), "1")

        counts.append(len(statements(attempt)))
    if form == "one statement":
        assert [counts[0] - counts[1], counts[2] - counts[1]] == [2, 2], "a key that is new costs no more"
    else:
        assert counts[2] - counts[1] <= 16


def test_one_that_waits_is_parked_and_handed_its_place_by_a_statement_each(form: str) -> None:
    bank = limit(1, holds="run")

    @durable(limits=[bank])
    def body(ctx: Any) -> None: ...

    first, second = body.delay(), body.delay()
    run = take(body, first)
    parks = statements(lambda: parked(body, second))
    hands_on = statements(lambda: transitions.release(run))
    assert due(second)
    if form == "one statement":
        assert len([sql for sql in parks if "INSERT" in sql]) == 1
        assert len([sql for sql in hands_on if "SKIP LOCKED" in sql]) == 1


def test_the_keys_of_an_execution_are_computed_once_a_run() -> None:
    asked: list[str] = []

    def by_account(account: str) -> str:
        asked.append(account)
        return account

    bank = limit(1, holds="run", per=by_account)

    @durable(limits=[bank])
    def body(ctx: Any, account: str) -> None: ...

    body.delay("a")
    assert len(asked) == 1
    go_on()
    assert len(asked) == 2


@pytest.mark.skipif(connection.vendor != "postgresql", reason="looks into PostgreSQL")
def test_an_end_costs_the_same_with_10_000_parked_as_with_10(form: str) -> None:
    if form == "script":
        pytest.skip("the plan of the one statement")
    # Not a name that other tests have left rows of in the indexes.
    bank = Limit(f"limit-{uuid.uuid4()}", 1, holds="run", per="account")

    @durable(limits=[bank])
    def body(ctx: Any, account: str) -> None: ...

    read = {}
    for number in (10, 10_000):
        account = f"a-{number}"
        run = take(body, body.delay(account))
        _park_many(run, bank, account, number)
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
        Execution.objects.filter(pk=run.pk).update(
            status="succeeded", finished_at=clock.now(), lease_expires_at=None, lease_owner=""
        )
        plans = []

        def explained(using: str, sql: str, given: Any, plans: list[Any] = plans) -> Any:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", given)
                plans.append(cursor.fetchone()[0][0])
                transaction.set_rollback(True)
            return fetch(using, sql, given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limiting_at_once, "fetch", explained)
            limiting.leave(run.pk, names=[(bank.name, account)])
        assert Place.objects.filter(limit=bank.name, key=account, state="granted").count() == 1
        (plan,) = plans
        read[number] = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
        print(number, "parked:", read[number], "blocks,", plan["Execution Time"], "ms")
    assert read[10_000] <= read[10] + 30, "a level more of each index"


def _park_many(like: Execution, bank: Limit, account: str, number: int) -> None:
    """Store parked executions, by SQL."""
    executions, places = Execution._meta.db_table, Place._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH parked AS (
                INSERT INTO {executions} (id, task, queue, payload, status, attempt, root_id, depth, step, fence,
                    lease_owner, due_at, dispatch_at, dispatches, cancel_reason, options, created_at)
                SELECT key, task, queue, payload, 'queued', 1, key, 0, '', 0, '', '9000-01-01 00:00:00+00',
                    '9000-01-01 00:00:00+00', 0, '', '', now()
                FROM {executions}, (SELECT gen_random_uuid() AS key FROM generate_series(1, %s)) AS numbers
                WHERE id = %s RETURNING id
            )
            INSERT INTO {places} (execution_id, "limit", key, kind, state, attempt, since)
            SELECT id, %s, %s, 'run', 'parked', 1, now() + ROW_NUMBER() OVER () * INTERVAL '1 ms' FROM parked
            """,
            [number, like.pk, bank.name, account],
        )


# ---------------------------------------------------------------------------------------------------------------- told


@pytest.fixture
def two(client: Any) -> tuple[Limit, Execution, Execution]:
    bank = limit(1, holds="open", per="account")

    @durable(limits=[bank])
    def body(ctx: Any, account: str) -> None:
        ctx.wait_for("answer", "approved")

    first, second = body.delay(account="a-1"), body.delay(account="a-1")
    go_on()
    client.force_login(User.objects.create_superuser("ana"))
    return bank, reload(first), reload(second)


def test_what_a_parked_execution_waits_for_is_told(two: tuple[Limit, Execution, Execution], client: Any) -> None:
    bank, first, second = two
    said = told("show", str(second.pk))
    assert f'1 of 1 places of limit "{bank.name}" (a-1) are taken; 0 wait before it.' in said.out
    assert f"conductor show {first.pk}" in said.out
    assert json.loads(told("show", str(second.pk), "--json").out)["execution"]["due_at"] is None
    page = client.get(f"/admin/conductor_app/execution/{second.pk}/change/").content.decode()
    assert "places of limit" in page
    assert not YEAR.search(page)
    listed = client.get("/admin/conductor_app/execution/").content.decode()
    assert "parked" in listed
    assert not YEAR.search(listed)
    assert not YEAR.search(told("ls").out)


def test_limits_are_shown_with_who_has_a_place_and_who_waits(
    two: tuple[Limit, Execution, Execution], client: Any
) -> None:
    bank, first, second = two
    url = "/admin/conductor_app/execution/limits/"
    with CaptureQueriesContext(connection) as queries:
        page = client.get(url).content.decode()
    assert len(queries) <= 9
    assert "1 of 1 open" in page
    assert bank.name in page
    of_key = client.get(url, {"limit": bank.name, "key": "a-1"}).content.decode()
    assert str(first.pk) in of_key
    assert str(second.pk) in of_key
    assert bank.name not in client.get(url, {"limit": "other"}).content.decode()
    (key,) = client.get(f"{url}json/", {"limit": bank.name, "key": "a-1"}).json()["limits"]
    assert (key["taken"], key["parked"], key["counts"], key["number"]) == (1, 1, "open", 1)
    assert [one["id"] for one in key["holders"]] == [str(first.pk)]
    assert [one["id"] for one in key["waiting"]] == [str(second.pk)]

    said = told("limits", bank.name, "a-1").out
    assert "1 of 1 open" in said
    assert str(first.pk) in said
    assert str(second.pk) in said
    (same,) = json.loads(told("limits", "--json").out)["limits"]
    assert (same["limit"], same["key"], same["parked"]) == (bank.name, "a-1", 1)


def test_a_rate_is_shown_and_who_waits_for_it(client: Any) -> None:
    rate = limit(rate="1/h", burst=2)

    @durable(limits=[rate])
    def body(ctx: Any) -> str:
        return "done"

    executions = [body.delay() for _ in range(3)]
    go_on()
    assert "one each 60 min, 2 at once" in told("limits").out
    waiting = next(one for one in executions if reload(one).status == "queued")
    assert "lets no more start yet; 0 wait before it." in told("show", waiting.id).out


def test_time_that_passes_comes_to_each_start_of_a_rate(client: Any) -> None:
    rate = limit(rate="6/h", burst=2)

    @durable(limits=[rate])
    def body(ctx: Any) -> None: ...

    executions = [body.delay() for _ in range(5)]
    advance(1_900)
    rows = [reload(one) for one in executions]
    started = sorted(row.started_at for row in rows if row.started_at is not None)
    assert len(started) == 5
    seconds = [(instant - started[0]).total_seconds() for instant in started]
    assert seconds[1] < 300
    assert [round(each / 600) for each in seconds[2:]] == [1, 2, 3]


def test_what_waits_for_a_rate_and_is_held_does_not_keep_time_from_passing(client: Any) -> None:
    rate = limit(rate="6/h")

    @durable(limits=[rate])
    def body(ctx: Any) -> None: ...

    body.delay()
    held = body.delay()
    go_on()
    api.hold(reload(held), "incident")
    assert advance(3_600) == 0
    assert reload(held).status == "queued"


def test_nobody_sees_limits_who_may_not_see_executions(client: Any) -> None:
    client.force_login(User.objects.create_user("eve", is_staff=True))
    assert client.get("/admin/conductor_app/execution/limits/").status_code == 403


def test_a_parked_execution_cannot_be_woken(two: tuple[Limit, Execution, Execution]) -> None:
    with pytest.raises(ActionRefused, match="waits for a place of a limit"):
        api.wake(two[2].pk)


def test_parked_executions_are_counted_by_their_limit(two: tuple[Limit, Execution, Execution]) -> None:
    metrics = pytest.importorskip("conductor_app.metrics")
    found = {metric.name: metric for metric in metrics.DatabaseCollector().collect()}
    (sample,) = found["conductor_parked_executions"].samples
    assert (sample.labels, sample.value) == ({"limit": two[0].name}, 1.0)
    assert found["conductor_oldest_parked_seconds"].samples[0].value >= 0


def test_a_pruned_tree_takes_its_places_along(two: tuple[Limit, Execution, Execution]) -> None:
    api.cancel(two[2].pk)
    Place.objects.create(execution=two[2], limit="old", key="", kind="open", state="held", since=two[2].created_at)
    assert pruner.prune(dt.timedelta(0)) == 1
    assert set(Place.objects.values_list("execution_id", flat=True)) == {two[1].pk}
