"""Fixtures for every test: real workers, and what they leave behind."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import _state, current_app, signals
from django.db import connection

from conductor_app.body.logger import body_logger
from tests.support.broker import purge
from tests.support.databases import empty_by_deleting, end_other_sessions
from tests.support.process import given_back
from tests.support.worker import Worker

ACCEPTANCE = Path(__file__).parent / "acceptance"
#: Modules of it about what passes between a database and a broker.
MESSAGING = {
    f"test_{name}"
    for name in (
        *("adoption", "broker_outage", "canvas", "hand_off", "killed_processes", "messages", "origin", "results"),
        *("revoke", "timeouts"),
    )
}
CONTRACT = Path(__file__).parent / "celery_contract"
BROWSER = Path(__file__).parent / "browser"
WORKERS = pytest.StashKey[list[Worker]]()
AROUND_TASKS = (signals.task_prerun, signals.task_postrun)
#: Queues that workers of this session have consumed, besides the default one.
QUEUES: set[str] = set()


@pytest.fixture
def worker(request: pytest.FixtureRequest, transactional_db: None, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """A function that starts a worker and returns it when it is ready; it takes the arguments of ``Worker``.

    With ``wait=False`` it returns at once, for a worker that may end before it is ready. Workers are killed when the
    test ends, and before the database is flushed.
    """
    workers = request.node.stash.setdefault(WORKERS, [])
    purge(QUEUES)

    def start(*, wait: bool = True, **options: Any) -> Worker:
        started = Worker(tmp_path / f"worker-{len(workers) + 1}.log", **options)
        workers.append(started)
        QUEUES.update(started.queues)
        return started.__enter__() if wait else started.start()

    yield start
    for started in workers:
        started.__exit__(None, None, None)
    end_other_sessions()


@pytest.fixture(autouse=True)
def _not_in_a_worker() -> None:
    """Let a test wait for results, although another one has started a pool inside this process."""
    _state._set_task_join_will_block(False)


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no test find what another one has left in this process: a broker that rests, a shutdown, a moved clock."""
    # A worker that is set up in this process hangs Celery's task logger over it.
    monkeypatch.setattr(body_logger, "parent", body_logger.parent)
    # Celery publishes with the list of receivers that there was at the first publish. When one of them has died, the
    # next ``connect`` makes a new list, of which it never hears.
    vars(current_app.amqp).pop("send_task_message", None)
    with given_back():
        yield


@pytest.fixture(autouse=True)
def _no_receiver_stays() -> Iterator[None]:
    """Let no test make this process a worker's for the tests after it, as Celery's fixup for Django would."""
    before = _receivers()
    yield
    assert _receivers() <= before, "A receiver of Celery's signals stays"


def _receivers() -> set[tuple[object, object]]:
    # Those of modules, which may be imported in the middle of a test, are not weak.
    return {
        (signal.name, key)
        for signal in AROUND_TASKS
        for key, receiver in signal.receivers
        if isinstance(receiver, weakref.ReferenceType)
    }


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """As pytest-django's; but no session of a killed worker keeps the database from being dropped."""
    empty_by_deleting()
    yield
    with django_db_blocker.unblock():
        end_other_sessions()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the browser tests to ``make test-browser``, which names them: they need what others do not."""
    if collection_path != BROWSER or any("browser" in str(word) for word in config.invocation_params.args):
        return None
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "worker" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.worker)
        if item.path.is_relative_to(CONTRACT):
            item.add_marker(pytest.mark.contract)
        if item.path.parent == ACCEPTANCE and item.path.stem in MESSAGING:
            item.add_marker(pytest.mark.messaging)
        if item.get_closest_marker("races") and connection.vendor != "postgresql":
            item.add_marker(pytest.mark.skip(reason="needs two connections to PostgreSQL"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Show the end of each worker's log with a failure."""
    report = yield
    if report.failed:
        for worker in item.stash.get(WORKERS, []):
            report.sections.append((f"Log of worker {worker.name} ({worker.pool})", worker.log_tail()))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Any:
    """Let pytest-xdist send a report with half a surrogate pair in a log: it takes nothing but UTF-8."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value
