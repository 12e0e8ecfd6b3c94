"""What is said of a body that is written wrongly."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import sys
from collections.abc import Sequence

from celery.exceptions import Retry, TaskPredicate

from conductor_app.body import children, context, names
from conductor_app.body.context import ExecutionContext
from conductor_app.body.logger import log_extra
from conductor_app.body.places import CELERY, PACKAGE, shown_place
from conductor_app.body.run import current_context
from conductor_app.exceptions import InvalidArgumentType, InvokeInsideTransaction, ProgrammingError, UncleanConnection
from conductor_app.store.process import process

logger = logging.getLogger("conductor_app.execution")

#: The files that work with what a body has passed to its context.
_CALLS = frozenset(module.__file__ for module in (children, context, names))

_WRONG_CALL = re.compile(r"(?P<of>[\w.<>]+)\(\) (?P<how>(missing|takes|got) .*)", re.DOTALL)


def as_misuse(error: BaseException, task: str) -> BaseException:
    """Return what has ended a body, as the misuse that it is: a call that no retry would make right.

    Args:
        error: What the body raised.
        task: The name of its task.
    """
    found: BaseException | None = None
    if isinstance(error, TaskPredicate):
        instead = "`raise ctx.retry(countdown=…)`" if isinstance(error, Retry) else "`return`, or raise an error"
        found = ProgrammingError(
            f"{task} raised Celery's {type(error).__name__}, which would leave a durable execution without an outcome. "
            f"Use {instead}."
        )
    elif type(error) is TypeError:
        found = _wrong_call(error)
    elif type(error) is AttributeError and isinstance(error.obj, ExecutionContext) and isinstance(error.name, str):
        nearest = difflib.get_close_matches(error.name, _PUBLIC, n=1, cutoff=0.6)
        hint = f' Did you mean "{nearest[0]}"?' if nearest else f" It has {', '.join(_PUBLIC)}."
        found = (
            error if hasattr(ExecutionContext, error.name) else ProgrammingError(f'ctx has no "{error.name}".{hint}')
        )
    return error if found is None else found.with_traceback(error.__traceback__)


def _wrong_call(error: TypeError) -> InvalidArgumentType | None:
    """Return the misuse that a call of ``ctx``, or its call of a step's function, with other arguments is."""
    match = _WRONG_CALL.fullmatch(error.args[0]) if len(error.args) == 1 and type(error.args[0]) is str else None
    if match is None:
        return None
    cls, _dot, name = match["of"].rpartition(".")
    if cls == ExecutionContext.__qualname__ and name in _PUBLIC:
        signature = inspect.signature(getattr(ExecutionContext, name))
        parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()][1:]
        written = signature.replace(parameters=parameters, return_annotation=signature.empty)
        return InvalidArgumentType(f"ctx.{name}() {match['how']}. It is ctx.{name}{written}.")
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    # Python has not even entered the function.
    is_ours = last is not None and last.tb_frame.f_code.co_filename in _CALLS
    return InvalidArgumentType(str(error)) if is_ours else None


#: What a body may use.
_PUBLIC = tuple(
    name
    for name in (*dir(ExecutionContext), "logger")
    if not name.startswith("_") and name not in ("ending", "entered", "flush", "memory", "reached", "suspension")
)


def unclean(task: str, found: Sequence[str]) -> UncleanConnection:
    """Return the error of a body that has left its connections as ``left_open`` says."""
    return UncleanConnection(
        f"{task} left {' and '.join(found)} at its end. What it had written there and not committed is rolled back. "
        "Use `with transaction.atomic():`, which ends with its block, and undo what changes a session."
    )


def unclean_start(task: str, found: Sequence[str]) -> InvokeInsideTransaction:
    """Return the error of a run around whose body something else has opened what ``left_open`` says."""
    return InvokeInsideTransaction(
        f"The body of {task} was about to begin with {' and '.join(found)}. That would undo what its run remembers, "
        "and how it ends. Open it in the body or in ctx.atomic_step(), not in the task's base class, a hook or a "
        "receiver."
    )


def hint_at_repeated_call(task: str) -> None:
    """Tell once of a body that calls a durable task by ``.delay()``: each of its runs would call it again.

    Not in the function of a step, which a replay leaves out.

    Args:
        task: Name of the task that is called, by a call that nothing but itself identifies.
    """
    running = current_context.get()
    if running is None or running._inside is not None:
        return
    called = (running._execution.task, task)
    if called in process.told_of_calls:
        return
    process.told_of_calls.add(called)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, CELERY)):
        frame = frame.f_back
    logger.warning(
        "%s calls %s at %s with .delay() or .apply_async(), outside of a step. Each run of the body calls it again, "
        "and a body runs again whenever it has waited. Use ctx.start("
        '"name", task, payload), or call it inside of ctx.step, or with an idempotency_key.',
        *called,
        shown_place((frame.f_code.co_filename, frame.f_lineno)),
        extra=log_extra(running._execution),
    )
