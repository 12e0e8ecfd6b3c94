"""A durable task that runs any program: a list of instructions, with the programs of its children inside.

What it returns follows from the program and from what the execution remembers, and from nothing else; see
``tests.model.oracle``.
"""

from __future__ import annotations

import itertools
from typing import Any

from conductor_app import ChildCancelled, ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, durable_task

#: One instruction: ``{"do": "invoke", "program": [...], "timeout": 5, "catch": True}``, for example.
Instruction = dict[str, Any]

MAX_ATTEMPTS = 3
RETRY_SECONDS = 5
#: Name of the event for which every program waits.
EVENT = "go"

#: Outcomes of others that a program may catch.
OUTCOMES = (ChildFailed, ChildTimedOut, ChildCancelled, EventTimedOut)

_calls = itertools.count(1)


class Refused(Exception):
    """A failure that no other attempt mends."""


class Flaky(Exception):
    """A failure of early attempts."""


@durable_task(
    max_retries=MAX_ATTEMPTS - 1,
    default_retry_delay=RETRY_SECONDS,
    retry_backoff=False,
    retry_jitter=False,
    dont_autoretry_for=(Refused,),
)
def interpret(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """Follow the instructions, and return the outcome of each."""
    return [_follow(ctx, name_of(number, instruction), instruction) for number, instruction in enumerate(program)]


def name_of(number: int, instruction: Instruction) -> str:
    """Return the step that an instruction is."""
    return f"{number}-{instruction['do']}"


def shown(error: Exception) -> str:
    """Return what a program returns for an error: a failed child's message, and else only what kind it is."""
    return f"ChildFailed: {error}" if isinstance(error, ChildFailed) else type(error).__name__


def _follow(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    try:
        value = _FOLLOW[instruction["do"]](ctx, name, instruction)
    except OUTCOMES as error:
        if not instruction.get("catch"):
            raise
        return shown(error)
    return [shown(item) if isinstance(item, Exception) else item for item in value] if _is_list(instruction) else value


def _is_list(instruction: Instruction) -> bool:
    return instruction["do"] in ("map", "gather")


def _invoke(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    payload = {"program": instruction["program"]}
    return ctx.invoke(name, interpret, payload, timeout=instruction["timeout"], on_timeout=instruction["on_timeout"])


def _map(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    return ctx.map(
        name,
        interpret,
        [{"program": program} for program in instruction["programs"]],
        timeout=instruction["timeout"],
        on_timeout=instruction["on_timeout"],
        max_parallel=instruction["max_parallel"],
        return_exceptions=instruction["return_exceptions"],
    )


def _gather(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    handles = [
        ctx.start(f"{name}-{number}", interpret, {"program": program}, timeout=instruction["timeout"])
        for number, program in enumerate(instruction["programs"])
    ]
    return ctx.gather(*handles, return_exceptions=instruction["return_exceptions"])


def _start(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    ctx.start(name, interpret, {"program": instruction["program"]})


def _step(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    del instruction
    return ctx.step(name, next, _calls)


def _atomic_step(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    del instruction
    return ctx.atomic_step(name, next, _calls)


def _failing_step(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    del instruction
    try:
        ctx.step(name, _refuse)
    except Refused:
        return "refused"


def _refuse(*_: Any) -> None:
    raise Refused("refused")


def _sleep(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    ctx.sleep(name, instruction["seconds"])


def _wait_for(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    return ctx.wait_for(name, EVENT, timeout=instruction["timeout"])


def _checkpoint(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    del name, instruction
    ctx.checkpoint()


def _be_flaky(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    del name
    if ctx.attempt <= instruction["failures"]:
        raise Flaky(f"attempt {ctx.attempt}")


_FOLLOW = {
    "invoke": _invoke,
    "map": _map,
    "gather": _gather,
    "start": _start,
    "step": _step,
    "atomic": _atomic_step,
    "failing_step": _failing_step,
    "sleep": _sleep,
    "event": _wait_for,
    "checkpoint": _checkpoint,
    "flaky": _be_flaky,
    "fail": _refuse,
}
