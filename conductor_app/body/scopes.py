"""What a project wants around the bodies of its durable tasks: a tenant's schema, a language, a correlation id.

A scope is called with the context and the body's arguments, and returns a context manager. It is entered and left with
each run of the body; also with those that begin again from the top after a wait. What hooks of Celery do (a base class,
``task_prerun``) is done once for each run, too, but cannot be undone in the same place, nor does the test kit call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import InvalidArgumentType

Scope = Callable[..., AbstractContextManager[object]]


def call_body(task: Any, context: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the body of a durable task inside of the project's scope, and of the task's own inside of that.

    Raises:
        BaseException: What the body or a scope raises. A scope may replace what the body raises, but not swallow it.
        ImproperlyConfigured: ``CONDUCTOR["AROUND_BODY"]`` cannot be used.
        InvalidArgumentType: A scope has returned no context manager.
    """
    path = conductor_settings().AROUND_BODY
    scopes = (
        *([('CONDUCTOR["AROUND_BODY"]', of_project(path))] if path else ()),
        *([(f"around= of {task.name}", task.around)] if task.around is not None else ()),
    )
    if not scopes:
        return task.run(context, *args, **kwargs)
    raised: BaseException | None = None
    try:
        with ExitStack() as entered:
            for name, scope in scopes:
                entered.enter_context(_opened(name, scope(context, *args, **kwargs)))
            try:
                return task.run(context, *args, **kwargs)
            except BaseException as error:
                raised = error
                raise
        assert raised is not None
        # Swallowed: a failure would become a success without a result, and a suspension the end.
        raise raised
    finally:
        raised = None  # it holds this frame


def _opened(name: str, scope: Any) -> AbstractContextManager[object]:
    if not isinstance(scope, AbstractContextManager):
        raise InvalidArgumentType(
            f"{name} must return a context manager, got {type(scope).__name__}. Is it decorated with "
            "@contextlib.contextmanager?"
        )
    return scope


@functools.lru_cache(maxsize=4)
def of_project(path: str) -> Scope:
    """Return the scope that ``CONDUCTOR["AROUND_BODY"]`` names.

    Raises:
        ImproperlyConfigured: There is none.
    """
    try:
        scope = import_string(path)
    except Exception as error:
        raise ImproperlyConfigured(
            f'CONDUCTOR["AROUND_BODY"] = {path!r} cannot be imported: {type(error).__name__}: {error}'
        ) from error
    if not callable(scope):
        raise ImproperlyConfigured(
            f'CONDUCTOR["AROUND_BODY"] = {path!r} must be a function that returns a context manager, got '
            f"{type(scope).__name__}."
        )
    return scope  # type: ignore[no-any-return]
