"""What Celery does with a plain task's delivery: relied on by ``plain_runs``, ``dispatch`` and ``worker``."""

from __future__ import annotations

import inspect
import uuid
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, signals, states
from celery.app.trace import TraceInfo, build_tracer, fast_trace_task, trace_ok_t
from celery.concurrency import prefork
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded
from celery.worker import consumer
from celery.worker import state as worker_state
from celery.worker.request import Request
from kombu import Message

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
    # ``ignore_result`` is the caller's in Celery 5.7, and the task's in 5.6: neither is relied upon.
    assert (options["headers"]["conductor"], options["queue"]) == ("plain", "q")


@pytest.mark.parametrize("ignores", [True, False])
def test_what_a_run_is_told_about_its_result_stands_before_the_tasks_own_word(app: Celery, ignores: bool) -> None:
    task = app.task(seven, bind=True, name="body", shared=False, ignore_result=not ignores)
    task_id = str(uuid.uuid4())
    request = {"id": task_id, "delivery_info": {}, "is_eager": False, "ignore_result": ignores}
    build_tracer(task.name, task, app=app)(task_id, (), {}, request)
    assert app.AsyncResult(task_id).state == (states.PENDING if ignores else states.SUCCESS)


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
    assert "send_revoked(self.task, request=self._context" in inspect.getsource(Request._announce_revoked)
    unknown = inspect.getsource(consumer.Consumer.on_unknown_task)
    assert "signals.task_unknown.send" in unknown
    assert "message=message, exc=exc, name=name, id=id_" in unknown


@pytest.mark.parametrize("acks_late", [True, False])
def test_a_hard_time_limit_is_told_of_as_a_failure_in_the_main_process(app: Celery, acks_late: bool) -> None:
    """At least once: by what billiard calls when the time is up, or by what it calls with the error that follows."""
    told: list[Any] = []

    def receiver(task_id: str, exception: Any, **_kwargs: Any) -> None:
        told.append((task_id, type(getattr(exception, "exc", exception))))

    task = app.task(seven, bind=True, name="body", shared=False, acks_late=acks_late)
    headers = {"id": ID, "task": "body", "lang": "py", "argsrepr": "()", "kwargsrepr": "{}"}
    body = ((), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    message = Message(body="", headers=headers, delivery_info={}, properties={})
    ignored = {"on_ack": lambda *_args: None, "on_reject": lambda *_args: None}
    request = Request(message, app=app, task=task, body=body, decoded=True, headers=headers, **ignored)
    signals.task_failure.connect(receiver)
    try:
        request.on_timeout(soft=False, timeout=1)
        try:
            raise TimeLimitExceeded(1)
        except TimeLimitExceeded:
            request.on_failure(ExceptionInfo())
    finally:
        signals.task_failure.disconnect(receiver)
    assert told
    assert set(told) == {(ID, TimeLimitExceeded)}


def test_a_consumer_asks_its_class_what_to_do_with_an_unknown_task() -> None:
    """``worker`` puts its own in the place of that: Celery's records a failure."""
    method = consumer.Consumer.on_unknown_task
    assert list(inspect.signature(method).parameters) == ["self", "body", "message", "exc"]
    assert "backend.mark_as_failure(" in inspect.getsource(method)
    assert "reject_log_error(logger, self.connection_errors)" in inspect.getsource(method)
    handler = inspect.getsource(consumer.Consumer.create_task_handler)
    assert "on_unknown_task = self.on_unknown_task" in handler
    assert "return on_unknown_task(None, message, exc)" in handler


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
