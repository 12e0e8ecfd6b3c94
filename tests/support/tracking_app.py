"""The project's Celery app with somebody who counts ends by Celery's signals, for a worker that a test starts."""

from __future__ import annotations

from typing import Any

from celery import signals

from project.celery import app

__all__ = ["app"]


def write(task_id: object, key: str) -> None:
    # Django is set up after this module is imported.
    from conductor_app.store.ids import of_task_id
    from tests.app.ledger import note

    note(of_task_id(task_id), key)


def succeeded(sender: Any, **_kwargs: Any) -> None:
    write(sender.request.id, "task_success")


def failed(task_id: str, **_kwargs: Any) -> None:
    write(task_id, "task_failure")


def revoked(request: Any, **_kwargs: Any) -> None:
    write(request.id, "task_revoked")


signals.task_success.connect(succeeded, weak=False)
signals.task_failure.connect(failed, weak=False)
signals.task_revoked.connect(revoked, weak=False)
