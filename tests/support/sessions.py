"""Actors with connections of their own, on each database: what one does in an open transaction while another acts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Self

from django.db import connection, connections, transaction

from tests.support.polling import wait_until

PATIENCE_SECONDS = 20
#: What a user may set, or forget to set, in ``DATABASES["default"]["OPTIONS"]``.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sqlite": [{}],
    "postgresql": [{}, {"isolation_level": 3}],
    "mysql": [{}, {"isolation_level": "repeatable read"}],
}

#: Who waits for a lock.
_WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    " AND datname = current_database()",
    "mysql": "SELECT count(*) FROM information_schema.processlist p JOIN information_schema.innodb_trx t"
    " ON t.trx_mysql_thread_id = p.id WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()",
}


class Actor:
    """A thread with a connection of its own."""

    def __init__(self, options: dict[str, Any], act: Callable[[], Any], *, holds: bool = False) -> None:
        self._options = options
        self._act = act
        self._holds = holds
        self._held, self._over = threading.Event(), threading.Event()
        self._rolls_back = False
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        mine = connections["default"]
        mine.settings_dict = copy.deepcopy(mine.settings_dict)
        mine.settings_dict["OPTIONS"].update(self._options)
        try:
            if not self._holds:
                self._outcome = self._act()
                return
            with transaction.atomic():
                self._outcome = self._act()
                self._held.set()
                assert self._over.wait(PATIENCE_SECONDS)
                transaction.set_rollback(self._rolls_back)
        except BaseException as error:  # noqa: BLE001 - told in the test's thread
            self._outcome = error
        finally:
            self._held.set()
            connections.close_all()

    def held(self) -> Self:
        """Return when all is written and nothing is committed."""
        assert self._held.wait(PATIENCE_SECONDS)
        assert not isinstance(self._outcome, BaseException), repr(self._outcome)
        return self

    def go_on(self, *, rolls_back: bool = False) -> Any:
        """Let it commit, and return what it has come to."""
        self._rolls_back = rolls_back
        self._over.set()
        return self.outcome()

    def outcome(self) -> Any:
        """Return what it has come to, an error too."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "it has not ended"
        return self._outcome

    def wait_blocked(self) -> Self:
        """Return when it waits for a lock; SQLite does not tell."""
        if connection.vendor in _WAITING:
            # MariaDB shows what it has shown before to whoever asks more often than each 0.1 s.
            wait_until(self._is_blocked, PATIENCE_SECONDS, interval=0.15, message="it does not wait")
        return self

    def _is_blocked(self) -> bool:
        assert self._thread.is_alive(), f"it did not wait: {self._outcome!r}"
        with connection.cursor() as cursor:
            cursor.execute(_WAITING[connection.vendor])
            return bool(cursor.fetchone()[0])


def in_turn(options: dict[str, Any], first: Callable[[], Any], second: Callable[[], Any], **end: Any) -> list[Any]:
    """Let one act, and the other one wait for its commit."""
    holding = Actor(options, first, holds=True).held()
    waiting = Actor(options, second).wait_blocked()
    return [holding.go_on(**end), waiting.outcome()]
