"""What Celery does with a plain task's delivery: relied on by ``plain_runs``, ``dispatch`` and ``plain_reports``."""

from __future__ import annotations

import inspect
import uuid
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
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
    # To be called, this would need a process of its own.
    source = inspect.getsource(prefork.process_initializer)
    assert source.index("__trace__ = build_tracer") < source.index("worker_process_init.send")


def test_a_pool_process_asks_the_task_for_its_tracer(app: Celery) -> None:
    task: Any = app.task(seven, bind=True, name="body", shared=False)
    asked: list[Any] = []
    task.__trace__ = lambda *given: asked.append(given) or trace_ok_t(7, None, 0.5, "7")
    where = (app.tasks, {"json"}, "host")
    assert fast_trace_task("body", ID, {}, ((), {}, {}), None, None, _loc=where) == (0, "7", 0.5)
    ((task_id, args, kwargs, request),) = asked
    assert (task_id, args, kwargs, request["hostname"]) == (ID, (), {}, "host")


def test_the_main_process_builds_tracers_anew_on_each_connection(app: Celery) -> None:
    app.task(seven, bind=True, name="body", shared=False)
    app.finalize()
    begun: list[str] = []

    class Connected(Exception):
        """What comes next needs a broker."""

    class Starting:
        def __init__(self) -> None:
            self.app, self.hostname, self.strategies = app, "host", dict[str, Any]()
            self.pool = self.event_dispatcher = self.controller = self.connection = None
            self.qos = self.task_consumer = None

        def __getattr__(self, name: str) -> Any:
            raise Connected(name)

        def update_strategies(self) -> None:
            begun.append("strategies")
            raise Connected

    with pytest.raises(Connected):
        consumer.Tasks.start(SimpleNamespace(), Starting())  # type: ignore[arg-type]
    assert begun == ["strategies"]
    task: Any = app.tasks["body"]
    task.__trace__ = "an old one"
    for each in app.tasks.values():
        vars(each)["start_strategy"] = lambda *_args, **_options: "a strategy"
    starting = Starting()
    consumer.Consumer.update_strategies(starting)
    assert starting.strategies["body"] == "a strategy"
    assert callable(task.__trace__)


def test_a_tracer_answers_an_ignore_in_the_form_that_a_dropped_delivery_has() -> None:
    assert trace_ok_t._fields == ("retval", "info", "runtime", "retstr")
    assert TraceInfo(states.IGNORED, None).state == "IGNORED"


def test_the_main_process_speaks_of_what_no_pool_process_can_tell(app: Celery) -> None:
    task_id = str(uuid.uuid4())  # of which the result backend has no success
    told: list[tuple[str, str]] = []

    def on_failure(task_id: str, exception: Any, **_kwargs: Any) -> None:
        told.append((type(getattr(exception, "exc", exception)).__name__, task_id))

    def on_revoked(request: Any, terminated: bool, **_kwargs: Any) -> None:
        told.append((f"revoked, terminated {terminated}", request.id))

    signals.task_failure.connect(on_failure)
    signals.task_revoked.connect(on_revoked)
    try:
        try:
            raise WorkerLostError("signal 9")
        except WorkerLostError:
            request_of(app, task_id).on_failure(ExceptionInfo())
        request_of(app, task_id)._announce_revoked("terminated", True, 15, False)
    finally:
        signals.task_failure.disconnect(on_failure)
        signals.task_revoked.disconnect(on_revoked)
    assert told == [("WorkerLostError", task_id), ("revoked, terminated True", task_id)]


def request_of(app: Celery, task_id: str = ID, **options: Any) -> Request:
    """A request in the main process, whose message has just been delivered."""
    task = app.task(seven, bind=True, name="body", shared=False, **options)
    headers = {"id": task_id, "task": "body", "lang": "py", "argsrepr": "()", "kwargsrepr": "{}"}
    body = ((), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    message = Message(body="", headers=headers, delivery_info={}, properties={})
    ignored: Any = {"on_ack": lambda *_args: None, "on_reject": lambda *_args: None}
    return Request(message, app=app, task=task, body=body, decoded=True, headers=headers, **ignored)


@pytest.mark.parametrize("acks_late", [True, False])
def test_a_hard_time_limit_is_told_of_as_a_failure_in_the_main_process(app: Celery, acks_late: bool) -> None:
    """At least once: by what billiard calls when the time is up, or by what it calls with the error that follows."""
    told: list[Any] = []

    def receiver(task_id: str, exception: Any, **_kwargs: Any) -> None:
        told.append((task_id, type(getattr(exception, "exc", exception))))

    request = request_of(app, acks_late=acks_late)
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


class Stub:
    """A consumer that does nothing but what a test lets it do."""

    app: Any
    connection_errors: Any = ()
    event_dispatcher: Any

    def __getattr__(self, name: str) -> Any:
        return lambda *_args: pytest.fail(f"{name} was called")


def test_a_consumer_asks_its_class_what_to_do_with_an_unknown_task() -> None:
    """``unknown_tasks`` puts its own in the place of that: Celery's records a failure."""
    assert list(inspect.signature(consumer.Consumer.on_unknown_task).parameters) == ["self", "body", "message", "exc"]
    asked: list[Any] = []

    class One(Stub):
        strategies: ClassVar[dict[str, Any]] = {}

        def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
            asked.append((body, message, type(exc)))

    message = Message(body="", headers={"id": ID, "task": "nobody's"}, delivery_info={}, properties={})
    handler = consumer.Consumer.create_task_handler(One())  # type: ignore[arg-type]
    handler(message)
    assert asked == [(None, message, KeyError)]


def test_celery_itself_records_a_failure_of_an_unknown_task(app: Celery) -> None:
    rejected: list[Any] = []
    task_id = str(uuid.uuid4())
    message = Message(body="", headers={"id": task_id, "task": "nobody's"}, delivery_info={}, properties={})
    message.reject_log_error = lambda *given: rejected.append(given)
    one = Stub()
    one.app, one.connection_errors, one.event_dispatcher = app, (OSError,), None
    told: list[Any] = []

    def on_unknown(message: Any, exc: Any, name: str, id: str, **_kwargs: Any) -> None:  # noqa: A002 - Celery's word
        told.append((name, id))

    signals.task_unknown.connect(on_unknown)
    try:
        consumer.Consumer.on_unknown_task(one, None, message, KeyError("nobody's"))  # type: ignore[arg-type]
    finally:
        signals.task_unknown.disconnect(on_unknown)
    assert (told, app.backend.get_state(task_id)) == ([("nobody's", task_id)], states.FAILURE)
    assert [errors for _logger, errors in rejected] == [(OSError,)]


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
