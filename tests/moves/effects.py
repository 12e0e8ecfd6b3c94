"""What a move does to all rows, in words that are the same for each form of it and on each database.

For example, the claim of a queued root::

    root 1: status queued → running, fence 0 → 1, lease_owner none → 'test@host/1', started_at none → now, …
    answer: root 1, as stored
    signals: execution_started of root 1
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import current_app
from django.db import models
from django.test import TestCase

from conductor_app import signals
from conductor_app.exceptions import CancelExecution, LeaseLost, ReleaseExecution, RetryRefused
from conductor_app.models import Attempt, Event, Execution, FailedExecution, Step, database
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import HandOff
from conductor_app.transitions.steps import Memory
from tests.support.process import NotingBroker

#: The model of a row, and its values by column.
Row = tuple[type[models.Model], dict[str, Any]]
_MODELS: tuple[type[models.Model], ...] = (Execution, Attempt, Step, FailedExecution, Event)
_SIGNALS = ("execution_created", "execution_started", "execution_suspended", "execution_finished")
#: All spans of the worlds are multiples of so many seconds, and a test takes less than half of them.
SPAN_SECONDS = 10
_REFUSALS = (CancelExecution, LeaseLost, ReleaseExecution, RetryRefused)


class Effect:
    """Runs one move and notes what it has done.

    Attributes:
        lines: What it has done.
    """

    def __init__(self, act: Callable[[], Any]) -> None:
        self._names: dict[uuid.UUID, str] = {}
        self._heard: list[tuple[str, uuid.UUID, str]] = []
        self._published: list[uuid.UUID] = []
        before = self._rows()
        self._begun = clock.read(database())
        with self._listening():
            answer = self._answer_of(act)
        after = self._rows()
        self.lines = [
            *self._changes(before, after),
            f"answer: {self._text(answer)}",
            *(f"signal: {signal} of {self._text(pk)}{more}" for signal, pk, more in self._heard),
            *(f"published: {self._text(pk)}" for pk in self._published),
        ]

    def _answer_of(self, act: Callable[[], Any]) -> Any:
        try:
            with TestCase.captureOnCommitCallbacks(using=database(), execute=True):
                return act()
        except _REFUSALS as error:
            return error

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def receiver_of(name: str) -> Callable[..., None]:
            def hear(execution: Execution, **kwargs: Any) -> None:
                told = [f", {key} {kwargs[key]}" for key in ("status", "step") if kwargs.get(key)]
                self._heard.append((name, execution.pk, "".join(told)))

            return hear

        receivers = {name: receiver_of(name) for name in _SIGNALS}
        for name, receiver in receivers.items():
            getattr(signals, name).connect(receiver)
        before, process.broker = process.broker, NotingBroker(self._published)
        try:
            yield
        finally:
            process.broker = before
            for name, receiver in receivers.items():
                getattr(signals, name).disconnect(receiver)

    def _rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for execution in Execution.objects.order_by("depth", "created_at", "pk"):
            self._name(execution)
        for model in _MODELS:
            for row in sorted(model._base_manager.using(database()), key=self._name):
                values = {field.attname: getattr(row, field.attname) for field in model._meta.concrete_fields}
                rows[self._name(row)] = (model, values)
        return rows

    def _name(self, row: Any) -> str:
        if isinstance(row, Execution):
            if row.pk not in self._names:
                place = "" if row.position is None else f"[{row.position}]"
                roots = sum("/" not in name for name in self._names.values())
                own = (
                    f"root {roots + 1}" if row.parent_id is None else f"{self._names[row.parent_id]}/{row.step}{place}"
                )
                self._names[row.pk] = own
            return self._names[row.pk]
        of = self._names.get(row.execution_id, str(row.execution_id))
        if isinstance(row, Attempt):
            return f"{of}: run {row.run}"
        if isinstance(row, Step):
            return f"{of}: step {row.name}"
        return f"{of}: failure" if isinstance(row, FailedExecution) else f"{of}: event {row.name}"

    def _changes(self, before: dict[str, Row], after: dict[str, Row]) -> Iterator[str]:
        for name, (model, values) in after.items():
            known = before.get(name)
            if known is None:
                stored = [f"{column} {self._text(value, values)}" for column, value in self._told(model, values)]
                yield f"{name}: new, {', '.join(stored)}"
                continue
            moved = [
                f"{column} {self._text(known[1][column], values, is_old=True)} → {self._text(value, values)}"
                for column, value in values.items()
                if value != known[1][column]
            ]
            if moved:
                yield f"{name}: {', '.join(moved)}"
        for name in before.keys() - after.keys():
            yield f"{name}: deleted"

    def _told(self, model: type[models.Model], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """What a new row says beyond its key and the columns' defaults."""
        for field in model._meta.concrete_fields:
            value = values[field.attname]
            is_default = value in (None, "") or (field.has_default() and value == field.get_default())
            if not field.primary_key and not is_default:
                yield field.attname, value

    def _text(self, value: Any, row: dict[str, Any] | None = None, *, is_old: bool = False) -> str:
        if isinstance(value, dt.datetime):
            return self._instant(value, row, is_old=is_old)
        if isinstance(value, uuid.UUID):
            return self._names.get(value, "unknown")
        if isinstance(value, Execution):
            return f"{self._names.get(value.pk, 'unknown')}, {self._compared(value)}"
        if isinstance(value, HandOff):  # asked after the commit
            return f"goes on with {self._text(value.claimed)}"
        if isinstance(value, Memory):
            return f"memory of {value.kind} {value.name}: {value.status}, {value.result or value.error}"
        if isinstance(value, BaseException):
            return type(value).__name__
        if isinstance(value, tuple):
            return ", ".join(self._text(entry) for entry in value)
        if isinstance(value, list):
            return "; ".join(self._text(entry) for entry in value) or "nothing"
        if value == current_app.conf.task_default_queue:
            return "the default"
        return "none" if value is None else repr(value) if isinstance(value, str) else str(value)

    def _instant(self, value: dt.datetime, row: dict[str, Any] | None, *, is_old: bool) -> str:
        if value.year == 9_000:
            return "never"
        seconds = (value - self._begun).total_seconds()
        spans = round(seconds / SPAN_SECONDS)
        assert abs(seconds - spans * SPAN_SECONDS) < 0.45 * SPAN_SECONDS, f"{value} is {seconds} s after the move began"
        if spans:
            return f"now {'+' if spans > 0 else '-'} {abs(spans) * SPAN_SECONDS} s"
        return "before" if is_old else "now"

    def _compared(self, taken: Execution) -> str:
        """How an execution in memory differs from its row: what a move hands out is what it has stored."""
        row = Execution.objects.get(pk=taken.pk)
        unlike = [
            f"{column} {self._text(value)} for {self._text(getattr(row, column))}"
            for column, value in vars(taken).items()
            if hasattr(type(row), column)
            and column in _COLUMNS
            and value != getattr(row, column)
            # Leases and publications are the database's own; a run does not read them.
            and column not in ("lease_expires_at", "dispatch_at")
        ]
        return f"but {', '.join(unlike)}" if unlike else "as stored"


_COLUMNS = frozenset(field.attname for field in Execution._meta.concrete_fields)
