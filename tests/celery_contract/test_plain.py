"""What Celery does with a plain task's delivery: relied on by ``plain_runs``, ``dispatch`` and ``worker``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from celery import Celery, signals, states
from celery.app.trace import TraceInfo, build_tracer, fast_trace_task, trace_ok_t
from celery.concurrency import prefork
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import consumer
from celery.worker import state as worker_state
from celery.worker.request import Request

ID = "01a2058a-68a2-8eaf-83f2-e0fa060c561c"


@pytest.fixture
def app() -> Celery:
    return Celery("contract", broker="memory://", backend="cache+memory://", set_as_current=False)


class Postruns(list[tuple[Any, Any]]):
    """State and value of each ``task_postrun``."""


@pytest.fixture
def postruns() -> Any:
    seen = Postruns()

    def receiver(state: Any = None, retval: Any = None, **_kwargs: Any) -> None:
        seen.append((state, retval))

    signals.task_postrun.connect(receiver, weak=False)
    yield seen
    signals.task_postrun.disconnect(receiver)


def trace(app: Celery, body: Any, **request: Any) -> Any:
    task = app.task(body, bind=True, name="body", shared=False, max_retries=1)
    values = {"id": ID, "delivery_info": {"exchange": "", "routing_key": "q"}, "is_eager": False, **request}
    return build_tracer(task.name, task, app=app)(ID, (), {}, values)


def seven(self: Any) -> int:
    return 7


def divides(self: Any) -> float:
    return 1 / 0


def test_a_postrun_tells_each_end_of_a_body(app: Celery, postruns: Postruns) -> None:
    error = ValueError("no")

    def body(outcome: Any) -> Any:
        def run(self: Any) -> Any:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run

    expected = [
        (7, states.SUCCESS),
        (error, states.FAILURE),
        (Retry("again", when=3), states.RETRY),
        (Ignore("x"), states.IGNORED),
        (Reject("x", requeue=True), states.REJECTED),
    ]
    for outcome, _state in expected:
        app.tasks.pop("body", None)
        trace(app, body(outcome))
    assert postruns == [(state, outcome) for outcome, state in expected]
    assert error.__traceback__ is not None


def test_a_postrun_comes_without_a_state_when_the_outcome_cannot_be_stored(
    app: Celery, postruns: Postruns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``task_success`` and ``task_failure`` do not come at all."""
    told: list[str] = []
    signals.task_success.connect(on_success := lambda **_kwargs: told.append("success"), weak=False)
    signals.task_failure.connect(on_failure := lambda **_kwargs: told.append("failure"), weak=False)

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionRefusedError("away")

    monkeypatch.setattr(app.backend, "store_result", refuse)
    monkeypatch.setattr(app.backend, "mark_as_failure", refuse)
    try:
        with pytest.raises(ConnectionRefusedError):
            trace(app, seven)
        app.tasks.pop("body")
        with pytest.raises(ConnectionRefusedError):
            trace(app, divides)
    finally:
        signals.task_success.disconnect(on_success)
        signals.task_failure.disconnect(on_failure)
    assert postruns == [(states.SUCCESS, 7), (None, None)]
    assert told == []


def test_a_retry_publishes_the_same_id_with_our_header_and_one_retry_more(app: Celery) -> None:
    sent: list[dict[str, Any]] = []
    app.send_task = lambda name, args, kwargs, **options: sent.append(options)  # type: ignore[assignment, misc]

    def body(self: Any) -> None:
        raise self.retry(countdown=5)

    trace(app, body, conductor="plain", retries=0, ignore_result=True)
    (options,) = sent
    assert (options["task_id"], options["retries"], options["countdown"]) == (ID, 1, 5)
    assert (options["headers"]["conductor"], options["ignore_result"], options["queue"]) == ("plain", True, "q")


def test_a_retry_says_when_and_with_which_arguments(app: Celery, postruns: Postruns) -> None:
    app.send_task = lambda *_args, **_kwargs: None  # type: ignore[assignment, misc]

    def body(self: Any, **kwargs: Any) -> None:
        raise self.retry(countdown=5, kwargs={"value": 2}, exc=ValueError("why"))

    trace(app, body)
    (_state, retry) = postruns[0]
    assert (retry.when, retry.sig.kwargs, str(retry.exc), retry.is_eager) == (5, {"value": 2}, "why", False)


def test_tracers_are_attributes_of_tasks_built_where_bodies_run() -> None:
    assert "__trace__(" in inspect.getsource(fast_trace_task)
    source = inspect.getsource(prefork.process_initializer)
    assert source.index("__trace__ = build_tracer") < source.index("worker_process_init.send")
    assert "__trace__ = build_tracer" in inspect.getsource(consumer.Consumer.update_strategies)
    assert "update_strategies()" in inspect.getsource(consumer.Tasks.start)


def test_a_tracer_answers_an_ignore_in_the_form_that_a_dropped_delivery_has() -> None:
    assert trace_ok_t._fields == ("retval", "info", "runtime", "retstr")
    assert TraceInfo(states.IGNORED, None).state == "IGNORED"


def test_the_main_process_speaks_of_what_no_pool_process_can_tell() -> None:
    failure = inspect.getsource(Request.on_failure)
    assert "signals.task_failure.send(sender=self.task, task_id=self.id" in failure
    assert "signals.task_failure.send" in inspect.getsource(Request.on_timeout)
    assert "send_revoked(self.task, request=self._context" in inspect.getsource(Request._announce_revoked)
    unknown = inspect.getsource(consumer.Consumer.on_unknown_task)
    assert "signals.task_unknown.send" in unknown
    assert "message=message, exc=exc, name=name, id=id_" in unknown


def test_a_header_may_say_what_becomes_of_the_result(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that publishing does not make this process listen for it."""
    listened: list[Any] = []
    monkeypatch.setattr(app.backend, "on_task_call", lambda *args: listened.append(args))
    seen: list[Any] = []

    def receiver(headers: Any = None, **_kwargs: Any) -> None:
        seen.append(headers["ignore_result"])

    signals.before_task_publish.connect(receiver)
    try:
        app.send_task("t", ignore_result=True, headers={"ignore_result": False})
    finally:
        signals.before_task_publish.disconnect(receiver)
    assert (seen, listened) == ([False], [])


def test_a_revoked_id_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_state.revoked.add("taken-back")
    worker_state.revoked.discard("taken-back")
    assert "taken-back" not in worker_state.revoked
