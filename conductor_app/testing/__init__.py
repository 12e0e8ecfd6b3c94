"""The test kit: run what is due, move the clock, run one body alone, and say what became of an execution.

pytest gets it as the fixture ``conductor`` (``conductor_app.testing.plugin``), a ``TestCase`` from ``ConductorMixin``.
Names are imported when they are first used, so pytest can load the plugin before Django is set up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conductor_app.testing.assertions import assert_cancelled as assert_cancelled
    from conductor_app.testing.assertions import assert_failed as assert_failed
    from conductor_app.testing.assertions import assert_invoked as assert_invoked
    from conductor_app.testing.assertions import assert_succeeded as assert_succeeded
    from conductor_app.testing.assertions import assert_waiting as assert_waiting
    from conductor_app.testing.bodies import run as run
    from conductor_app.testing.driving import advance as advance
    from conductor_app.testing.driving import drain as drain
    from conductor_app.testing.kit import Conductor as Conductor
    from conductor_app.testing.kit import ConductorMixin as ConductorMixin
    from conductor_app.testing.kit import ConductorTestCase as ConductorTestCase
    from conductor_app.testing.outcomes import BodyError as BodyError
    from conductor_app.testing.outcomes import StepCall as StepCall

_EXPORTS = {
    "BodyError": "outcomes",
    "Conductor": "kit",
    "ConductorMixin": "kit",
    "ConductorTestCase": "kit",
    "StepCall": "outcomes",
    "advance": "driving",
    "assert_cancelled": "assertions",
    "assert_failed": "assertions",
    "assert_invoked": "assertions",
    "assert_succeeded": "assertions",
    "assert_waiting": "assertions",
    "drain": "driving",
    "run": "bodies",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605 - names, each a string


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
