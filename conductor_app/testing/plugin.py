"""The pytest plugin. It comes with the package: pytest finds it by its entry point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conductor_app.testing.kit import Conductor


@pytest.fixture
def conductor() -> Iterator[Conductor]:
    """The test kit: ``drain``, ``advance``, ``run`` and the assertions.

    While a test uses it nothing is published to a broker; afterwards ``conductor_app``'s clock is set right. All but
    ``run`` need the database: ask for ``db``, or mark the test with ``django_db``.
    """
    # Not at the top: pytest imports plugins before Django is set up.
    from conductor_app.testing.kit import Conductor  # noqa: PLC0415

    with Conductor() as kit:
        yield kit
