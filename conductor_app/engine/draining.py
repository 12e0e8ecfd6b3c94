"""Whether this worker shuts down, and what that means to its runs."""

from __future__ import annotations

from celery.exceptions import WorkerShutdown, WorkerTerminate

from conductor_app.store.process import process
from conductor_app.transitions import dispatch


def gives_way() -> bool:
    """Tell whether runs are given back now; not those of eager mode, which nobody else takes."""
    return process.worker.is_draining() and not dispatch.is_inline()


def is_ending(error: BaseException) -> bool:
    """Tell whether this is how a worker ends that shuts down."""
    return process.worker.is_draining() or isinstance(error, (WorkerShutdown, WorkerTerminate))
