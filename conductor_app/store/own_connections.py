"""Connections that are the engine's alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from django.db import connections

from conductor_app.store.waits import at_work

#: Longest time to connect the engine's own sessions, in seconds, unless the project's settings say another.
_CONNECT_SECONDS = 5


def use_own(using: str) -> Any:
    """Give this thread a connection that is the engine's alone, and return it.

    Bodies may hold all the connections of a pool (``OPTIONS["pool"]``) for as long as they last, and what keeps their
    leases must not wait for one. It is like the project's in everything else, and gives up connecting after a while.
    """
    connection: Any = connections.create_connection(using)
    settings = copy.copy(connection.settings_dict)
    options = dict(settings.get("OPTIONS") or {})
    options.pop("pool", None)
    # A service's file may have its own.
    if connection.vendor in ("postgresql", "mysql") and "service" not in options:
        options.setdefault("connect_timeout", _CONNECT_SECONDS)
    connection.settings_dict = {**settings, "OPTIONS": options}
    # Whatever is asked on it is the engine's.
    connection.execute_wrappers.append(_noting)
    connections[using] = connection
    return connection


def _noting(execute: Callable[..., Any], sql: Any, params: Any, many: Any, context: dict[str, Any]) -> Any:
    with at_work(context["connection"]):
        return execute(sql, params, many, context)
