"""The Celery task that runs Django's own tasks (``django.tasks``, Django 6.0 and newer) as plain children."""

from __future__ import annotations

from typing import Any

from celery import shared_task
from django.utils import timezone
from django.utils.module_loading import import_string

from conductor_app.exceptions import UnknownTask
from conductor_app.ids import as_child_id
from conductor_app.models import Execution, database
from conductor_app.plain import RUN_DJANGO_TASK, django_tasks

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
                what is imported here.
        """
        child_id = as_child_id(self.request.id)
        rows = Execution.objects.using(database()).filter(task=self.name)
        if child_id is None or not rows.filter(pk=child_id).exists():
            raise UnknownTask(f"{self.name} runs the children of executions; {self.request.id} is none.")
        task = import_string(path)
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
