"""Keep the runs of an execution's body that have ended."""

from __future__ import annotations

from contextlib import suppress

from django.db import DatabaseError

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import Failure
from conductor_app.models import Attempt, Execution, database
from conductor_app.states import FAILED_RUNS, RunOutcome
from conductor_app.store import clock, transactions
from conductor_app.values.texts import clean_text

#: A body that waits again and again is looked after each time that it has ended so many runs.
_TRIM_EVERY = 10


def keep(execution: Execution, outcome: RunOutcome, failure: Failure | None = None, *, step: str = "") -> None:
    """Store a run that ends, in the transaction that ends it; moves have it as ``parts.run_ended``.

    Args:
        execution: As the run has it, or as its row is before the end.
        failure: What it has failed with.
        step: The step that it waits for.
    """
    error = {} if failure is None else parts_of(failure)
    Attempt.objects.using(database()).create(
        execution_id=execution.pk,
        attempt=execution.attempt,
        run=execution.fence,
        worker=execution.lease_owner,
        # A process of an older version, which runs beside this one during a deployment, has not noted when it began.
        due_at=execution.due_at or execution.created_at,
        started_at=execution.run_started_at or execution.started_at or execution.created_at,
        finished_at=clock.now(),
        outcome=outcome,
        step=step,
        **error,
    )


def parts_of(failure: Failure) -> dict[str, str]:
    """Return a failure as columns."""
    return {
        "error_class": clean_text(failure.type, 255),
        "message": failure.message,
        "traceback": failure.traceback,
    }


def trim(execution: Execution) -> None:
    """Delete the oldest runs of an execution of which nothing is to be told, beyond ``KEEP_ATTEMPTS``.

    After a run has ended, and not at each one. What is left over goes the next time.
    """
    last = execution.fence - conductor_settings().KEEP_ATTEMPTS
    if last <= 0 or execution.fence % _TRIM_EVERY:
        return
    using = database()
    old = Attempt.objects.using(using).filter(execution_id=execution.pk, run__lte=last)
    with suppress(DatabaseError):
        transactions.persist_briefly(using, old.exclude(outcome__in=sorted(FAILED_RUNS)).order_by().delete)
