"""What must not be done in an event loop, and how whoever runs in one has it done."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import async_to_sync, sync_to_async

from conductor_app.exceptions import BlockingCallInEventLoop, InvalidArgumentType
from conductor_app.store.process import process

P = ParamSpec("P")
R = TypeVar("R")


def check_none_runs(call: str, instead: str) -> None:
    """Refuse what waits for the database or a broker, where an event loop runs in this thread.

    As Django does before each of its own queries, and unless ``DJANGO_ALLOW_ASYNC_UNSAFE`` allows it there. Threads and
    greenlets without an event loop of their own are not concerned, nor is what ``sync_to_async`` runs.

    Args:
        call: How the call is named in the error.
        instead: What to write.

    Raises:
        BlockingCallInEventLoop: One runs.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
        return
    raise BlockingCallInEventLoop(
        f"{call} would hold the event loop that runs here, with all that waits in it. Use {instead}. Nothing was done."
    )


def twin(call: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return the function that does the same for whoever runs in an event loop: in the thread of Django's own calls."""

    @functools.wraps(call)
    async def asynchronous(*args: P.args, **kwargs: P.kwargs) -> R:
        return await sync_to_async(call)(*args, **kwargs)

    asynchronous.__name__ = asynchronous.__qualname__ = f"a{call.__name__}"
    asynchronous.__doc__ = f"Do as ``{call.__name__}``, and let the event loop go on meanwhile."
    return asynchronous


def finished(value: Any, call: str) -> Any:
    """Return what a function has returned; of a coroutine function, what its coroutine returns.

    That runs in an event loop of its own. What it does with Django's async methods is done in this thread, so on its
    connection and inside of its transaction.

    Args:
        value: What the function has returned.
        call: How the call is named in an error.

    Raises:
        InvalidArgumentType: It is a coroutine, and bodies run in greenlets.
    """
    if not inspect.iscoroutine(value):
        return value
    if process.worker.runs_greenlets:
        value.close()
        # Python knows of one running loop in a thread: those of other bodies would be taken for callers in it.
        raise InvalidArgumentType(
            f"{call} got a coroutine function, which cannot run where bodies are greenlets. Run its task by a worker "
            "with --pool=prefork, threads or solo, or pass a function that is not async."
        )
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def awaited() -> Any:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await value

    try:
        return async_to_sync(awaited)()
    except BaseException:
        # A soft time limit is raised in this thread, which only waits: the coroutine is not to outlive it.
        for loop, task in running:
            with suppress(RuntimeError):  # its loop is closed: it has ended by itself
                loop.call_soon_threadsafe(task.cancel)
        raise
