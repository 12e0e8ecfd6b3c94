"""What Python's frames tell: whether a thread is in a call of a driver's, and for which connection."""

from __future__ import annotations

import sys
from inspect import getattr_static
from types import FrameType
from typing import Any

#: Modules that speak with a server.
SPEAKING = ("psycopg", "psycopg2", "MySQLdb", "pymysql")
#: Modules in which a thread is while it waits for a database; Django's own around them, or if they are written in C.
_DRIVERS = (*SPEAKING, "django.db.backends")
#: What these use to wait.
_WAITING = ("selectors", "socket", "ssl", "gevent", "eventlet")


def current_greenlet() -> Any:
    """Return the greenlet that runs, which is what gevent and eventlet have in the place of threads."""
    greenlet = sys.modules.get("greenlet")
    return None if greenlet is None else greenlet.getcurrent()


def innermost(thread: int, greenlet: Any) -> FrameType | None:
    """Return where a thread is, or a greenlet."""
    # One that waits keeps its own frame: Python knows only where the one is that runs. To that one, and to the only one
    # of a real thread, greenlet gives no frame.
    return getattr(greenlet, "gr_frame", None) or sys._current_frames().get(thread)


def in_driver(frame: Any) -> Any:
    """Return the innermost call of a thread, if that is one of a driver's."""
    while frame is not None and is_in(frame, _WAITING):
        frame = frame.f_back
    return frame if frame is not None and is_in(frame, _DRIVERS) else None


def is_in(frame: Any, modules: tuple[str, ...]) -> bool:
    """Tell whether a frame is of one of these modules, or of one inside of them."""
    return f"{frame.f_globals.get('__name__', '')}.".startswith(tuple(f"{name}." for name in modules))


def is_about(frame: Any, connection: Any) -> bool:
    """Tell whether a call in a driver, or in Django's backend, is about this connection."""
    while frame is not None and is_in(frame, _DRIVERS):
        if is_of(self_of(frame), connection):
            return True
        frame = frame.f_back
    return False


def self_of(frame: FrameType) -> Any:
    """Return the object of whose class a frame runs a method, if it does."""
    return frame.f_locals.get("self")


def is_of(caller: Any, connection: Any) -> bool:
    """Tell whether an object is a connection of Django's, or a cursor of it."""
    # None of its own code is called: a cursor of Django's being made looks for its attributes for ever.
    return caller is not None and (caller is connection or getattr_static(caller, "db", None) is connection)
