"""The tasks that the tests run."""

import os

from celery import current_app, shared_task

from tests.app import (  # noqa: F401 - registers their tasks
    bench,
    canvas,
    crashes,
    endings,
    forked,
    keyed,
    limited,
    operators,
    origin,
    parallel,
    plain,
    remembered,
    scenarios,
    shapes,
    stops,
    stored,
    telling,
    versions,
)
from tests.app.models import Ledger

current_app.register_task(plain.Hooked())


@shared_task
def add(x, y):
    """A plain Celery task: ``x + y``."""
    return x + y


@shared_task
def record(key, value=""):
    """A plain Celery task with a side effect: one ``Ledger`` row. Returns the id of the process that ran it."""
    return Ledger.objects.create(key=key, value=value, pid=os.getpid()).pid
