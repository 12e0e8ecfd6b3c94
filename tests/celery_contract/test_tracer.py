"""Celery's tracer, which calls a task's body: relied on by ``executor``, ``receivers`` and ``inline``."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, signals, states
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.exceptions import Ignore
from celery.result import EagerResult

Trace = Callable[..., Any]


@pytest.fixture
def app() -> Celery:
    return Celery("contract", broker="memory://", backend="cache+memory://", set_as_current=False)


class Told(list[str]):
    """What a tracer did with an outcome."""


@pytest.fixture
def told(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Told:
    calls = Told()

    def note(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.append(name)

    monkeypatch.setattr(app.backend, "store_result", note("stored"))
    monkeypatch.setattr(app.backend, "on_chord_part_return", note("chord"))
    monkeypatch.setattr(app.backend, "_call_task_errbacks", note("errbacks"))
    monkeypatch.setattr(app, "send_task", note("sent"))
    return calls


def trace(app: Celery, body: Callable[..., Any], **request: Any) -> Any:
    """Run a bound body as a worker does."""

    def run(self: Any) -> Any:
        return body(self)

    task = app.task(run, bind=True, name="body", shared=False)
    return build_tracer(task.name, task, app=app)("some-id", (), {}, {"id": "some-id", "delivery_info": {}, **request})


CANVAS = {
    "callbacks": [{"task": "callback", "args": [], "kwargs": {}, "options": {"task_id": "c"}}],
    "chain": [{"task": "next", "args": [], "kwargs": {}, "options": {"task_id": "n"}}],
    "errbacks": [{"task": "errback", "args": [], "kwargs": {}, "options": {}}],
    "chord": {"task": "chord-body", "args": [], "kwargs": {}, "options": {}},
    "group": "g",
}


def test_the_tracer_acts_on_the_canvas_of_a_request(app: Celery, told: Told) -> None:
    """The check of the check: without us, it does."""
    trace(app, lambda self: 1, **CANVAS)
    assert sorted(told) == ["chord", "sent", "sent", "stored"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_body_that_empties_its_request_keeps_the_tracer_out(app: Celery, told: Told, fails: bool) -> None:
    def body(self: Any) -> int:
        request = self.request
        request.callbacks = request.errbacks = request.chain = request.chord = None
        request.ignore_result = True
        if fails:
            raise ValueError("no")
        return 1

    state = trace(app, body, **CANVAS, ignore_result=False).info
    assert (state.state if fails else state) == (states.FAILURE if fails else None)
    assert told == []


def test_ignore_ends_a_run_without_storing_anything(app: Celery, told: Told) -> None:
    class Ended(Ignore):
        def __init__(self, what: str) -> None:
            super().__init__(what)
            self.what = what

    def body(self: Any) -> None:
        raise Ended("suspended")

    retval, info, _runtime, _repr = trace(app, body, **CANVAS)
    assert info.state == states.IGNORED
    assert told == []
    # And this is how it travels to the worker's main process.
    assert isinstance(retval, ExceptionInfo)
    error = retval.exception
    assert getattr(error, "exc", error).what == "suspended"


def test_an_ignore_survives_the_way_to_the_main_process() -> None:
    from conductor_app.engine.run import RunEnded

    try:
        raise RunEnded("suspended", "waiting for step 'a'", 1.5, "a")
    except RunEnded:
        info = pickle.loads(pickle.dumps(ExceptionInfo(internal=True)))
    error = getattr(info.exception, "exc", info.exception)
    assert (error.what, error.detail, error.due_in, error.step) == ("suspended", "waiting for step 'a'", 1.5, "a")


def test_an_ignored_run_is_logged_with_its_description_as_data(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    def body(self: Any) -> None:
        raise Ignore("because")

    with caplog.at_level(logging.INFO, "celery.app.trace"):
        trace(app, body)
    (record,) = [record for record in caplog.records if record.name == "celery.app.trace"]
    assert record.data["description"] == "ignored"  # type: ignore[attr-defined]
    assert record.data["exc"] == repr(Ignore("because"))  # type: ignore[attr-defined]
    assert isinstance(record.args, dict)
    assert record.getMessage() == "Task body[some-id] ignored"


def test_the_tracer_finds_its_exception_info_in_its_module(
    app: Celery, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ``durable_runs`` puts its own; the tracer returns what it gets there."""
    asked: list[Any] = []

    def note(exc_info: Any = None, internal: bool = False) -> Any:
        asked.append((sys.exc_info()[1] if exc_info is None else exc_info[1], internal))
        return ExceptionInfo(exc_info, internal)

    monkeypatch.setattr("celery.app.trace.ExceptionInfo", note)
    ended = Ignore("suspended")

    @app.task
    def ignored() -> None:
        raise ended

    outcome = build_tracer(ignored.name, ignored, app=app)("id-1", (), {}, {})
    assert asked == [(ended, True), (ended, False)]
    assert isinstance(outcome.retval, ExceptionInfo)


def test_a_base_exception_leaves_the_tracer(app: Celery, told: Told) -> None:
    class Suspend(BaseException):
        pass

    def body(self: Any) -> None:
        raise Suspend

    with pytest.raises(Suspend):
        trace(app, body)
    assert told == []


def test_the_eager_tracer_stores_and_propagates_nothing(app: Celery, told: Told) -> None:
    @app.task(shared=False)
    def task() -> float:
        return 1 / 0

    tracer = build_tracer(task.name, task, app=app, eager=True, propagate=False)
    outcome = tracer("some-id", (), {}, {"id": "some-id", "is_eager": True, "ignore_result": True})
    assert outcome.info.state == states.FAILURE
    assert told == []
    result = EagerResult("some-id", 1, states.SUCCESS)
    assert (result.get(), result.state) == (1, states.SUCCESS)


@pytest.fixture
def successes() -> Iterator[list[Any]]:
    seen: list[Any] = []

    def note(sender: Any, result: Any, **_kwargs: Any) -> None:
        seen.append((sender.name, result))

    signals.task_success.connect(note)
    yield seen
    signals.task_success.disconnect(note)


def test_hooks_and_signals_follow_the_body(app: Celery, told: Told, successes: list[Any]) -> None:
    trace(app, lambda self: 7)
    assert successes == [("body", 7)]


def test_unknown_headers_of_a_message_land_on_the_request() -> None:
    request = Context({"id": "1", "task": "t", "argsrepr": "()", "tenant": "a", "conductor": "doorbell"})
    assert request.tenant == "a"  # type: ignore[attr-defined]
    assert request.headers == {"tenant": "a", "conductor": "doorbell"}
    assert "ignore_result" not in vars(request)
    assert Context({"timelimit": [2, 1]}).timelimit == [2, 1]


def test_a_task_with_a_call_of_its_own_is_called_by_it(app: Celery) -> None:
    class Durable(app.Task):  # type: ignore[name-defined,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return "called", self.request.called_directly, self.run(*args, **kwargs)

    @app.task(base=Durable, shared=False)
    def task() -> int:
        return 1

    assert build_tracer(task.name, task, app=app)("id", (), {}, {}).retval == ("called", False, 1)
    assert task() == ("called", True, 1)
