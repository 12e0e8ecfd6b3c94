"""Side effects that a test can count."""

from __future__ import annotations

import os
import uuid
from typing import Any

from conductor_app import ExecutionContext


def note(ctx: ExecutionContext | uuid.UUID | None, key: str, value: Any = "") -> None:
    """Write one line at once, outside of anything that could undo it."""
    from tests.app.models import Ledger

    execution_id = ctx.execution_id if isinstance(ctx, ExecutionContext) else ctx
    Ledger.objects.create(execution_id=execution_id, key=key, value=str(value), pid=os.getpid())


def count(key: str, execution_id: Any = None) -> int:
    """How many lines there are."""
    from tests.app.models import Ledger

    lines = Ledger.objects.filter(key=key)
    return lines.filter(execution_id=str(execution_id)).count() if execution_id else lines.count()
