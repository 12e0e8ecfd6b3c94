"""The fixture ``stage``."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django_celery_results.models import TaskResult

from tests.model.simulation import Stage
from tests.support import history
from tests.support.executions import committing


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test."""
    with committing(django_db_blocker):
        yield
        TaskResult.objects.all().delete()


@pytest.fixture
def stage(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The patched product, for as long as the test lasts."""
    with history.recording():
        stage = Stage(monkeypatch)
        # Thousands of faults are as many lines, of which a failure would show all.
        logging.disable(logging.CRITICAL)
        with stage.open():
            yield stage
        logging.disable(logging.NOTSET)
        monkeypatch.undo()
        connection.close()  # it does not wait for the disk
