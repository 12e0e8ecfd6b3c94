"""What a run tells of itself: kept in memory, and stored now and then."""

from __future__ import annotations

import logging
import time

from django.db import DatabaseError, InterfaceError

from conductor_app.body.journal import Journal
from conductor_app.exceptions import AbandonRun
from conductor_app.values.state import Told

logger = logging.getLogger("conductor_app.execution")

#: A run stores what it tells at most this often, in seconds; the last word comes with its end.
INTERVAL_SECONDS = 1.0
#: After the database has not taken it, so much later: a body is not to wait for that again and again.
REST_SECONDS = 5.0

_AWAY = (DatabaseError, InterfaceError, AbandonRun)


class Teller:
    """What one run tells, over all passes of its body. It costs a run that tells nothing no statement.

    What is told before the last recorded step of a replay (``replayed``) was told by an earlier run. It is stored only
    if nothing is there that came after it: in a fork, or what a run that died had not stored any more.
    """

    def __init__(self) -> None:
        self._replayed = Told()
        #: What this run has told and not stored.
        self._new = Told()
        #: What is stored, since this run has looked.
        self._stored: Told | None = None
        self._has_looked = False
        #: How many bytes all published values have, as far as they have been counted: of a replay, and of all.
        self._sizes: dict[bool, int] = {}
        self._is_due_from = 0.0
        #: Whether the body has told anything, now or in a replay.
        self.is_used = False

    @property
    def is_pending(self) -> bool:
        """Whether there is something to store."""
        return self._new.done is not None or bool(self._new.published)

    @property
    def is_due(self) -> bool:
        """Whether there is something to store, and it may be stored now."""
        return self.is_pending and time.monotonic() >= self._is_due_from

    @property
    def is_to_look(self) -> bool:
        """Whether this run does not know yet what is stored, and may find out now."""
        return not self._has_looked and time.monotonic() >= self._is_due_from

    def progress(self, done: object, total: object, note: object, *, is_replay: bool) -> None:
        """Note how far the body is; see ``ExecutionContext.progress``."""
        self._note(self._said(is_replay).with_progress(done, total, note), is_replay)

    def publish(self, key: str, value: object, *, is_replay: bool) -> None:
        """Note a value; see ``ExecutionContext.publish``."""
        self._note(self._said(is_replay).with_value(key, value), is_replay)

    def _said(self, is_replay: bool) -> Told:
        return self._replayed if is_replay else self._new

    def _note(self, told: Told, is_replay: bool) -> None:
        said = self._said(is_replay)
        is_published = told.published is not said.published
        # Counts have no size, and a body in a loop tells nothing else, or another note each time.
        if is_published or told.note != said.note:
            known = None if is_published else self._sizes.get(is_replay)
            self._sizes[is_replay] = (told if is_replay else told.over(self._before())).check_size(known)
        if is_replay:
            self._replayed = told
        else:
            self._new = told
        self.is_used = True

    def _before(self) -> Told:
        """Return what was told before what is new."""
        return self._replayed if self._stored is None else self._stored.over(self._replayed)

    def look(self, journal: Journal) -> None:
        """Find out what is stored, if the database says it."""
        if self._has_looked:
            return
        try:
            self._stored = journal.told()
            self._has_looked = True
            self._sizes.clear()
        except _AWAY as error:
            self._rest(error)

    def _rest(self, error: BaseException) -> None:
        self._is_due_from = time.monotonic() + REST_SECONDS
        logger.warning("What a body tells (ctx.progress, ctx.publish) waits for the database: %s", error)

    def store(self, journal: Journal, *, waits: bool = False) -> None:
        """Store what is told. What the database does not take is not the body's to know, and is tried again later.

        Args:
            waits: Whether to wait for a lock of the execution's row.

        Raises:
            LeaseLost: Another run has taken over.
        """
        self.look(journal)
        if not self._has_looked:
            return
        told = self._new.over(self._before())
        try:
            is_stored = journal.tell(told, is_new=self._stored is None, waits=waits)
        except _AWAY as error:
            self._rest(error)
            return
        self._is_due_from = time.monotonic() + INTERVAL_SECONDS
        if is_stored:
            self._stored, self._new = told, Told()

    def finish(self, journal: Journal, *, may_have_missed: bool) -> None:
        """Store the last word of a run.

        Args:
            may_have_missed: Whether what was told before the last recorded step may never have been stored.

        Raises:
            LeaseLost: Another run has taken over.
        """
        if not self.is_pending and self.is_used and may_have_missed:
            self._find_missed(journal)
        if self.is_pending:
            self.store(journal, waits=True)

    def _find_missed(self, journal: Journal) -> None:
        self.look(journal)
        if self._has_looked and self._stored is None:
            self._new = self._replayed
        elif self._stored is not None:
            known = self._stored.published
            self._new = Told(
                published={key: value for key, value in self._replayed.published.items() if key not in known}
            )

    def shown(self, journal: Journal) -> Told:
        """Return all that the execution has told, as far as the database says it."""
        if self.is_used:
            self.look(journal)
        return self._new.over(self._before())
