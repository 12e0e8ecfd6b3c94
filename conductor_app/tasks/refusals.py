"""What Celery's tasks can do, and a durable one refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from celery.contrib.django.task import DjangoTask

from conductor_app.exceptions import ProgrammingError

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:

    class _Task(DjangoTask[P, R]):
        """Celery's task for Django, generic."""
else:  # Celery 5.6 cannot be subscripted at run time.

    class _Task(DjangoTask, Generic[P, R]):
        abstract = True


class RefusingTask(_Task[P, R]):
    """A Celery task that refuses what cannot be durable."""

    abstract = True

    def retry(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's own retry, which would publish a second message.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(f"{self.name} is durable: use `raise ctx.retry(countdown=…)`.")

    def replace(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's replacement of a task: its id is the execution's, which goes on.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(
            f"{self.name} is durable and cannot be replaced. Use `return ctx.invoke(…)`, one call for each task of a "
            "chain, and ctx.map or ctx.start with ctx.gather for a group."
        )

    def add_to_chord(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to add to the chord that the task is in.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(
            f"{self.name} is durable: add_to_chord would add once for each attempt. Use ctx.start and ctx.gather, or "
            "ctx.map, in a body that takes the place of the chord."
        )

    def map(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse ``map``, as ``starmap`` and ``chunks``: one Celery task would call the body like a function.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("map")

    def starmap(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse it; see ``map``.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("starmap")

    def chunks(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse it; see ``map``.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("chunks")

    def _no_loop(self, name: str) -> ProgrammingError:
        return ProgrammingError(
            f"{self.name}.{name}() would call a durable task like a function, in one run of another task. Use ctx.map "
            "in a durable task, with max_parallel= if not all are to run at once, or celery.group elsewhere."
        )
