"""A revoke of what does not exist yet: of a chain's tail, a chord's body, a callback, or by a stamp."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain, chord, signals, states
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from celery.worker import control
from celery.worker import state as worker_state
from celery.worker.control import Panel

from conductor_app import api
from conductor_app.engine import sweeper
from conductor_app.host import commands, news
from conductor_app.host.gate import Shutdown
from conductor_app.host.hearing import BACKLOG_SECONDS, DeafTimes
from conductor_app.host.news import Revocation
from conductor_app.host.revocations import Revoker
from conductor_app.host.sweeper_thread import SweeperThread
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import USUAL_SECONDS, process
from conductor_app.testing import advance
from project.celery import app
from tests.app.canvas import add_up
from tests.app.scenarios import echo
from tests.support import deliveries
from tests.support.process import given_back, note_published
from tests.support.results import using

pytestmark = pytest.mark.django_db

STATE = SimpleNamespace(app=app, hostname="w@h", tset=set, consumer=None)


@pytest.fixture(autouse=True)
def result_backend() -> Iterator[None]:
    with using("django-db"):
        yield


@pytest.fixture(autouse=True)
def main_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[SweeperThread]:
    """A worker's main process: its remote commands, its memory of revokes, and its sweeper's thread."""
    process.news = news.News()
    monkeypatch.setattr(control, "revoke", control.revoke)
    for name in ("revoke", "revoke_by_stamped_headers", "hello"):
        monkeypatch.setitem(Panel.data, name, Panel.data[name])
    commands.watch_revokes()
    yield SweeperThread(SimpleNamespace(app=app, hostname="w@h"), Shutdown())
    worker_state.revoked.clear()
    worker_state.revoked_stamps.clear()
    clock.reset()


def revoke(*task_ids: str) -> None:
    Panel.data["revoke"](STATE, list(task_ids))


def told_celery(task_id: str) -> str:
    sweeper.sweep(publish=False)
    return str(AsyncResult(task_id).state)


def status(task_id: str) -> str:
    return str(Execution.objects.get(pk=task_id).status)


def run(task_id: str) -> bool:
    """Take an execution's message as the worker does, and tell Celery what came of it; tell whether it was dropped."""
    request = deliveries.deliver(deliveries.doorbell(Execution.objects.get(pk=task_id)))
    sweeper.sweep(publish=False)
    return request._already_revoked


def tail_of_chain() -> tuple[str, list[str]]:
    result = chain(echo.s(1), echo.s()).apply_async()
    return result.id, [result.parent.id]


def callback() -> tuple[str, list[str]]:
    called = str(uuid.uuid4())
    first = echo.apply_async((1,), link=echo.s().set(task_id=called))
    return called, [first.id]


def body_of_chord() -> tuple[str, list[str]]:
    result = chord([echo.s(1), echo.s(2)])(add_up.s())
    return result.id, [part.id for part in result.parent.results]


@pytest.mark.parametrize("make", [tail_of_chain, callback, body_of_chord])
def test_what_is_revoked_before_it_exists_ends_cancelled(
    make: Callable[[], tuple[str, list[str]]], main_process: SweeperThread
) -> None:
    later, before = make()
    assert not Execution.objects.filter(pk=later).exists()
    revoke(later)
    main_process._hear()
    for task_id in before:
        assert not run(task_id)
    assert status(later) == "queued"

    assert run(later), "dropped"
    main_process._hear()
    assert status(later) == "cancelled"
    assert told_celery(later) == states.REVOKED
    assert [status(task_id) for task_id in before] == ["succeeded"] * len(before)

    # Once: an operator's retry undoes it, whatever the worker remembers.
    api.retry(later)
    assert not run(later)
    assert status(later) in ("succeeded", "waiting")


def test_a_message_of_others_that_comes_after_its_revoke_becomes_no_execution(
    main_process: SweeperThread,
) -> None:
    task_id = str(uuid.uuid4())
    revoke(task_id)
    main_process._hear()
    app.send_task(echo.name, (1,), task_id=task_id)
    deliveries.deliver(deliveries.take(is_wanted=lambda message: message.headers["id"] == task_id))
    main_process._hear()
    assert not Execution.objects.filter(pk=task_id).exists()
    result = AsyncResult(task_id)
    assert (result.state, type(result.result)) == (states.REVOKED, TaskRevokedError)


def stamped(**options: Any) -> str:
    signature = echo.s(1)
    signature.stamp(batch="b-1")
    return str(signature.apply_async(**options).id)


def test_what_bears_a_stamp_that_was_revoked_earlier_ends_cancelled(main_process: SweeperThread) -> None:
    existed = stamped()
    Panel.data["revoke_by_stamped_headers"](STATE, {"batch": ["b-0", "b-1"]})
    main_process._hear()
    assert status(existed) == "cancelled"
    advance(1)
    later = stamped()
    assert run(later), "dropped"
    main_process._hear()
    assert status(later) == "cancelled"
    assert told_celery(later) == states.REVOKED

    for task_id in (existed, later):
        api.retry(task_id)
        assert not run(task_id)
        assert status(task_id) == "succeeded"


def test_a_failure_from_before_a_stamp_was_revoked_can_be_retried(main_process: SweeperThread) -> None:
    """It was not open when the stamp was revoked, so that nothing was cancelled then."""
    cancelled = stamped()
    api.cancel(cancelled)
    advance(1)
    Panel.data["revoke_by_stamped_headers"](STATE, {"batch": "b-1"})
    main_process._hear()
    api.retry(cancelled)
    assert run(cancelled), "dropped"
    with given_back():
        published = note_published()
        main_process._hear()
    assert published == [uuid.UUID(cancelled)], "put back, since nobody else would at once"
    assert not run(cancelled)
    assert status(cancelled) == "succeeded"


def test_a_worker_remembers_and_passes_on_only_what_did_not_exist(main_process: SweeperThread) -> None:
    existing, unborn = echo.apply_async((1,), countdown=60).id, str(uuid.uuid4())
    revoke(existing, unborn)
    main_process._hear()
    told = Panel.data["hello"](STATE, "other@h")
    assert list(told["revoked"]) == [unborn]


class Revokes:
    """A worker that hears a revoke, the same or another one as other workers hear."""

    def __init__(self) -> None:
        self._revoker = Revoker()

    def hears(self, task_id: str, seconds_ago: float = 0.0, **stamps: str) -> Revocation:
        """It was sent up to so many seconds ago."""
        named = {"stamps": stamps} if stamps else {"task_id": task_id}
        revocation = Revocation(since=time.monotonic() - seconds_ago, **named)  # type: ignore[arg-type]
        self._revoker.cancel(revocation)
        return revocation


@pytest.mark.parametrize("stamps", [{}, {"batch": "b-1"}])
def test_a_worker_that_hears_a_revoke_after_others_does_not_undo_a_retry(stamps: dict[str, str]) -> None:
    quick, deaf, task_id = Revokes(), Revokes(), stamped()
    quick.hears(task_id, **stamps)
    assert status(task_id) == "cancelled"
    clock.shift(dt.timedelta(seconds=60))
    api.retry(task_id)
    clock.shift(dt.timedelta(seconds=60))
    late = deaf.hears(task_id, 300, **stamps)
    assert (status(task_id), late.outdated) == ("queued", {uuid.UUID(task_id)})

    # The next one is about what was retried, and both workers know that.
    assert not quick.hears(task_id, **stamps).outdated
    assert status(task_id) == "cancelled"
    api.retry(task_id)
    assert deaf.hears(task_id, 300, **stamps).outdated, "a copy of the second command"
    assert not deaf.hears(task_id, 300, **stamps).outdated
    assert status(task_id) == "cancelled"


def test_a_late_revoke_is_obeyed_where_no_revoke_has_ended_the_execution() -> None:
    """Then nobody else has obeyed it: what it means may be what was retried."""
    task_id = stamped()
    api.cancel(task_id, reason="the shop is closed")
    api.retry(task_id)
    Revokes().hears(task_id, 300)
    assert status(task_id) == "cancelled"


def test_a_late_revoke_kills_nothing_that_was_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    task_id, other = stamped(), stamped()
    killed: list[Any] = []
    monkeypatch.setattr(commands, "_terminate_follower", lambda _state, item, _signal: killed.append(item))
    told: list[Any] = []
    monkeypatch.setitem(Panel.data, "revoke", lambda _state, ids, **_kwargs: told.append(ids))
    commands.watch_revokes()

    def wait(known: list[Revocation]) -> None:
        known[0].outdated.add(uuid.UUID(task_id))

    monkeypatch.setattr(commands, "_wait_for", wait)
    Panel.data["revoke"](STATE, [task_id, other], terminate=True)
    assert (killed, told) == ([other], [[other]])


def test_a_worker_that_runs_bodies_itself_knows_that_it_heard_nothing_meanwhile() -> None:
    deaf, at = DeafTimes(), time.monotonic
    assert at() - deaf.heard_since() < USUAL_SECONDS + 60
    began = at()
    for _ in range(3):
        signals.task_prerun.send(sender=None)
        signals.task_postrun.send(sender=None)
    assert began - USUAL_SECONDS <= deaf.heard_since() <= began - USUAL_SECONDS + 60
    deaf._until -= BACKLOG_SECONDS + 1
    deaf._since -= 3_600
    assert at() - deaf.heard_since() < 60
    deaf.leave()
