"""What wraps Celery's remote control commands."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from billiard.common import TERM_SIGNAME
from celery.platforms import signals as os_signals
from celery.utils.functional import maybe_list
from celery.worker import control
from celery.worker import state as worker_state
from celery.worker.control import Panel

from conductor_app.host import news, revocations
from conductor_app.host.news import Revocation
from conductor_app.store.process import process

#: How long a process that is to be killed may go on until its execution is flagged as cancelled, in seconds. Else a
#: body that unwinds might be taken for one that failed.
CANCEL_BEFORE_KILL_SECONDS = 2.0


def watch_revokes() -> None:
    """Take Celery's ``revoke`` command for what it says: a cancel of the execution."""
    original = Panel.data["revoke"]
    if getattr(original, "is_conductor", False):
        return
    by_stamps = Panel.data["revoke_by_stamped_headers"]

    @functools.wraps(original)
    def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
        ids = [str(item) for item in maybe_list(task_id) or []]
        known = [news.news().revoked(item) for item in ids]
        if terminate:
            _wait_for(known)
            if any(revocation.outdated for revocation in known):
                # What runs now is no longer what it was about.
                task_id = [item for item, revocation in zip(ids, known, strict=True) if not revocation.outdated]
            for item in maybe_list(task_id) or []:
                _terminate_follower(state, str(item), signal)
        try:
            return original(state, task_id, terminate=terminate, signal=signal, **kwargs)
        finally:
            revocations.forget_settled()
            for item in ids:
                revocations.unrevoke(item)

    @functools.wraps(by_stamps)
    def revoke_by_stamped_headers(state: Any, headers: Any, terminate: bool = False, **kwargs: Any) -> Any:
        known = news.news().revoked(stamps=_stamps_of(headers))
        if terminate:
            _wait_for([known])
        return by_stamps(state, headers, terminate=terminate, **kwargs)

    revoke.is_conductor = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke
    # The command `terminate` calls it there.
    vars(control)["revoke"] = revoke
    Panel.data["revoke_by_stamped_headers"] = revoke_by_stamped_headers
    Panel.data["hello"] = _forgetting(Panel.data["hello"])


def _forgetting(hello: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a worker that begins only of what is still to be revoked."""

    @functools.wraps(hello)
    def handler(*args: Any, **kwargs: Any) -> Any:
        revocations.forget_settled()
        return hello(*args, **kwargs)

    return handler


def _wait_for(known: list[Revocation]) -> None:
    """Wait until the database knows what is to be cancelled, before its processes are killed; not for long."""
    give_up_at = time.monotonic() + CANCEL_BEFORE_KILL_SECONDS
    for revocation in known:
        revocation.done.wait(max(give_up_at - time.monotonic(), 0.0))


def _stamps_of(headers: Any) -> dict[str, Any]:
    """Return the stamps that are revoked, as Celery reads them: the command line gives ``name=value``."""
    if isinstance(headers, Mapping):
        return dict(headers)
    return dict(item.split("=")[:2] for item in headers)


def _terminate_follower(state: Any, task_id: str, signal: Any) -> None:
    """Kill the process that runs an execution which was handed to it: Celery does not find that by its id."""
    pid = process.worker.gate.process_of(task_id)
    delivered = worker_state.requests.get(task_id)
    if pid is not None and (delivered is None or delivered.worker_pid != pid):
        state.consumer.pool.terminate_job(pid, os_signals.signum(signal or TERM_SIGNAME))


def watch_commands() -> None:
    """Hand off no more when a command changes what this worker may run: pool processes do not hear of it."""
    for name in ("cancel_consumer", "rate_limit", "time_limit"):
        original = Panel.data[name]
        if not getattr(original, "is_conductor", False):
            Panel.data[name] = _closing_the_gate(original)


def _closing_the_gate(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def handler(*args: Any, **kwargs: Any) -> Any:
        process.worker.gate.close()
        return command(*args, **kwargs)

    handler.is_conductor = True  # type: ignore[attr-defined]
    return handler
