"""Celery's worker in its main process: relied on by ``worker`` and ``receivers``."""

from __future__ import annotations

import inspect
import os
import threading
from typing import Any

import billiard
import pytest
from billiard import pool as billiard_pool
from billiard.einfo import ExceptionInfo
from celery import Celery, bootsteps, signals
from celery.app import trace
from celery.apps.worker import Worker
from celery.concurrency.base import BasePool
from celery.events.state import State
from celery.exceptions import Ignore
from celery.worker import consumer, control, pidbox
from celery.worker import state as worker_state
from celery.worker.request import Request, create_request_cls
from celery.worker.strategy import default
from kombu import Connection


@pytest.fixture
def app() -> Celery:
    app = Celery("contract", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_default_queue = "contract"

    @app.task(name="body", shared=False)
    def body() -> int:
        return 1

    return app


def published(app: Celery, name: str = "body", **options: Any) -> Any:
    """A message, published and taken."""
    app.send_task(name, **options)
    with app.connection_for_read() as connection, connection.channel() as channel:
        message = app.amqp.queues["contract"](channel).get(no_ack=True)
    assert message is not None
    return message


def request_for(app: Celery, base: type[Request] = Request, **options: Any) -> Request:
    return base(published(app, **options), app=app, task=app.tasks["body"], on_ack=lambda *_: None)


def failure(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except type(error):
        return ExceptionInfo()


@pytest.mark.filterwarnings("ignore:You're running the worker with superuser privileges")
def test_a_bootstep_added_when_the_worker_begins_to_start_is_built(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``celeryd_init`` comes before the blueprint, and knows the app."""
    built = []

    class Step(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Pool",)

        def __init__(self, worker: Any, **kwargs: Any) -> None:
            built.append((worker.app, worker.pool_cls.__module__, worker.pool))
            super().__init__(worker, **kwargs)

    def add(instance: Any, **_kwargs: Any) -> None:
        if instance.blueprint is None:
            instance.app.steps["worker"].add(Step)

    monkeypatch.setattr(trace, "setup_worker_optimizations", lambda *_args: None)
    signals.celeryd_init.connect(add)
    try:
        worker = Worker(app=app, pool_cls="solo", concurrency=1)
    finally:
        signals.celeryd_init.disconnect(add)
    # Built after the pool's step, and before the pool itself, which is made when the worker starts.
    assert built == [(app, "celery.concurrency.solo", None)]
    assert any(isinstance(step, Step) for step in worker.steps)
    assert worker.concurrency == 1


def test_a_task_may_name_the_class_of_its_requests_and_its_strategy(app: Celery) -> None:
    task = app.tasks["body"]
    assert (task.Request, task.Strategy) == ("celery.worker.request:Request", "celery.worker.strategy:default")
    assert "symbol_by_name(task.Request)" in inspect.getsource(default)
    assert "task.start_strategy(" in inspect.getsource(consumer.Consumer.update_strategies)


def test_the_class_made_for_a_task_has_an_on_success_of_its_own(app: Celery) -> None:
    """So overriding it in the base is not enough."""
    made = create_request_cls(Request, app.tasks["body"], BasePool(limit=1), "host", None, app=app)
    assert issubclass(made, Request)
    assert "on_success" in vars(made)
    assert "on_failure" not in vars(made)
    assert "on_timeout" not in vars(made)


def test_an_ignored_run_is_acknowledged_and_not_stored(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.backend, "store_result", lambda *_args, **_kwargs: pytest.fail("stored"))
    acknowledged = []
    request = request_for(app)
    request._on_ack = lambda *_args: acknowledged.append(1)
    request.on_failure(failure(Ignore()), return_ok=True)
    assert acknowledged == [1]


def test_a_request_offers_its_process_its_headers_and_its_events(app: Celery) -> None:
    request = request_for(app, headers={"conductor": "doorbell"})
    assert request.request_dict["conductor"] == "doorbell"
    assert request.worker_pid is None
    request.on_accepted(4711, 0.0)
    assert (request.worker_pid, request.acknowledged) == (4711, True)
    assert {"type", "fields"} <= set(inspect.signature(request.send_event).parameters)
    for name in ("revoked", "_announce_revoked", "_announce_cancelled", "on_timeout", "acknowledge", "terminate"):
        assert callable(getattr(Request, name))
    assert list(inspect.signature(Request._announce_revoked).parameters) == [
        "self",
        "reason",
        "terminated",
        "signum",
        "expired",
    ]


def test_deliveries_are_listed_by_task_id_and_forgotten_by_it(app: Celery) -> None:
    """Two of one id: the end of the first takes the second off the list."""
    first, second = request_for(app, task_id="same"), request_for(app, task_id="same")
    for request in (first, second):
        worker_state.task_reserved(request)
    try:
        assert worker_state.requests["same"] is second
        assert {first, second} <= set(worker_state.reserved_requests)
        worker_state.task_ready(first)
        assert "same" not in worker_state.requests
        assert second in worker_state.reserved_requests
    finally:
        worker_state.task_ready(second)


def test_a_revoked_id_is_remembered_and_asked_for(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "revoked", {"gone"})
    monkeypatch.setattr("celery.worker.request.revoked_tasks", {"gone"})
    assert request_for(app, task_id="gone").revoked()
    assert not request_for(app, task_id="here").revoked()


def test_remote_commands_are_looked_up_by_name_when_they_arrive() -> None:
    assert list(inspect.signature(control.revoke).parameters)[:4] == ["state", "task_id", "terminate", "signal"]
    assert control.Panel.data["revoke"].__name__ == "revoke"
    assert "handlers=control.Panel.data" in inspect.getsource(pidbox.Pidbox.__init__)


def test_a_pool_tells_its_size() -> None:
    assert isinstance(BasePool.num_processes, property)


def test_a_worker_tells_which_queues_it_consumes(app: Celery) -> None:
    app.amqp.queues.select(["contract"])
    assert list(app.amqp.queues.consume_from) == ["contract"]


def test_an_event_of_an_unknown_type_is_a_state() -> None:
    state = State()
    common = {"uuid": "1", "hostname": "h", "timestamp": 1.0, "local_received": 1.0, "clock": 1, "pid": 1}
    state.event({"type": "task-received", "name": "t", **common})
    state.event({"type": "task-suspended", "step": "charge", **common})
    assert (state.tasks["1"].state, state.tasks["1"].step) == ("SUSPENDED", "charge")


def test_memory_queues_belong_to_the_process() -> None:
    with Connection("memory://") as one, Connection("memory://") as other:
        one.SimpleQueue("contract-shared").put({"a": 1})
        channel = other.channel()
        assert channel._size("contract-shared") == 1
        assert one.transport.driver_type == "memory"
        assert other.SimpleQueue("contract-shared").get(timeout=1).payload == {"a": 1}
        assert channel._size("contract-shared") == 0


def test_the_polling_interval_of_memory_is_its_class_attribute() -> None:
    from kombu.transport.memory import Transport

    assert Transport.polling_interval is not None
    assert "self.polling_interval" in inspect.getsource(Transport.__mro__[1].__init__)


def test_billiards_forks_call_the_hooks_of_os() -> None:
    calls: list[str] = []
    os.register_at_fork(before=lambda: calls.append("before"), after_in_parent=lambda: calls.append("after"))
    process = billiard.Process(target=int)
    process.start()
    process.join()
    assert calls == ["before", "after"]


def test_two_threads_replace_the_processes_of_a_pool_without_an_event_loop() -> None:
    """billiard's supervisor and ``--autoscale``, both through the pool's own attribute, and without a lock."""
    assert "pool._maintain_pool()" in inspect.getsource(billiard_pool.Supervisor)
    assert "self._maintain_pool()" in inspect.getsource(billiard_pool.Pool.maintain_pool)
    assert issubclass(billiard_pool.Supervisor, threading.Thread)


def test_a_message_is_read_as_a_worker_reads_it(app: Celery) -> None:
    message = published(
        app,
        args=(1,),
        task_id="id",
        root_id="r",
        parent_id="p",
        time_limit=2,
        soft_time_limit=1,
        shadow="s",
        headers={"tenant": "a"},
        stamped_headers=["batch"],
        batch="b",
        priority=3,
    )
    headers = message.headers
    assert {name: headers[name] for name in ("id", "root_id", "parent_id", "shadow", "tenant")} == {
        "id": "id",
        "root_id": "r",
        "parent_id": "p",
        "shadow": "s",
        "tenant": "a",
    }
    assert (headers["timelimit"], headers["stamps"]) == ([2, 1], {"batch": "b"})
    assert message.properties["priority"] == 3
