"""The kit as one object, for the fixture ``conductor`` and for test cases."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Self

from django.test import TestCase

from conductor_app.store import clock
from conductor_app.testing import assertions, bodies, driving
from conductor_app.transitions import dispatch

if TYPE_CHECKING:
    from unittest import TestCase as _Base
else:
    _Base = object


class Conductor:
    """The functions of ``conductor_app.testing`` as methods, and a context manager around a test.

    While it is in use nothing is published to a broker, by no thread of this process; when it ends, ``conductor_app``'s
    clock is set right.
    """

    drain = staticmethod(driving.drain)
    advance = staticmethod(driving.advance)
    run = staticmethod(bodies.run)
    assert_succeeded = staticmethod(assertions.assert_succeeded)
    assert_failed = staticmethod(assertions.assert_failed)
    assert_cancelled = staticmethod(assertions.assert_cancelled)
    assert_waiting = staticmethod(assertions.assert_waiting)
    assert_invoked = staticmethod(assertions.assert_invoked)

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(dispatch.inline(everywhere=True))
        self._stack.callback(clock.reset)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class ConductorMixin(_Base):
    """For a test case of any kind: ``class OrderTest(ConductorMixin, TestCase)``.

    It gives ``self.conductor``. A ``setUp`` of your own calls ``super().setUp()`` first.
    """

    #: The kit; see ``Conductor``.
    conductor: Conductor

    def setUp(self) -> None:
        """Begin to use the kit."""
        super().setUp()
        self.conductor = self.enterContext(Conductor())


class ConductorTestCase(ConductorMixin, TestCase):
    """Django's ``TestCase`` with ``self.conductor``."""
