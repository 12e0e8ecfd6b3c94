"""What workers are doing right now, and workers that stand still."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.db import DatabaseError, connection, transaction

from conductor_app.models import Execution
from tests.app.models import Ledger
from tests.support.polling import wait_until
from tests.support.worker import Worker


def wait_for_body(task: Any, number: int = 1, timeout: float = 30) -> Ledger:
    """Wait until bodies of ``task`` have begun ``number`` times, and return the latest line that one wrote."""
    lines = Ledger.objects.filter(key="body", execution_id__in=Execution.objects.filter(task=task.name).values("pk"))
    wait_until(lambda: lines.count() >= number, timeout, message=f"{task.name} has not begun {number} times")
    return lines.latest("id")


def only(task: Any) -> Execution:
    """Return the only execution of ``task``."""
    return Execution.objects.get(task=task.name)


def wait_for_status(execution: Any, status: str, timeout: float = 30) -> Execution:
    """Wait until an execution, named by itself, its id or its result, has ``status``, and return it."""
    key = getattr(execution, "pk", None) or getattr(execution, "id", None) or execution
    return wait_until(
        lambda: Execution.objects.filter(pk=key, status=status).first(),
        timeout,
        message=lambda: f"{Execution.objects.get(pk=key)} is {Execution.objects.get(pk=key).status}, not {status}",
    )


@contextmanager
def frozen(worker: Worker) -> Iterator[None]:
    """Stop a worker and its pool processes as a paused machine would, and let them go on afterwards.

    Not in the middle of a transaction: its locks would keep everybody else waiting too.
    """
    wait_until(lambda: _freeze(worker), message="The worker holds a lock whenever it is stopped")
    try:
        yield
    finally:
        os.killpg(worker.pid, signal.SIGCONT)


def _freeze(worker: Worker) -> bool:
    os.killpg(worker.pid, signal.SIGSTOP)
    # On a busy machine a thread may still be on its way out of the kernel, with the lock that it has asked for there.
    wait_until(lambda: _is_standing(worker.pid), message="The worker did not stop")
    if _nothing_is_locked():
        return True
    os.killpg(worker.pid, signal.SIGCONT)
    return False


def _is_standing(group: int) -> bool:
    """Tell whether each thread of a process group is stopped, or dead; where there is no /proc, suppose so."""
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        try:
            state, _parent, in_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(in_group) == group and state not in "TtZX":
            return False
    return True


def _nothing_is_locked() -> bool:
    is_sqlite = connection.vendor == "sqlite"
    try:
        if is_sqlite:
            connection.cursor().execute("PRAGMA busy_timeout = 300")
        with transaction.atomic():  # On SQLite, beginning takes the only lock there is.
            rows = Execution.objects.all()
            list(rows if is_sqlite else rows.select_for_update(nowait=True))
    except DatabaseError:
        return False
    finally:
        if is_sqlite:
            connection.cursor().execute("PRAGMA busy_timeout = 20000")
    return True
