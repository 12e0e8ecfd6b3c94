"""Statements that change the session that they run in, noticed while somebody wants to know."""

from __future__ import annotations

import contextlib
import re
from typing import Any

#: Statements that change more than the transaction that they stand in, or may.
_SESSION_STATEMENT = re.compile(
    r"\s*(?:SET(?!\s+(?:LOCAL|CONSTRAINTS|TRANSACTION)\b)|RESET|DISCARD|USE|PRAGMA)\b", re.IGNORECASE
)


def _notice(execute: Any, sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
    # What is no text is an object of the driver's, made by hand.
    if not isinstance(sql, str) or _SESSION_STATEMENT.match(sql) or "set_config" in sql:
        context["connection"]._conductor_changed_session = True
    return execute(sql, params, many, context)


#: What a connection's ``execute_wrappers`` are if nobody but this module, or nobody at all, listens to statements.
NOT_LISTENING: tuple[list[Any], ...] = ([], [_notice])


def notice_session_statements(connection: Any) -> None:
    """Note from now on whether a statement changes the session of a connection."""
    if _notice not in connection.execute_wrappers:
        connection._conductor_changed_session = False
        connection.execute_wrappers.append(_notice)


def stop_noticing(connection: Any) -> None:
    """Note that no more."""
    with contextlib.suppress(ValueError):
        connection.execute_wrappers.remove(_notice)


def has_changed_session(connection: Any) -> bool:
    """Tell whether a statement that changes the session was noticed, and forget it."""
    return bool(vars(connection).pop("_conductor_changed_session", False))
