"""Plain Celery tasks as children: what has to be known of one to store it as an execution.

Its execution is a row like any other. What makes it plain stands in its options, so that the sweeper and ``dispatch``
need no task of that name. Its runs are ``plain_runs``' business.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import uuid
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

from celery import Task, current_app
from celery.utils.functional import maybe_list

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import InvalidArgumentType
from conductor_app.store.ids import new_root_id
from conductor_app.values.arguments import (
    PLAIN_OPTIONS,
    check_priority,
    due_time,
    expiry,
    message_options,
    routed,
)
from conductor_app.values.payloads import dump_call, dump_options
from conductor_app.values.tags import tags_of_call

#: The module ``django.tasks``; ``None`` before Django 6.0.
django_tasks: Any = importlib.import_module("django.tasks") if importlib.util.find_spec("django.tasks") else None
#: Name of the Celery task that runs a task of ``django.tasks``.
RUN_DJANGO_TASK = "conductor_app.run_django_task"


class Invocable(Protocol):
    """A task that can be a child; ``DurableTask`` is one, ``plain.PlainTask`` makes one of any other."""

    name: str

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        execution_id: uuid.UUID | None = None,
    ) -> transitions.NewExecution:
        """Check the arguments against the task's signature and return the execution to store."""
        ...

    def stored_payload(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the arguments as they are stored."""
        ...


def is_invocable(task: object) -> TypeGuard[Invocable]:
    """Tell whether a task of the app's registry is an ``Invocable``: one look, where a protocol's is one a member."""
    return hasattr(type(task), "new_execution")


class PlainTask:
    """A plain Celery task that can be a child; what ``Invocable`` asks for.

    Args:
        task: The task, as the app's registry has it.
    """

    def __init__(self, task: Task[Any, Any]) -> None:
        self._task: Any = task
        self.name = task.name

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        execution_id: uuid.UUID | None = None,
    ) -> transitions.NewExecution:
        """Check everything about an execution that is about to be stored, and return it.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            options: Options of ``apply_async``; the task's own count where they are silent.
            what: How the payload is called in an error.
            execution_id: The child's id.

        Raises:
            NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
            QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
        """
        task = self._task
        if options.get("unique_key") is not None:
            raise InvalidArgumentType(
                f"unique_key is not for {self.name}: a plain Celery task has none. Make it a durable task, or call it "
                "from one that has the key."
            )
        self._check_signature(args, kwargs, what)
        own = {name: value for name, value in task._get_exec_options().items() if value is not None}
        given = {**own, **{name: value for name, value in options.items() if value is not None}}
        given = routed(task, given, args, kwargs)
        given["shadow"] = given.get("shadow") or task.shadow_name(args, kwargs, dict(given))
        countdown, eta = due_time(given)
        return transitions.NewExecution(
            id=execution_id or new_root_id(),
            task=self.name,
            queue=given["queue"],
            payload=self.stored_payload(args, kwargs),
            max_attempts=task.max_retries + 1 if isinstance(task.max_retries, int) else None,
            priority=check_priority(given.get("priority")),
            options=dump_options(_kept_options(task, given)),
            countdown=countdown,
            eta=eta,
            expires=expiry(given.get("expires")),
            tags=tags_of_call(None, given.get("tags"), args, kwargs),
        )

    def stored_payload(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the arguments as they are stored.

        Raises:
            NotSerializable, PayloadTooLarge: They cannot be.
        """
        dump_models = getattr(self._task, "_dump_pydantic_arguments", None)
        sent_args, sent_kwargs = dump_models(args, kwargs) if dump_models is not None else (args, kwargs)
        return dump_call(list(sent_args), sent_kwargs, conductor_settings().MAX_PAYLOAD_BYTES)

    def _check_signature(self, args: list[Any], kwargs: Mapping[str, Any], what: str) -> None:
        if misfit := self.misfit(args, kwargs):
            raise InvalidArgumentType(f"{what} does not fit {misfit}")

    def misfit(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return how arguments do not fit the task as this process knows it; an empty text if they do.

        As ``apply_async`` checks them: none of ``typing=False``, none of a class-based task.
        """
        check = getattr(self._task, "__header__", None) if self._task.typing else None
        if check is None:
            return ""
        try:
            check(*args, **kwargs)
        except TypeError as error:
            return f"{self.name}{inspect.signature(self._task.run)}: {error}"
        return ""


class DjangoTask:
    """A task of ``django.tasks`` that can be a child: one of a Celery task that calls it.

    Its ``queue_name`` is a Celery queue, unless it is Django's ``default``; ``run_after`` is kept, ``priority`` is not,
    since Django counts it otherwise than brokers do. Its backend has no part in it.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._plain = PlainTask(current_app.tasks[RUN_DJANGO_TASK])
        self.name = self._plain.name

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        execution_id: uuid.UUID | None = None,
    ) -> transitions.NewExecution:
        """Check everything about an execution that is about to be stored, and return it; see ``PlainTask``."""
        task = self._task
        try:
            inspect.signature(task.func).bind(*([None] if task.takes_context else []), *args, **kwargs)
        except TypeError as error:
            signature = inspect.signature(task.func)
            raise InvalidArgumentType(f"{what} does not fit {task.module_path}{signature}: {error}") from None
        own = {"eta": task.run_after, "queue": None if task.queue_name == "default" else task.queue_name}
        options = {**own, **options}
        return self._plain.new_execution([], self._call(args, kwargs), options, what=what, execution_id=execution_id)

    def stored_payload(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the arguments as they are stored; see ``PlainTask``."""
        return self._plain.stored_payload([], self._call(args, kwargs))

    def _call(self, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {"path": self._task.module_path, "args": args, "kwargs": dict(kwargs)}


def is_django_task(child: object) -> bool:
    """Tell whether ``child`` is a task of ``django.tasks``."""
    return django_tasks is not None and isinstance(child, django_tasks.Task)


def _kept_options(task: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: given[name] for name in PLAIN_OPTIONS if given.get(name) is not None}
    for name in ("link", "link_error"):
        if name in kept:
            kept[name] = maybe_list(kept[name])
    return {
        # Celery itself runs these again when their process dies, and no others.
        "plain": {"acks_late": bool(task.acks_late or getattr(task, "retry_on_worker_lost", False))},
        "ignore_result": bool(given.get("ignore_result", task.ignore_result)),
        **message_options(task.name, given),
        **kept,
    }
