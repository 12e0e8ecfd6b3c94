"""Which runs began because somebody had asked for them: told by what people have done, and by when runs began."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from conductor_app.models import Attempt, Execution
from conductor_app.states import FINAL_RUNS, OperationKind
from conductor_app.telling.operations import Deed

_LETS_GO_ON = frozenset({OperationKind.RETRY, OperationKind.WAKE})


def asked_for(execution: Execution, attempts: Sequence[Attempt], deeds: Iterable[Deed]) -> Mapping[int, list[Deed]]:
    """Return what was asked for before each run that began because of that, by the run's number.

    Of an execution it is a retry or a wake, and the rerun or the fork that has started it; of a child that had ended, a
    retry of its root. Nothing is said of a run that may not be the first one after it, since others are not kept.

    Args:
        execution: Whose runs they are.
        attempts: Its runs that have ended, in their order.
        deeds: What people have done to it and to its root, in their order.
    """
    found: dict[int, list[Deed]] = defaultdict(list)
    for deed in deeds:
        if deed.created_id == execution.pk:
            if attempts and attempts[0].run == 1:
                found[1].append(deed)
        elif deed.operation.kind in _LETS_GO_ON and deed.created_id is None:
            run = _first_after(deed, execution, attempts)
            if run is not None:
                found[run].append(deed)
    return found


def _first_after(deed: Deed, execution: Execution, attempts: Sequence[Attempt]) -> int | None:
    previous = None
    for attempt in attempts:
        # The note is written before the transaction ends that lets it be claimed.
        if attempt.started_at >= deed.at:
            break
        previous = attempt
    else:
        return None
    if attempt.run > 1 and (previous is None or previous.run != attempt.run - 1):
        return None
    if deed.execution_id != execution.pk and (previous is None or previous.outcome not in FINAL_RUNS):
        return None  # a child that no retry had to reopen
    return attempt.run
