"""Bodies that meet trouble in their steps, and go on."""

import time
from typing import Any

from django.db import DatabaseError, connection, transaction

from conductor_app import ExecutionContext, durable_task
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.app.models import Ledger


def run_too_long() -> None:
    """Let the database refuse a statement, and nothing else be wrong with the session."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET LOCAL statement_timeout = 30; SELECT pg_sleep(5)")
        elif connection.vendor == "mysql":
            cursor.execute("SET STATEMENT max_statement_time = 0.05 FOR SELECT SLEEP(5)")
        else:
            cursor.execute("SELEKT 1")


@durable_task(max_retries=0)
def refunds(ctx: ExecutionContext, call: str) -> str:
    """Charge, which fails once; refund then, and never ship."""

    def charge() -> str:
        if not count("refund", ctx.execution_id):
            with transaction.atomic():
                run_too_long()
        return "charged"

    try:
        getattr(ctx, call)("charge", charge)
    except DatabaseError:
        ctx.step("refund", note, ctx.execution_id, "refund")
        ctx.sleep("nap", 0.5)
        return "refunded"
    ctx.step("ship", note, ctx.execution_id, "ship")
    return "shipped"


def _lock_both(keys: list[int]) -> None:
    for number, key in enumerate(keys):
        row = Ledger.objects.select_for_update().get(pk=key)
        Ledger.objects.filter(pk=key).update(value=f"{int(row.value or 0) + 1}")
        if not number:
            time.sleep(1)


@durable_task(max_retries=0)
def locks_both(ctx: ExecutionContext, keys: list[int]) -> int:
    """Write two rows in one atomic step, in this order."""
    ctx.atomic_step("both", _lock_both, keys)
    return ctx.attempt


@durable_task(max_retries=0)
def notes_often(ctx: ExecutionContext, times: int) -> int:
    """Take many atomic steps, with a moment between them."""
    for number in range(times):
        ctx.atomic_step(f"note-{number}", note, ctx.execution_id, "often", number)
        time.sleep(0.05)
    return ctx.attempt


@durable_task(max_retries=3)
def naps_after_all(ctx: ExecutionContext) -> list[Any]:
    """Get an outcome of each kind that a child holds, sleep, and return them."""
    got = [
        ctx.invoke("one", scenarios.echo, {"value": 1}),
        *ctx.map("many", scenarios.echo, [{"value": 2}, {"value": 3}]),
        *ctx.gather(ctx.start("beside", scenarios.echo, {"value": 4})),
    ]
    ctx.sleep("nap", 2)
    return got
