"""A durable task that runs any program: a list of instructions, with the programs of its children inside.

What it returns follows from the program and from what the execution remembers, and from nothing else; see
``tests.model.oracle``.
"""

from __future__ import annotations

import itertools
from typing import Any

from conductor_app import (
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    DurableTask,
    EventTimedOut,
    ExecutionContext,
    Limit,
    NoneSucceeded,
    durable_task,
)

#: One instruction: ``{"do": "invoke", "program": [...], "timeout": 5, "catch": True}``, for example.
Instruction = dict[str, Any]

MAX_ATTEMPTS = 3
RETRY_SECONDS = 5
#: Name of the event for which every program waits.
EVENT = "go"

#: What a schedule starts.
TICKING: list[Instruction] = [{"do": "sleep", "seconds": 45}, {"do": "atomic"}]

#: Outcomes of others that a program may catch.
OUTCOMES = (ChildFailed, ChildTimedOut, ChildCancelled, EventTimedOut, NoneSucceeded)

_calls = itertools.count(1)


class Refused(Exception):
    """A failure that no other attempt mends."""


class Flaky(Exception):
    """A failure of early attempts."""


#: How every program is tried again.
RETRIES: dict[str, Any] = {
    "max_retries": MAX_ATTEMPTS - 1,
    "default_retry_delay": RETRY_SECONDS,
    "retry_backoff": False,
    "retry_jitter": False,
    "dont_autoretry_for": (Refused,),
}


@durable_task(**RETRIES)
def interpret(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """Follow the instructions, and return the outcome of each."""
    return follow(ctx, program)


def follow(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """Follow the instructions, and return the outcome of each."""
    return [_follow(ctx, name_of(number, instruction), instruction) for number, instruction in enumerate(program)]


two_run, two_open = Limit("programs-run", 2, holds="run"), Limit("programs-open", 2, holds="open")
left, right = Limit("programs-left", 1, holds="run"), Limit("programs-right", 1, holds="run")
started = Limit("programs-started", rate="30/m", burst=2)


@durable_task(limits=[two_run], **RETRIES)
def interpret_two(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """As ``interpret``; two run at a time."""
    return follow(ctx, program)


@durable_task(limits=[two_open], **RETRIES)
def interpret_two_open(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """As ``interpret``; two are open at a time. Its program has no children, which could wait for such a place."""
    return follow(ctx, program)


@durable_task(limits=[left, right], **RETRIES)
def interpret_both(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """As ``interpret``; one runs at a time."""
    return follow(ctx, program)


@durable_task(limits=[right, left, started], **RETRIES)
def interpret_all(ctx: ExecutionContext, program: list[Instruction]) -> list[Any]:
    """As ``interpret_both``, besides which one runs; and one starts every two seconds."""
    return follow(ctx, program)


#: What runs a program, by what an instruction says in ``"by"``.
TASKS: dict[str, DurableTask[..., Any]] = {
    "": interpret,
    "two": interpret_two,
    "two open": interpret_two_open,
    "both": interpret_both,
    "all": interpret_all,
}


def task_of(instruction: Instruction) -> DurableTask[..., Any]:
    """Return the task of an instruction's children."""
    return TASKS[instruction.get("by", "")]


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
    options = {"timeout": instruction["timeout"], "on_timeout": instruction["on_timeout"]}
    return ctx.invoke(name, task_of(instruction), payload, **options)


def _map(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    return ctx.map(
        name,
        task_of(instruction),
        [{"program": program} for program in instruction["programs"]],
        timeout=instruction["timeout"],
        on_timeout=instruction["on_timeout"],
        max_parallel=instruction["max_parallel"],
        return_exceptions=instruction["return_exceptions"],
    )


def _gather(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    handles = [
        ctx.start(f"{name}-{number}", task_of(instruction), {"program": program}, timeout=instruction["timeout"])
        for number, program in enumerate(instruction["programs"])
    ]
    return ctx.gather(*handles, return_exceptions=instruction["return_exceptions"])


def _first(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    handles: list[Any] = [
        ctx.start(f"{name}-{number}", task_of(instruction), {"program": program})
        for number, program in enumerate(instruction["programs"])
    ]
    if instruction["event"]:
        handles.append(ctx.event(f"{name}-event", EVENT))
    if instruction["seconds"] is not None:
        handles.append(ctx.timer(f"{name}-timer", instruction["seconds"]))
    winner, value = ctx.first(name, *handles, until=instruction["until"], losers=instruction["losers"])
    return [winner.step, value]


def _start(ctx: ExecutionContext, name: str, instruction: Instruction) -> Any:
    ctx.start(name, task_of(instruction), {"program": instruction["program"]})


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
    "first": _first,
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
