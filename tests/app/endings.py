"""Bodies that leave their connection in a bad state, and bodies, bases and signals that raise what nobody expects."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import shared_task
from celery.signals import task_postrun, task_prerun
from django.db import DatabaseError, connection, transaction

from conductor_app import ChildError, DurableTask, ExecutionContext, durable_task
from tests.app.ledger import note
from tests.app.models import Ledger


def _sql(*statements: str) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


def _write() -> None:
    Ledger.objects.create(key="lost", pid=os.getpid())


def _open_block() -> None:
    transaction.atomic().__enter__()
    _write()


def _nested_blocks() -> None:
    transaction.atomic().__enter__()
    _open_block()


def _autocommit_off() -> None:
    transaction.set_autocommit(False)
    _write()


def _begin() -> None:
    _sql("BEGIN")
    _write()


def _fails(statement: str = "SELECT * FROM there_is_no_such_table") -> None:
    with suppress(DatabaseError):
        _sql(statement)


def _failed() -> None:
    _sql("BEGIN")
    _fails()


def _failed_block() -> None:
    _open_block()
    _fails()


def _read_only() -> None:
    _sql(
        {
            "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "mysql": "SET SESSION TRANSACTION READ ONLY",
            "sqlite": "PRAGMA query_only = ON",
        }[connection.vendor]
    )


def _read_only_raw() -> None:
    """Past Django's cursors, so that only the write that follows can notice it."""
    connection.ensure_connection()
    raw: Any = connection.connection
    cursor = raw.cursor()
    if connection.vendor == "postgresql":
        cursor.execute("SET default_transaction_read_only = on")
    else:
        cursor.execute("SET SESSION TRANSACTION READ ONLY")


#: What loses writes, and what the error says of it.
LEFT: dict[str, tuple[Callable[[], None], str]] = {
    "block": (_open_block, "an open transaction.atomic() block"),
    "blocks": (_nested_blocks, "2 open transaction.atomic() blocks"),
    "autocommit": (_autocommit_off, "autocommit off"),
    "begin": (_begin, "a transaction that was begun by a statement of its own"),
    "failed": (_failed, "a transaction that"),
    "failed block": (_failed_block, "an open transaction.atomic() block"),
    "read only": (_read_only, "a read-only session"),
    "read only, raw": (_read_only_raw, "a read-only session"),
}


def _search_path() -> None:
    _sql("SET search_path TO pg_catalog")


def _statement_timeout() -> None:
    _sql(
        {"postgresql": "SET statement_timeout = 1", "mysql": "SET SESSION max_statement_time = 0.0001"}[
            connection.vendor
        ]
    )


def _closed() -> None:
    connection.close()


def _closed_raw() -> None:
    connection.ensure_connection()
    raw: Any = connection.connection
    raw.close()


#: What working code does, too.
HARMLESS: dict[str, Callable[[], None]] = {
    "search path": _search_path,
    "statement timeout": _statement_timeout,
    "closed": _closed,
    "closed, raw": _closed_raw,
}


@durable_task(max_retries=1, retry_backoff=False, default_retry_delay=0)
def leaves(ctx: ExecutionContext, kind: str, always: bool = True) -> str:
    """Leave the connection as ``kind`` says; on the first attempt alone unless ``always``."""
    note(ctx, "body")
    if always or ctx.attempt == 1:
        (LEFT[kind][0] if kind in LEFT else HARMLESS[kind])()
    return "left"


@shared_task
def plain_leaves(kind: str) -> str:
    (LEFT[kind][0] if kind in LEFT else HARMLESS[kind])()
    return "left"


@durable_task(max_retries=0)
def leaves_and_waits(ctx: ExecutionContext, kind: str) -> str:
    """Leave it so while the suspension unwinds the body."""
    note(ctx, "body")
    try:
        ctx.sleep("nap", 0.01)
    finally:
        LEFT[kind][0]()
    return "left"


@durable_task(max_retries=0)
def leaves_and_raises(ctx: ExecutionContext, kind: str) -> None:
    LEFT[kind][0]()
    raise ValueError("its own")


@durable_task(max_retries=0)
def calls_inside(ctx: ExecutionContext, kind: str, call: str) -> Any:
    """Make a call with a transaction open, or let the function of a step leave it open."""
    leave = LEFT[kind][0]
    if call in ("step", "atomic_step"):
        return getattr(ctx, call)("leaves", leave)
    leave()
    return ctx.invoke("echo", "tests.app.scenarios.echo", {"value": 1}) if call == "invoke" else ctx.step("after", str)


@durable_task(max_retries=None, soft_time_limit=1, retry_backoff=False, default_retry_delay=0)
def transacts_until_the_limit(ctx: ExecutionContext) -> str:
    """Enter and leave blocks until the soft time limit strikes in the middle of it."""
    note(ctx, "body")
    if ctx.attempt > 1:
        return "done"
    while True:
        with transaction.atomic():
            Ledger.objects.filter(key="nothing").exists()
            with transaction.atomic():
                pass


# Errors


class Panic(BaseException):
    """As a library in another language raises it."""


class BadArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no arguments")

    @args.setter
    def args(self, value: Any) -> None:
        raise RuntimeError("no arguments")


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class BadPickle(Exception):
    def __reduce__(self) -> Any:
        raise Panic("not to be pickled")


class BadNotes(Exception):
    @property
    def __notes__(self) -> Any:
        raise RuntimeError("no notes")


RAISED: dict[str, Callable[[], BaseException]] = {
    "BaseException": lambda: Panic("out of range"),
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "args": lambda: BadArgs("x"),
    "text": lambda: BadText("x"),
    "pickle": lambda: BadPickle("x"),
    "notes": lambda: BadNotes("x"),
    "MemoryError": lambda: MemoryError("an array of 1 TiB"),
}


@durable_task(max_retries=1, retry_backoff=False, default_retry_delay=0)
def raises(ctx: ExecutionContext, kind: str) -> None:
    note(ctx, "body")
    raise RAISED[kind]()


@shared_task(bind=True)
def plain_raises(self: Any, kind: str) -> None:
    raise RAISED[kind]()


@durable_task(max_retries=1, retry_backoff=False, default_retry_delay=0)
def finds_its_step_deleted(ctx: ExecutionContext) -> Any:
    """Wait for a child; once its step is deleted, the next run cannot store that it waits."""
    note(ctx, "body")
    return ctx.invoke("nap", "tests.app.scenarios.naps", {"seconds": 600})


class CallRaises(DurableTask):
    """A base whose ``__call__`` needs what is not there."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note(None, "call")
        raise KeyError("tenant of __call__")


class BeforeStartRaises(DurableTask):
    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note(None, "before_start", (args, kwargs))
        raise KeyError("tenant of before_start")


class CallReturns(DurableTask):
    """A base that answers in the place of the body."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return {"cached": True}


class CallChecks(DurableTask):
    """A base that needs a header and the arguments."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        headers: Any = self.request.headers or {}
        if headers.get("tenant") != "a" or kwargs != {"value": 1}:
            raise KeyError(f"no tenant {headers} {kwargs}")


class CallInBlock(DurableTask):
    """A base that makes one transaction of a run."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with transaction.atomic():
            return super().__call__(*args, **kwargs)


class BeforeStartInBlock(DurableTask):
    """A base that opens a transaction and does not close it when the body never begins."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        transaction.atomic().__enter__()
        note(None, "lost")


_often: dict[str, Any] = {"max_retries": 1, "retry_backoff": False, "default_retry_delay": 0}


@durable_task(base=CallRaises, **_often)
def call_raises(ctx: ExecutionContext) -> str:
    note(ctx, "body")
    return "done"


@durable_task(base=BeforeStartRaises, **_often)
def before_start_raises(ctx: ExecutionContext, value: int = 0) -> str:
    note(ctx, "body")
    return "done"


@durable_task(**_often)
def receiver_raises(ctx: ExecutionContext) -> str:
    note(ctx, "body")
    return "done"


@durable_task(base=CallReturns, **_often)
def call_returns(ctx: ExecutionContext) -> Any:
    note(ctx, "body")
    return {"cached": False}


@durable_task(base=CallChecks, **_often)
def call_checks(ctx: ExecutionContext, value: int) -> int:
    note(ctx, "body")
    return value


@durable_task(base=CallInBlock, **_often)
def call_in_block(ctx: ExecutionContext) -> Any:
    note(ctx, "body")
    return ctx.invoke("child", "tests.app.scenarios.pass_through", {"value": 1})


@durable_task(base=BeforeStartInBlock, **_often)
def before_start_in_block(ctx: ExecutionContext) -> None:
    note(ctx, "body")


def _raise_before(sender: Any = None, **_kwargs: Any) -> None:
    if getattr(sender, "name", "") == receiver_raises.name:
        raise Panic("of the receiver")


task_prerun.connect(_raise_before, weak=False)


@durable_task(max_retries=0)
def catches(ctx: ExecutionContext, child: str, payload: Any = None) -> Any:
    """Say how a child has failed."""
    try:
        return {"child": ctx.invoke("child", child, payload)}
    except ChildError as error:
        return {"failed": str(error), "error_class": error.error_class}


@durable_task(max_retries=3)
def never_stops(ctx: ExecutionContext, how: str) -> None:
    """Swallow the end of its run for ever."""
    note(ctx, "body")
    while True:
        try:
            if how == "checkpoint":
                ctx.checkpoint()
            else:
                ctx.invoke("child", "tests.app.scenarios.echo")
        except BaseException:  # noqa: BLE001
            if how == "block" and not connection.in_atomic_block:
                transaction.atomic().__enter__()
                _write()
        time.sleep(0.02)


@shared_task
def spoils_its_connection() -> str:
    """Leave what lets every later statement of this thread fail, and not those of other connections."""

    def refuse(*_args: Any) -> Any:
        raise DatabaseError("spoilt")

    def spoil(**_kwargs: Any) -> None:
        connection.execute_wrappers.append(refuse)
        task_postrun.disconnect(spoil)

    task_postrun.connect(spoil, sender=spoils_its_connection, weak=False)
    return "spoilt"


@shared_task
def spoils_the_process() -> int:
    """Spoil it for this process's claims alone, whatever their connection."""
    from conductor_app import transitions

    def refuse(*_args: Any) -> Any:
        raise DatabaseError("spoilt")

    transitions.claim = refuse
    return os.getpid()
