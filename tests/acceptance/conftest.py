"""Fixtures of the acceptance tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from tests.support import history
from tests.support.postgres import PrivatePostgres, default_database


@pytest.fixture
def recorded(transactional_db: None) -> Iterator[None]:
    """Let the database record every move of every execution, for ``tests.support.invariants.check``."""
    with history.recording():
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[PrivatePostgres]:
    """A PostgreSQL server that tests may crash."""
    if connection.vendor != "postgresql":
        pytest.skip("this would only repeat the run on PostgreSQL, whose driver the others do not need")
    # What does not wait for the disk has not arrived there, either, unless something else that does came after it.
    with PrivatePostgres(settings={"wal_writer_delay": "10s"}) as server:
        yield server


@pytest.fixture
def postgres(worker: Any, server: PrivatePostgres) -> Iterator[PrivatePostgres]:
    """That server, in the place of the suite's database."""
    with default_database(server.url), history.recording():
        yield server
