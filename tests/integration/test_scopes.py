"""What a project puts around the bodies of its durable tasks: ``around=`` and ``CONDUCTOR["AROUND_BODY"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from conductor_app import ExecutionContext, checks, durable_task, testing
from tests.support.bodies import durable, failure, run, start

pytestmark = pytest.mark.django_db

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
told: list[str] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    told.clear()


@contextlib.contextmanager
def scope(ctx: ExecutionContext, name: str = "", **_: Any) -> Iterator[None]:
    """A tenant's scope, as a project has one."""
    told.append(f"enter {name} {ctx.attempt}")
    token = tenant.set(name)
    try:
        yield
    except BaseException as error:
        told.append(type(error).__name__)
        raise
    finally:
        tenant.reset(token)
        told.append(f"leave {name}")


@contextlib.contextmanager
def outer(ctx: ExecutionContext, *_args: Any, **_kwargs: Any) -> Iterator[None]:
    told.append("outer")
    yield
    told.append("end of outer")


@contextlib.contextmanager
def swallowing(ctx: ExecutionContext, *_args: Any, **_kwargs: Any) -> Iterator[None]:
    with contextlib.suppress(BaseException):
        yield


@durable
def leaf(ctx: ExecutionContext) -> str:
    return tenant.get()


@durable(around=scope)
def named(ctx: ExecutionContext, name: str) -> list[str]:
    return [tenant.get(), ctx.invoke("leaf", leaf)]


HERE = "tests.integration.test_scopes"


def test_each_run_of_a_body_is_inside_of_its_tasks_scope_and_nothing_else_is() -> None:
    assert run(named, name="Ann").get_result() == ["Ann", "nobody"]
    assert told == ["enter Ann 1", "SuspendExecution", "leave Ann", "enter Ann 1", "leave Ann"]
    assert tenant.get() == "nobody"


def test_the_projects_scope_is_around_all_bodies_and_outside_of_the_tasks_own(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "AROUND_BODY": f"{HERE}.outer"}

    @durable(around=scope)
    def short(ctx: ExecutionContext, name: str) -> str:
        return tenant.get()

    assert run(short, name="Ann").get_result() == "Ann"
    assert run(leaf).get_result() == "nobody"
    assert told == ["outer", "enter Ann 1", "leave Ann", "end of outer", "outer", "end of outer"]


def test_what_a_scope_raises_is_the_attempts_error() -> None:
    def refuses(ctx: ExecutionContext, name: str) -> Any:
        raise LookupError(f"no tenant {name}")

    @durable(around=refuses, max_retries=1, retry_backoff=False, default_retry_delay=1)
    def body(ctx: ExecutionContext, name: str) -> None:
        told.append("ran")

    execution = run(body, name="Ann")
    assert (execution.status, execution.attempt, told) == ("failed", 2, [])
    assert failure(execution).message == "no tenant Ann"


def test_a_scope_may_replace_what_a_body_raises() -> None:
    @contextlib.contextmanager
    def replaces(ctx: ExecutionContext) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise LookupError("replaced") from error

    @durable(around=replaces, max_retries=0)
    def body(ctx: ExecutionContext) -> None:
        raise ValueError("bad")

    assert failure(run(body)).message == "replaced"


def test_a_scope_that_swallows_turns_no_failure_into_a_success_and_no_wait_into_an_end() -> None:
    @durable(around=swallowing, max_retries=0)
    def fails(ctx: ExecutionContext) -> None:
        raise ValueError("bad")

    @durable(around=swallowing)
    def waits(ctx: ExecutionContext) -> str:
        return ctx.invoke("leaf", leaf)  # type: ignore[no-any-return]

    assert failure(run(fails)).message == "bad"
    assert run(waits).get_result() == "nobody"


def test_a_scope_that_is_no_context_manager_fails_at_once_and_says_so() -> None:
    @durable(around=lambda ctx: iter(()))
    def body(ctx: ExecutionContext) -> None:
        told.append("ran")

    execution = run(body)
    assert (execution.status, execution.attempt, told) == ("failed", 1, [])
    message = failure(execution).message
    assert message.startswith("around= of tests.bodies.body")
    assert message.endswith("got tuple_iterator. Is it decorated with @contextlib.contextmanager?")


def test_the_scope_of_a_task_is_a_function() -> None:
    with pytest.raises(TypeError, match="around must be a function that returns a context manager, got str"):
        durable_task(around=f"{HERE}.scope")(lambda ctx: None)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no.such.scope", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("scope", "cannot be imported: ImportError: scope doesn't look like a module path"),
        (f"{HERE}.told", "must be a function that returns a context manager, got list"),
    ],
)
def test_a_path_that_names_no_scope_is_e017_and_an_attempts_error(settings: Any, path: str, text: str) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "AROUND_BODY": path}
    (found,) = checks.settings.check_settings()
    assert found.id == "conductor.E017"
    assert text in found.msg
    assert text in str(start(leaf).error_message)


def test_the_kit_runs_a_body_inside_of_its_scopes(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "AROUND_BODY": f"{HERE}.outer"}
    assert testing.run(named, {"name": "Ann"}, children={"leaf": "done"}) == ["Ann", "done"]
    assert told == [
        *("outer", "enter Ann 1", "SuspendExecution", "leave Ann"),
        *("outer", "enter Ann 1", "leave Ann", "end of outer"),
    ]
