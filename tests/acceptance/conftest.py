"""Fixtures of the acceptance tests."""

from collections.abc import Iterator

import pytest

from tests.support import history


@pytest.fixture
def recorded(transactional_db: None) -> Iterator[None]:
    """Let the database record every move of every execution, for ``tests.support.invariants.check``."""
    with history.recording():
        yield
