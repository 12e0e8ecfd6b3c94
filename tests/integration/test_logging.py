"""Which handlers get what bodies log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter

from conductor_app import ExecutionContext
from conductor_app.host import receivers
from tests.support.bodies import durable, run

pytestmark = pytest.mark.django_db

BODY = logging.getLogger("conductor_app.execution.body")
OURS = [logging.getLogger(name) for name in ("conductor_app", "conductor_app.execution")]


class Kept(logging.Handler):
    """Keeps what it would write."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    kept = [(one, one.level, one.handlers[:], one.parent) for one in (BODY, *OURS)]
    yield
    for one, level, handlers, parent in kept:
        one.handlers, one.parent = handlers, parent
        one.setLevel(level)


class SetUp:
    """What Celery sets up in a worker: a handler of the root's, and one for tasks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.root = Kept(ColorFormatter("%(message)s", use_color=False))
        self.tasks = Kept(TaskFormatter("%(task_name)s[%(task_id)s]: %(message)s", use_color=False))

    def __call__(self) -> None:
        # Not in a fixture: pytest adds its own handlers to the root's after that.
        self._monkeypatch.setattr(logging.getLogger(), "handlers", [self.root])
        logger = logging.Logger("as celery.task", logging.INFO)  # noqa: LOG001 - known to nobody else
        logger.addHandler(self.tasks)
        receivers.show_ids(logger=logger)


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> SetUp:
    return SetUp(monkeypatch)


@durable(name="tests.logging.body")
def body(ctx: ExecutionContext) -> None:
    ctx.logger.debug("quiet")
    ctx.logger.info("hello")

    def elsewhere() -> None:
        thread = threading.Thread(target=ctx.logger.info, args=("from a thread",))
        thread.start()
        thread.join()

    ctx.step("elsewhere", elsewhere)


def test_lines_go_to_celerys_handler_of_tasks(set_up: SetUp) -> None:
    set_up()
    execution = run(body)
    shown = f"tests.logging.body[{execution.pk}]: "
    assert set_up.tasks.lines == [f"{shown}hello", f"{shown}from a thread"]
    assert "hello" not in set_up.root.lines


def test_a_level_of_the_projects_own_counts(set_up: SetUp) -> None:
    OURS[0].setLevel(logging.DEBUG)
    set_up()
    execution = run(body)
    assert set_up.tasks.lines[0] == f"tests.logging.body[{execution.pk}]: quiet"


@pytest.mark.parametrize("number", [0, 1])
def test_a_handler_of_the_projects_own_keeps_its_lines(set_up: SetUp, number: int) -> None:
    own = Kept(logging.Formatter("%(execution_id)s %(message)s"))
    OURS[number].addHandler(own)
    OURS[number].setLevel(logging.INFO)
    set_up()
    execution = run(body)
    assert f"{execution.pk} hello" in own.lines
    assert set_up.tasks.lines == []


def test_a_format_of_the_projects_own_for_all_lines_keeps_them(set_up: SetUp) -> None:
    set_up.root.setFormatter(logging.Formatter("own: %(message)s"))
    OURS[1].setLevel(logging.INFO)
    set_up()
    run(body)
    assert "own: hello" in set_up.root.lines
    assert set_up.tasks.lines == []
