"""Celery's Django fixup and Django itself: relied on by ``executor``, ``dispatch`` and ``announcements``."""

from __future__ import annotations

from typing import Any

import pytest
from celery import signals
from celery.fixups.django import DjangoWorkerFixup
from django.db import connection, transaction
from django.dispatch import Signal

from project.celery import app


class FakeConnections:
    def __init__(self) -> None:
        self.closed = 0

    def all(self, initialized_only: bool = False) -> list[Any]:
        return [self]

    def close(self) -> None:
        self.closed += 1

    def close_if_unusable_or_obsolete(self) -> None:
        pass

    alias = "default"
    connection: Any = None
    in_atomic_block = False


@pytest.mark.parametrize(("reuse_max", "closed"), [(None, 2), (5, 0)])
def test_the_fixup_closes_every_connection_around_each_task_unless_told_to_reuse_them(
    monkeypatch: pytest.MonkeyPatch, reuse_max: int | None, closed: int
) -> None:
    fixup = DjangoWorkerFixup(app)
    fixup.db_reuse_max = reuse_max
    fake = FakeConnections()
    monkeypatch.setattr(fixup, "_db", type("Db", (), {"connections": fake}))
    monkeypatch.setattr(fixup, "close_cache", lambda: None)
    fixup.on_task_prerun(sender=type("Task", (), {"request": type("R", (), {"is_eager": False})})())
    fixup.on_task_postrun(sender=type("Task", (), {"request": type("R", (), {"is_eager": False})})())
    assert fake.closed == closed


def test_the_fixup_hangs_on_the_signals_around_a_task() -> None:
    import inspect

    source = inspect.getsource(DjangoWorkerFixup.install)
    assert "signals.task_prerun.connect(self.on_task_prerun)" in source
    assert "signals.task_postrun.connect(self.on_task_postrun)" in source
    assert isinstance(signals.task_prerun.name, str)


@pytest.mark.django_db(transaction=True)
def test_a_robust_callback_that_fails_does_not_stop_the_next_one() -> None:
    called: list[str] = []

    def fail() -> None:
        called.append("first")
        raise RuntimeError

    with transaction.atomic():
        transaction.on_commit(fail, robust=True)
        transaction.on_commit(lambda: called.append("second"), robust=True)
    assert called == ["first", "second"]


@pytest.mark.django_db(transaction=True)
def test_callbacks_of_an_inner_block_wait_for_the_outermost_commit() -> None:
    called: list[bool] = []
    with transaction.atomic():
        with transaction.atomic():
            transaction.on_commit(lambda: called.append(connection.in_atomic_block))
        assert called == []
    assert called == [False]


def test_a_robust_signal_returns_a_receivers_error() -> None:
    def fail(**_kwargs: Any) -> None:
        raise RuntimeError

    signal = Signal()
    signal.connect(fail)
    ((_receiver, error),) = signal.send_robust(sender=object)
    assert isinstance(error, RuntimeError)
