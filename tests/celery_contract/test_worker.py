"""Celery's worker in its main process: relied on by ``bootsteps`` and ``receivers``."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import billiard
import pytest
from billiard import pool as billiard_pool
from billiard.einfo import ExceptionInfo
from celery import Celery, bootsteps, signals
from celery.app import trace
from celery.apps.worker import Worker, _shutdown_handler
from celery.concurrency.base import BasePool
from celery.concurrency.gevent import TaskPool as GeventPool
from celery.events.state import State
from celery.exceptions import Ignore, TaskRevokedError
from celery.worker import control, pidbox
from celery.worker import state as worker_state
from celery.worker.autoscale import Autoscaler, WorkerComponent
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request, create_request_cls
from kombu import Connection, Consumer, Queue


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
    # Whoever else listens would make this process a worker's for all later tests: Celery's fixup closes the
    # connections of Django around each task, and so ends the transactions of tests.
    for sent in (signals.celeryd_init, signals.worker_init, signals.after_setup_task_logger):
        monkeypatch.setattr(sent, "receivers", [])
        monkeypatch.setattr(sent, "sender_receivers_cache", {})
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


def test_what_is_revoked_is_remembered_by_id_and_told_to_a_worker_that_begins(app: Celery) -> None:
    node = SimpleNamespace(app=app, hostname="w@h", tset=set)
    try:
        control.Panel.data["revoke_by_stamped_headers"](node, {"batch": ["b-0", "b-1"]})
        assert worker_state.revoked_stamps == {"batch": ["b-0", "b-1"]}
        worker_state.revoked.update(["one", "two"])
        worker_state.revoked.discard("one")
        assert list(control.hello(node, "other@h")["revoked"]) == ["two"]
        assert request_for(app, task_id="two").revoked()
        assert request_for(app, stamped_headers=["batch"], batch="b-1").revoked()
        assert not request_for(app, stamped_headers=["batch"], batch="b-2").revoked()
    finally:
        worker_state.revoked.clear()
        worker_state.revoked_stamps.clear()


def test_a_request_that_is_revoked_is_not_executed(app: Celery) -> None:
    """Both when its message comes and when its turn comes."""
    made = create_request_cls(Request, app.tasks["body"], BasePool(limit=1), "host", None, app=app)
    worker_state.revoked.add("gone")
    try:
        with pytest.raises(TaskRevokedError):
            request_for(app, base=made, task_id="gone").execute_using_pool(BasePool(limit=1))
    finally:
        worker_state.revoked.clear()


def test_remote_commands_are_looked_up_by_name_when_they_arrive() -> None:
    assert list(inspect.signature(control.revoke).parameters)[:4] == ["state", "task_id", "terminate", "signal"]
    assert control.Panel.data["revoke"].__name__ == "revoke"
    assert "handlers=control.Panel.data" in inspect.getsource(pidbox.Pidbox.__init__)


def test_a_pool_tells_its_size() -> None:
    assert isinstance(BasePool.num_processes, property)
    # In 5.6 the ``num_processes`` of gevent's pool is how many greenlets run.
    assert (GeventPool.is_green, BasePool.is_green, BasePool(limit=3).limit) == (True, False, 3)


def test_a_worker_tells_which_queues_it_consumes(app: Celery) -> None:
    app.amqp.queues.select(["contract"])
    assert list(app.amqp.queues.consume_from) == ["contract"]


def test_a_consumer_names_its_queues_and_an_autoscaler_its_most_processes(app: Celery) -> None:
    """The queues that remote commands have added or cancelled are the consumer's alone."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        consumer: Any = Consumer(channel, [app.amqp.queues["contract"]], auto_declare=False)
        consumer.add_queue(Queue("added"))
        consumer.cancel_by_queue("contract")
        assert [queue.name for queue in consumer.queues] == ["added"]
    pool: Any = SimpleNamespace(num_processes=1)
    scaler = Autoscaler(pool, max_concurrency=4, min_concurrency=1)
    assert scaler.max_concurrency == 4
    assert "w.autoscaler" in inspect.getsource(WorkerComponent.create)
    assert "self.task_consumer" in inspect.getsource(CeleryConsumer.add_task_queue)


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


def test_a_worker_closes_all_its_parts_before_it_stops_one_and_tells_after_the_last() -> None:
    """However it ends: a step's ``close`` is where a shutdown is heard, ``on_stopped`` where the pool is gone."""
    happened: list[str] = []

    class Part(bootsteps.StartStopStep):
        def close(self, parent: Any) -> None:
            happened.append(f"close {self.alias}")

        def start(self, parent: Any) -> None:
            happened.append(f"start {self.alias}")

        def stop(self, parent: Any) -> None:
            happened.append(f"stop {self.alias}")

        def terminate(self, parent: Any) -> None:
            happened.append(f"terminate {self.alias}")

    class First(Part):
        label = "first"

    class Second(Part):
        label = "second"
        requires = (First,)

    for how in ("stop", "terminate"):
        happened.clear()
        parent = SimpleNamespace(steps=[])
        blueprint = bootsteps.Blueprint(
            steps={First, Second},
            name="ours",
            on_start=lambda: happened.append("on_start"),
            on_stopped=lambda: pytest.fail("replaced"),
        )
        blueprint.on_stopped = lambda: happened.append("on_stopped")
        blueprint.apply(parent)
        blueprint.start(parent)
        blueprint.stop(parent, terminate=how == "terminate")
        assert happened == [
            *("on_start", "start first", "start second", "close first", "close second"),
            *(f"{how} second", f"{how} first", "on_stopped"),
        ]


def test_the_command_terminate_calls_revoke_where_its_module_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(control, "revoke", lambda *args, **kwargs: called.append((args, kwargs)))
    control.terminate(None, "SIGTERM", ["1"])
    assert called == [((None, ["1"]), {"terminate": True, "signal": "SIGTERM"})]


def test_a_cold_shutdown_waits_for_bodies_before_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the signal ``worker_shutting_down`` comes too late for them, and its handler itself is listened to."""
    happened: list[str] = []

    def say(**_kwargs: Any) -> None:
        happened.append("signal")

    signals.worker_shutting_down.connect(say)
    before = signal.getsignal(signal.SIGQUIT)
    monkeypatch.setattr("celery.worker.state.should_terminate", None)
    try:
        _shutdown_handler(
            SimpleNamespace(hostname="w@h"),
            sig="SIGQUIT",
            how="Cold",
            callback=lambda worker: happened.append("callback"),
            verbose=False,
        )
        handler: Any = signal.getsignal(signal.SIGQUIT)
        handler(signal.SIGQUIT, None)
    finally:
        signal.signal(signal.SIGQUIT, before)
        signals.worker_shutting_down.disconnect(say)
    assert happened == ["callback", "signal"]
