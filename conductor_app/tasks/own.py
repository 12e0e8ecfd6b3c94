"""The Celery task that runs Django's own tasks (``django.tasks``, Django 6.0 and newer) as plain children."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from celery import shared_task
from django.apps import apps
from django.utils import timezone

from conductor_app.body.plain import RUN_DJANGO_TASK, django_tasks
from conductor_app.exceptions import UnknownTask
from conductor_app.models import Execution, database
from conductor_app.store.ids import as_child_id


def find(path: str) -> Any:
    """Return what stands at the top level of a module of this project, by the path that a payload has.

    Of modules that this process has not imported yet, those of installed apps alone are: a stored name is not to choose
    what runs here.

    Args:
        path: The module and the name.

    Raises:
        UnknownTask: There is no such module here, or nothing of that name in it.
    """
    module_name, _separator, name = path.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None and any(f"{module_name}.".startswith(f"{config.name}.") for config in apps.get_app_configs()):
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # it is there, and what it imports is not
    # Not getattr(), which a module may answer with an import.
    if module is None or name not in vars(module):
        raise UnknownTask(
            f"{path} is not known here. It has to stand in a module of an installed app, or in one that the worker "
            "imports when it starts (CELERY_IMPORTS)."
        )
    return vars(module)[name]


if django_tasks is not None:

    @shared_task(bind=True, name=RUN_DJANGO_TASK)
    def run_django_task(self: Any, path: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a task of ``django.tasks`` and return its result.

        Args:
            path: Where the task is defined: its module and name.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            UnknownTask: There is no such task, or nobody has invoked it: whoever can publish messages is not to choose
                what runs here.
        """
        child_id = as_child_id(self.request.id)
        rows = Execution.objects.using(database()).filter(task=self.name)
        if child_id is None or not rows.filter(pk=child_id).exists():
            raise UnknownTask(f"{self.name} runs the children of executions; {self.request.id} is none.")
        task = find(path)
        if not isinstance(task, django_tasks.Task):
            raise UnknownTask(f"{path} is {type(task).__name__}, no task of django.tasks. Is @task missing above it?")
        if task.takes_context:
            now = timezone.now()
            running = django_tasks.TaskResult(
                task=task,
                id=self.request.id,
                status=django_tasks.TaskResultStatus.RUNNING,
                enqueued_at=None,
                started_at=now,
                finished_at=None,
                last_attempted_at=now,
                args=args,
                kwargs=kwargs,
                backend=task.backend,
                errors=[],
                worker_ids=[self.request.hostname or ""],
            )
            args = [django_tasks.TaskContext(task_result=running), *args]
        return task.call(*args, **kwargs)
