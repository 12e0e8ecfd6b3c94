"""Celery's Django fixup and Django itself: relied on by ``executor``, ``dispatch`` and ``announcements``."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from celery import signals
from celery.fixups.django import DjangoWorkerFixup
from django.core.exceptions import EmptyResultSet
from django.db import connection, connections, transaction
from django.db.models import F, Q, Value
from django.db.models.lookups import Exact
from django.db.models.sql import Query, UpdateQuery
from django.dispatch import Signal

from conductor_app.models import Execution, FailedExecution
from conductor_app.store import own_connections, serving, sockets
from project.celery import app
from tests.support.executions import queued as new


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


def test_a_connection_can_be_replaced_for_one_thread_alone() -> None:
    """``own_connections.use_own`` does that for the sweeper's thread and for heartbeats."""
    before, seen = connections["default"], []

    def replace() -> None:
        connections["default"] = own = connections.create_connection("default")
        seen.extend([own, connections["default"], *connections.all(initialized_only=True)])
        connections.close_all()

    thread = threading.Thread(target=replace)
    thread.start()
    thread.join()
    own, *found = seen
    assert own is not before
    assert all(connection is own for connection in found)
    assert connections["default"] is before


@pytest.mark.skipif(connection.vendor != "postgresql", reason="only PostgreSQL has a pool")
def test_a_connection_whose_own_settings_name_no_pool_is_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", {"pool": True})
    before = connections["default"]
    try:
        own: Any = own_connections.use_own("default")
    finally:
        connections["default"] = before
    assert own.pool is None
    assert connections.settings["default"]["OPTIONS"] == {"pool": True}, "the project's settings are as they were"


@pytest.mark.django_db
@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no sessions")
def test_a_driver_tells_the_servers_id_of_a_session_and_its_socket_without_asking() -> None:
    connection.ensure_connection()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()" if connection.vendor == "postgresql" else "SELECT CONNECTION_ID()")
        (known,) = cursor.fetchone()
    assert serving._session_id(connection.connection) == known
    assert sockets.descriptor_of(connection.connection)


@pytest.mark.django_db
def test_a_block_knows_whether_it_is_a_test_cases_and_a_connection_how_many_are_open() -> None:
    """What ``left_open`` tells a test's blocks from a body's by."""
    (outermost, *_rest) = connection.atomic_blocks
    depth = len(connection.atomic_blocks)
    with transaction.atomic():
        assert (outermost._from_testcase, connection.atomic_blocks[-1]._from_testcase) == (True, False)
        assert len(connection.atomic_blocks) == depth + 1
    assert (connection.in_atomic_block, len(connection.atomic_blocks)) == (True, depth)


@pytest.mark.django_db(transaction=True)
def test_the_driver_tells_of_a_transaction_without_being_asked_by_a_query() -> None:
    def is_open() -> bool:
        raw: Any = connection.connection
        if connection.vendor == "postgresql":
            return int(raw.pgconn.transaction_status) == int(raw.info.transaction_status) != 0
        return bool(raw.in_transaction if connection.vendor == "sqlite" else raw.server_status & 1)

    with connection.cursor() as cursor:
        assert not is_open()
        cursor.execute("BEGIN")
        assert is_open()
        cursor.execute("ROLLBACK")
        assert not is_open()


@pytest.mark.django_db
def test_an_update_can_be_written_out_and_be_given_a_returning() -> None:
    query: Any = Execution.objects.filter(task="t").query.chain(UpdateQuery)
    query.add_update_values({"queue": F("task"), "attempt": 2})
    sql, params = query.get_compiler("default").as_sql()
    assert sql.startswith("UPDATE ")
    assert " RETURNING " not in sql
    assert tuple(params) == (2, "t")
    with pytest.raises(EmptyResultSet):
        none: Any = Execution.objects.filter(pk__in=[]).query.chain(UpdateQuery)
        none.add_update_values({"attempt": 2})
        none.get_compiler("default").as_sql()


@pytest.mark.django_db
def test_a_cursor_can_be_kept_and_used_for_a_second_statement() -> None:
    connection.ensure_connection()
    cursor: Any = connection.create_cursor()
    for number in (1, 2):
        cursor.execute("SELECT %s" if connection.vendor != "sqlite" else "SELECT %s + 0", (number,))
        assert cursor.fetchone()[0] == number


@pytest.mark.django_db
def test_a_raw_delete_is_one_statement_and_reads_nothing(django_assert_num_queries: Any) -> None:
    FailedExecution.objects.all().delete()
    row = new()
    with django_assert_num_queries(1) as captured:
        assert Execution.objects.filter(pk=row.pk).order_by()._raw_delete("default") == 1
    assert captured.captured_queries[0]["sql"].startswith("DELETE")


@pytest.mark.django_db(transaction=True)
def test_the_blocks_of_a_transaction_are_listed_from_the_outermost() -> None:
    assert connection.atomic_blocks == []
    with transaction.atomic():
        (outer,) = connection.atomic_blocks
        with transaction.atomic():
            assert len(connection.atomic_blocks) == 2
            assert connection.atomic_blocks[0] is outer
        with transaction.atomic(savepoint=False):
            assert connection.atomic_blocks[0] is outer
        assert connection.atomic_blocks == [outer]
    assert connection.atomic_blocks == []


@pytest.mark.django_db(transaction=True)
def test_a_block_that_is_left_by_hand_is_rolled_back() -> None:
    block = transaction.atomic()
    block.__enter__()
    new()
    error = RuntimeError("left open")
    block.__exit__(type(error), error, None)
    assert (connection.in_atomic_block, Execution.objects.count()) == (False, 0)


@pytest.mark.django_db
def test_conditions_and_values_compile_to_texts_about_columns_alone() -> None:
    """Of them ``store.texts`` makes statements, in which constants and slots take the places of ``%s``."""
    query = Query(Execution, alias_cols=False)
    where = Q(pk=Value(1)) & Q(Exact(F("status"), "queued")) & (Q(attempt__lt=F("max_attempts")) | Q(error=None))
    compiler = query.get_compiler(using=connection.alias)
    sql, params = compiler.compile(query.build_where(where))
    assert connection.ops.quote_name("conductor_app_execution") not in sql
    assert sql.count("%s") == len(params) == 2
    assert "queued" in params
    value = (F("fence") + 1).resolve_expression(query, allow_joins=False, for_save=True)
    sql, params = compiler.compile(value)
    assert (sql.replace(" ", ""), list(params)) == (f"({connection.ops.quote_name('fence')}+%s)", [1])


def test_what_follows_a_lock_is_told_by_the_operations_of_a_database() -> None:
    assert connection.ops.for_update_sql(no_key=False, skip_locked=True).split() == ["FOR", "UPDATE", "SKIP", "LOCKED"]


@pytest.mark.django_db
def test_named_parameters_reach_the_driver_and_a_percent_sign_is_doubled() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT %(text)s, '100 %%', %(text)s", {"text": "50 %", "unused": 1})
        assert cursor.fetchone() == ("50 %", "100 %", "50 %")
