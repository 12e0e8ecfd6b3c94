"""``conductor_app.testing.run``: one body alone. No test here may touch the database."""

from __future__ import annotations

import datetime as dt
import itertools
import unittest
from collections.abc import Callable
from typing import Any

import pytest

from conductor_app import ChildCancelled, ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, NoneSucceeded
from conductor_app.exceptions import (
    InvalidArgument,
    InvalidArgumentType,
    NestedDurableCall,
    NotSerializable,
    PayloadTooLarge,
    RetryExecution,
    StepMismatch,
    StepNameReused,
    UnknownTask,
)
from conductor_app.states import StepKind
from conductor_app.testing import BodyError, StepCall, run
from tests.app import scenarios
from tests.support.bodies import durable


class CardDeclined(Exception):
    pass


class Coded(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)


@durable
def charge(ctx: ExecutionContext, order_id: int, total: int = 1) -> dict[str, Any]:
    return ctx.step("call-bank", ask_bank, total)


def ask_bank(total: int) -> dict[str, Any]:
    raise AssertionError("the bank was asked")


@durable
def fulfil(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    order = ctx.invoke("validate", scenarios.echo, {"value": {"total": order_id * 6}})
    try:
        paid = ctx.invoke("charge", charge, {"order_id": order_id, "total": order["total"]}, timeout=30)
    except ChildTimedOut as error:
        return {"status": "pending", "why": str(error)}
    except ChildCancelled as error:
        return {"status": "cancelled", "why": str(error)}
    except ChildFailed as error:
        return {"status": "failed", "why": str(error), "class": error.error_class}
    return {"status": "paid", **paid}


def once(fn: Callable[[ExecutionContext], Any], children: Any = None, **options: Any) -> Any:
    """Run a body that takes nothing but its context."""
    fn.__name__ = "body"  # of a lambda, too
    return run(durable(fn), None, children, **options)


# ------------------------------------------------------------------------------------------------ outcomes of children


@pytest.mark.parametrize("key", ["charge", charge, charge.name])
def test_an_outcome_is_found_by_the_step_the_task_or_the_tasks_name(key: Any) -> None:
    children = {"validate": {"total": 42}, key: {"receipt": "R-42"}}
    assert run(fulfil, {"order_id": 7}, children) == {"status": "paid", "receipt": "R-42"}


def test_the_steps_name_goes_before_the_task() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke(name, scenarios.echo, {"value": 0}) for name in ("a", "b")]

    assert once(body, {scenarios.echo: "any", "b": "this one"}) == ["any", "this one"]


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}])
def test_a_result_arrives_as_it_is(value: Any) -> None:
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("child", scenarios.echo, {"value": 1})]

    assert once(body, {"child": value}) == [value]


def test_a_function_gets_the_payloads_arguments_and_its_result_is_the_childs() -> None:
    children = {"validate": lambda value: value, charge: lambda order_id, total: {"receipt": f"R-{order_id}-{total}"}}
    assert run(fulfil, {"order_id": 7}, children) == {"status": "paid", "receipt": "R-7-42"}


def test_a_durable_task_as_an_outcome_runs_its_body() -> None:
    children = {"validate": {"total": 42}, "charge": charge}
    result = run(fulfil, {"order_id": 7}, children, steps={"call-bank": lambda total: {"receipt": f"R-{total}"}})
    assert result == {"status": "paid", "receipt": "R-42"}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (ChildTimedOut, {"status": "pending", "why": "Child execution timed out after 30s (step 'charge')"}),
        (ChildTimedOut("late"), {"status": "pending", "why": "Child execution timed out after 30s (step 'charge')"}),
        (
            ChildCancelled,
            {"status": "cancelled", "why": "Child execution was cancelled (step 'charge'): Cancelled"},
        ),
        (
            ChildCancelled("no stock"),
            {"status": "cancelled", "why": "Child execution was cancelled (step 'charge'): Cancelled: no stock"},
        ),
        (
            CardDeclined("no money"),
            {"status": "failed", "why": "Child execution failed: no money", "class": f"{__name__}.CardDeclined"},
        ),
        (
            CardDeclined,
            {"status": "failed", "why": "Child execution failed: CardDeclined", "class": f"{__name__}.CardDeclined"},
        ),
        (
            ChildFailed("Child execution failed: no money", error_class="bank.CardDeclined"),
            {"status": "failed", "why": "Child execution failed: no money", "class": "bank.CardDeclined"},
        ),
        (
            ChildFailed("no money"),
            {
                "status": "failed",
                "why": "Child execution failed: no money",
                "class": "conductor_app.exceptions.ChildFailed",
            },
        ),
    ],
)
def test_an_exception_is_how_the_child_ended(outcome: Any, expected: dict[str, str]) -> None:
    assert run(fulfil, {"order_id": 7}, {"validate": {"total": 42}, "charge": outcome}) == expected


def test_what_a_function_raises_fails_the_child() -> None:
    def decline(**payload: Any) -> Any:
        raise CardDeclined(f"no {payload['total']}")

    result = run(fulfil, {"order_id": 7}, {"validate": {"total": 42}, "charge": decline})
    assert result["why"] == "Child execution failed: no 42"


def test_what_a_stand_in_asserts_fails_the_test_and_not_the_child() -> None:
    def check(order_id: int, total: int) -> Any:
        assert total == 43, "wrong total"

    with pytest.raises(AssertionError, match="wrong total"):
        run(fulfil, {"order_id": 7}, {"validate": {"total": 42}, "charge": check})


def test_an_uncaught_outcome_is_raised_with_the_steps_name() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", scenarios.echo, {"value": 1})

    with pytest.raises(ChildFailed, match=r"^Child execution failed: no$") as caught:
        once(body, {"child": ValueError("no")})
    assert caught.value.step == "child"


def test_a_missing_outcome_names_the_step_the_task_and_what_to_add() -> None:
    with pytest.raises(BodyError) as caught:
        run(fulfil, {"order_id": 7}, {"validate": {"total": 42}, "charg": None})
    assert str(caught.value) == (
        f'The body invokes {charge.name} as step "charge", and the test does not say what becomes of it. '
        'Add children={"charge": …} to run(): a result, an exception, or a function that takes the payload\'s '
        "arguments. Given: charg, validate."
    )


@pytest.mark.parametrize(
    ("outcome", "error", "text"),
    [
        ({"receipt": {1, 2}}, NotSerializable, r'^result of children\["charge"\]\["receipt"\] is a set\.'),
        (Coded, InvalidArgumentType, r'children\["charge"\] is the exception class Coded, .* Give an instance\.'),
        (KeyboardInterrupt, InvalidArgumentType, r'children\["charge"\] is KeyboardInterrupt, and'),
    ],
)
def test_an_impossible_outcome_is_refused(outcome: Any, error: type[Exception], text: str) -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("charge", charge, {"order_id": 1})

    with pytest.raises(error, match=text):
        once(body, {"charge": outcome})


def test_a_child_without_a_timeout_cannot_time_out() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", scenarios.echo, {"value": 1})

    with pytest.raises(InvalidArgument, match=r'^The child of step "child" cannot time out'):
        once(body, {"child": ChildTimedOut})


# --------------------------------------------------------------------------------------- what goes wrong in production


def test_a_body_is_run_again_from_the_top_after_each_child() -> None:
    starts: list[bool] = []

    def body(ctx: ExecutionContext) -> Any:
        starts.append(ctx.is_replaying)
        return [ctx.invoke(f"child-{number}", scenarios.echo, {"value": number}) for number in range(2)]

    assert once(body, {scenarios.echo: lambda value: value}) == [0, 1]
    assert starts == [False, True, True]


def test_what_a_replay_sees_is_a_fresh_copy() -> None:
    def body(ctx: ExecutionContext) -> Any:
        first = ctx.invoke("child", scenarios.echo, {"value": 1})
        first["seen"] = first.get("seen", 0) + 1
        ctx.sleep("nap", 5)
        return first

    assert once(body, {"child": {"a": (1,)}}) == {"a": [1], "seen": 1}


def test_another_step_on_the_second_run_is_noticed() -> None:
    numbers = itertools.count()

    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke(f"child-{next(numbers)}", scenarios.echo, {"value": 1})

    with pytest.raises(BodyError, match=r'is not deterministic: it came to "child-1" where .* come to step "child-0"'):
        once(body, {scenarios.echo: 1})


def test_an_end_before_the_recorded_steps_is_noticed() -> None:
    numbers = itertools.count()

    def body(ctx: ExecutionContext) -> Any:
        if next(numbers):
            raise KeyError("gone")
        ctx.sleep("nap", 1)

    with pytest.raises(BodyError, match=r'it ended where its run before had come to step "nap"') as caught:
        once(body)
    assert isinstance(caught.value.__cause__, KeyError)


def test_another_payload_on_the_second_run_is_noticed() -> None:
    numbers = itertools.count()

    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", scenarios.echo, {"value": next(numbers)})

    with pytest.raises(StepMismatch, match="another payload"):
        once(body, {"child": 1})


def test_a_step_name_that_is_used_twice_is_noticed() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("child", scenarios.echo, {"value": number}) for number in range(2)]

    with pytest.raises(StepNameReused):
        once(body, {"child": 1})


@pytest.mark.parametrize("how", ["returned", "raised ValueError"])
def test_a_swallowed_suspension_is_noticed(how: str) -> None:
    def body(ctx: ExecutionContext) -> Any:
        try:
            ctx.invoke("child", scenarios.echo, {"value": 1})
        except BaseException:  # noqa: BLE001
            if how != "returned":
                raise ValueError("instead") from None

    with pytest.raises(
        BodyError, match=rf"swallowed the suspension at test_bodies\.py:\d+ \(step 'child'\) and {how}\."
    ):
        once(body, {"child": 1})


def test_a_payload_that_is_no_json_is_noticed() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", scenarios.echo, {"value": {1, 2}})

    with pytest.raises(NotSerializable, match=r'^payload\["value"\] is a set'):
        once(body, {"child": 1})


def test_a_payload_that_does_not_fit_the_childs_signature_is_noticed() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", scenarios.echo, {"valeu": 1})

    with pytest.raises(InvalidArgumentType, match="does not fit"):
        once(body, {"child": 1})


def test_a_result_that_is_no_json_or_too_large_is_noticed(settings: Any) -> None:
    with pytest.raises(NotSerializable, match=r"^result of .* is a set"):
        once(lambda ctx: {1})
    settings.CONDUCTOR = {"MAX_RESULT_BYTES": 10}
    with pytest.raises(PayloadTooLarge):
        once(lambda ctx: "x" * 20)


def test_a_child_that_is_no_task_is_noticed() -> None:
    with pytest.raises(UnknownTask):
        once(lambda ctx: ctx.invoke("child", "no.such.task"))


# ------------------------------------------------------------------------------------------------- children in parallel


def charge_all(ctx: ExecutionContext) -> Any:
    payloads = [{"order_id": number, "total": number * 10} for number in range(3)]
    return ctx.map("charge-all", charge, payloads, timeout=30)


def charge_all_and_go_on(ctx: ExecutionContext) -> Any:
    payloads = [{"order_id": number} for number in range(3)]
    outcomes = ctx.map("charge-all", charge, payloads, timeout=30, return_exceptions=True)
    ctx.sleep("nap", 1)
    return [str(outcome) for outcome in outcomes]


def side_by_side(ctx: ExecutionContext) -> Any:
    first = ctx.start("first", scenarios.echo, {"value": 1}, timeout=5)
    second = ctx.start("second", charge, {"order_id": 7})
    ctx.start("third", scenarios.echo, {"value": 3})
    return ctx.gather(first, second)


def side_by_side_and_go_on(ctx: ExecutionContext) -> Any:
    handles = [ctx.start(name, scenarios.echo, {"value": 1}, timeout=5) for name in ("a", "b")]
    once_more = [str(outcome) for outcome in ctx.gather(*handles, return_exceptions=True)]
    ctx.sleep("nap", 1)
    assert [str(outcome) for outcome in ctx.gather(*handles, return_exceptions=True)] == once_more
    return once_more


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["a", None, [1]], ["a", None, [1]]),
        ("same", ["same", "same", "same"]),
        (lambda order_id, total: total + order_id, [0, 11, 22]),
        ([1, lambda **payload: payload, 3], [1, {"order_id": 1, "total": 10}, 3]),
    ],
)
@pytest.mark.parametrize("key", ["charge-all", charge])
def test_a_map_takes_one_outcome_per_child_or_one_for_all(outcomes: Any, expected: Any, key: Any) -> None:
    calls: list[StepCall] = []
    assert once(charge_all, {key: outcomes}, calls=calls) == expected
    assert [(call.step, call.kind, call.payload["order_id"]) for call in calls] == [
        ("charge-all", StepKind.MAP, number) for number in range(3)
    ]


@pytest.mark.parametrize(
    ("outcomes", "error", "text"),
    [
        ([1, CardDeclined("no"), 3], ChildFailed, r"^Child execution failed: no$"),
        ([ChildTimedOut, CardDeclined("no"), 3], ChildFailed, r"^Child execution failed: no$"),
        ([1, ChildTimedOut, 3], ChildTimedOut, r"timed out after 30s \(step 'charge-all'\)"),
        ([1, ChildCancelled("x"), 3], ChildCancelled, r"Cancelled: x$"),
    ],
)
def test_a_map_raises_what_ends_it(outcomes: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        once(charge_all, {"charge-all": outcomes})


def test_a_map_that_returns_exceptions_returns_them() -> None:
    found = once(charge_all_and_go_on, {"charge-all": [1, CardDeclined("no"), ChildTimedOut]})
    assert found == [
        "1",
        "Child execution failed: no",
        "Child execution timed out after 30s (step 'charge-all')",
    ]


def test_a_map_without_payloads_needs_no_outcome() -> None:
    assert once(lambda ctx: ctx.map("none", charge, [])) == []


def test_a_list_of_another_length_than_the_map_is_refused() -> None:
    with pytest.raises(
        BodyError, match=r'^children\["charge-all"\] has 2 outcomes, and ctx\.map\("charge-all"\) has 3'
    ):
        once(charge_all, {"charge-all": [1, 2]})


def test_started_children_are_asked_for_when_they_are_gathered() -> None:
    calls: list[StepCall] = []
    assert once(side_by_side, {"first": 1, charge: {"receipt": 2}}, calls=calls) == [1, {"receipt": 2}]
    assert [(call.step, call.kind) for call in calls] == [
        ("first", StepKind.START),
        ("second", StepKind.START),
        ("third", StepKind.START),
        ("gather(first,second)", StepKind.GATHER),
    ]
    with pytest.raises(BodyError, match=r'as step "second", and the test does not say'):
        once(side_by_side, {"first": 1})


def test_a_gather_raises_the_first_outcome_that_is_no_result() -> None:
    with pytest.raises(ChildTimedOut):
        once(side_by_side, {"first": ChildTimedOut, "second": ValueError("no")})
    with pytest.raises(ChildFailed, match=r"^Child execution failed: no$"):
        once(side_by_side, {"first": 1, "second": ValueError("no")})


def test_a_gather_that_returns_exceptions_returns_them_every_time() -> None:
    found = once(side_by_side_and_go_on, {"a": ChildTimedOut, "b": 2})
    assert found == ["Child execution timed out after 5s (step 'a')", "2"]


def test_a_childs_body_may_have_steps_of_the_same_names() -> None:
    @durable
    def inner(ctx: ExecutionContext) -> Any:
        return ctx.map("all", charge, [{"order_id": 1}]), ctx.gather(ctx.start("one", scenarios.echo, {"value": 1}))

    def body(ctx: ExecutionContext) -> Any:
        found = ctx.map("all", scenarios.echo, [{"value": 1}, {"value": 2}])
        handle = ctx.start("one", charge, {"order_id": 1})
        return [*found, ctx.invoke("inner", inner), ctx.gather(handle)]

    assert once(body, {scenarios.echo: "echo", charge: "charge", inner: inner}) == [
        "echo",
        "echo",
        [["charge"], ["echo"]],
        ["charge"],
    ]


# -------------------------------------------------------------------------------------------------------------- events


def ask(ctx: ExecutionContext) -> Any:
    try:
        answer = ctx.wait_for("approval", "approved", timeout=60)
    except EventTimedOut as error:
        return str(error)
    ctx.sleep("nap", 1)
    return [answer]


@pytest.mark.parametrize("key", ["approval", "approved"])
@pytest.mark.parametrize("payload", [{"by": "ann"}, None, False])
def test_an_event_is_found_by_the_step_or_its_name(key: str, payload: Any) -> None:
    calls: list[StepCall] = []
    assert once(ask, events={key: payload}, calls=calls) == [payload]
    assert calls[0] == StepCall("approval", StepKind.EVENT, args=("approved",))


def test_an_event_may_be_late() -> None:
    expected = "Event 'approved' did not come within 60s (step 'approval')"
    assert once(ask, events={"approved": EventTimedOut}) == expected
    with pytest.raises(InvalidArgument, match=r'^The event of step "a" cannot time out'):
        once(lambda ctx: ctx.wait_for("a", "b"), events={"a": EventTimedOut})


def test_a_missing_event_names_the_step_the_event_and_what_to_add() -> None:
    with pytest.raises(BodyError) as caught:
        once(ask)
    assert str(caught.value) == (
        'The body waits for the event "approved" in step "approval", and the test does not send it. Add '
        'events={"approved": …} to run(): its payload, or EventTimedOut.'
    )


def test_a_payload_of_an_event_that_is_no_json_is_noticed() -> None:
    with pytest.raises(NotSerializable, match=r'^events\["approved"\]\["by"\] is a set'):
        once(ask, events={"approved": {"by": {1}}})


# ---------------------------------------------------------------------------------------------------- steps and sleeps


@pytest.mark.parametrize("kind", ["step", "atomic_step"])
def test_a_steps_function_runs_once_and_is_remembered(kind: str) -> None:
    ran: list[int] = []

    def effect(value: int, *, more: int) -> Any:
        ran.append(value)
        return (value, more)

    def body(ctx: ExecutionContext) -> Any:
        first = getattr(ctx, kind)("effect", effect, 1, more=2)
        ctx.sleep("nap", 60)
        ctx.sleep_until("later", dt.datetime(2050, 1, 1, tzinfo=dt.UTC))
        return first

    assert once(body) == [1, 2]
    assert ran == [1]


@pytest.mark.parametrize("kind", ["step", "atomic_step"])
def test_a_failure_that_the_body_catches_is_remembered(kind: str) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise CardDeclined("no")

    def body(ctx: ExecutionContext) -> Any:
        try:
            getattr(ctx, kind)("effect", fail)
        except CardDeclined as error:
            ctx.sleep("nap", 1)
            return str(error)

    assert once(body) == "no"
    assert tries == [1]


def test_an_outcome_of_a_step_takes_the_place_of_its_function() -> None:
    seen: list[Any] = []
    assert run(charge, {"order_id": 7, "total": 5}, steps={"call-bank": {"receipt": "R"}}) == {"receipt": "R"}
    assert run(charge, {"order_id": 7, "total": 5}, steps={"call-bank": seen.append}) is None
    assert seen == [5]
    with pytest.raises(CardDeclined, match="no"):
        run(charge, {"order_id": 7}, steps={"call-bank": CardDeclined("no")})


def test_a_steps_function_must_be_callable_and_must_not_call_the_context() -> None:
    with pytest.raises(InvalidArgumentType, match="needs a callable"):
        once(lambda ctx: ctx.step("effect", 5))
    with pytest.raises(NestedDurableCall):
        once(lambda ctx: ctx.step("effect", lambda: ctx.sleep("nap", 1)))


# ---------------------------------------------------------------------------------------------------------- the rest


def test_the_calls_are_listed_in_order_each_once() -> None:
    calls: list[StepCall] = []

    @durable
    def body(ctx: ExecutionContext) -> Any:
        ctx.step("note", len, "abc")
        ctx.invoke("a", scenarios.echo, {"value": 1})
        ctx.sleep("nap", 5)
        ctx.invoke("b", charge.s(7, total=2))
        ctx.invoke("c", scenarios.echo, 9)

    run(body, children={scenarios.echo: None, charge: None}, calls=calls)
    assert [call.step for call in calls] == ["note", "a", "nap", "b", "c"]
    assert calls[0] == StepCall("note", StepKind.STEP, args=("abc",))
    assert calls[1] == StepCall("a", StepKind.INVOKE, scenarios.echo.name, kwargs={"value": 1})
    assert [call.payload for call in calls] == ["abc", {"value": 1}, 5.0, {"total": 2}, 9]
    assert calls[3].args == (7,)


def test_calls_are_listed_although_the_body_fails() -> None:
    calls: list[StepCall] = []
    with pytest.raises(ChildFailed):
        once(lambda ctx: ctx.invoke("a", scenarios.echo, {"value": 1}), {"a": ValueError("no")}, calls=calls)
    assert [call.step for call in calls] == ["a"]


def test_the_context_tells_what_it_tells_in_production() -> None:
    def body(ctx: ExecutionContext) -> Any:
        ctx.checkpoint()
        ctx.logger.info("here")
        assert ctx.task is not None
        return [
            ctx.attempt,
            ctx.parent_id,
            ctx.root_id == ctx.execution_id,
            ctx.idempotency_key("a") == f"{ctx.execution_id}:a",
        ]

    assert once(body, attempt=3) == [3, None, True, True]


def test_an_error_is_raised_as_it_is() -> None:
    def body(ctx: ExecutionContext) -> Any:
        raise CardDeclined("no")

    with pytest.raises(CardDeclined, match=r"^no$"):
        once(body)


def test_a_retry_is_raised_with_its_countdown() -> None:
    def body(ctx: ExecutionContext) -> Any:
        raise ctx.retry(countdown=10)

    with pytest.raises(RetryExecution) as caught:
        once(body)
    assert caught.value.countdown == 10


@pytest.mark.parametrize("payload", [{"order_id": 7}, 7])
def test_a_payload_is_given_as_to_invoke(payload: Any) -> None:
    result = run(fulfil, payload, {"validate": {"total": 42}, "charge": {"receipt": 1}})
    assert result == {"status": "paid", "receipt": 1}
    assert run(fulfil.name, payload, {"validate": {"total": 42}, "charge": {"receipt": 1}}) == result


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: run(fulfil, {"order": 7}), InvalidArgumentType, "does not fit"),
        (lambda: run("no.such.task"), UnknownTask, "no.such.task"),
        (lambda: run(print), UnknownTask, "needs a task, its name or a signature"),  # type: ignore[arg-type]
        (lambda: run(fulfil, {"order_id": 7}, {5: 1}), InvalidArgumentType, "a key of children must be"),
        (lambda: run(fulfil, {"order_id": 7}, attempt=0), InvalidArgument, "attempt must be"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


class PlainTest(unittest.TestCase):
    """No Django test case: nothing prepares a database here."""

    def test_a_body_runs_in_a_plain_test_case(self) -> None:
        result = run(fulfil, {"order_id": 7}, {"validate": {"total": 42}, "charge": ChildTimedOut})
        assert result["status"] == "pending"


# ------------------------------------------------------------------------------------- waits that some members decide


def _three(ctx: ExecutionContext) -> list[Any]:
    return [ctx.start(name, scenarios.echo, {"value": name}) for name in ("a", "b", "c")]


def test_a_gather_takes_the_first_results_that_are_enough() -> None:
    children = {"a": ValueError("no"), "b": 2, "c": 3}
    assert once(lambda ctx: ctx.gather(*_three(ctx), need=1), children) == [2]
    assert once(lambda ctx: ctx.gather(*_three(ctx), need=2), children) == [2, 3]
    with pytest.raises(ChildFailed, match="no"):
        once(lambda ctx: ctx.gather(*_three(ctx), need=3), children)


def test_a_map_lets_failures_pass() -> None:
    outcomes = {"n": [1, ValueError("two"), ValueError("three")]}

    def body(ctx: ExecutionContext, most: int) -> list[str]:
        return [str(each) for each in ctx.map("n", scenarios.echo, [1, 2, 3], max_failures=most)]

    assert once(lambda ctx: body(ctx, 2), outcomes) == [
        "1",
        "Child execution failed: two",
        "Child execution failed: three",
    ]
    with pytest.raises(ChildFailed, match="three"):
        once(lambda ctx: body(ctx, 1), outcomes)


def test_a_look_sees_that_a_child_has_ended_unless_the_test_says_that_it_has_not() -> None:
    def body(ctx: ExecutionContext) -> list[Any]:
        handle = ctx.start("a", scenarios.echo, {"value": 1})
        return [handle.peek(), handle.peek(), handle.result()]

    assert once(body, {"a": 5}) == [True, True, 5]
    assert once(body, {"a": 5}, steps={"peek(a)": False}) == [False, True, 5]


def _first(ctx: ExecutionContext, **options: Any) -> Any:
    members = [*_three(ctx), ctx.event("answer", "yes"), ctx.timer("late", 60), ctx.timer("soon", 5)]
    winner, value = ctx.first("decision", *members, **options)
    return [winner.step, value]


def test_the_first_argument_wins_of_those_that_the_test_decides() -> None:
    assert once(_first, {"c": 3, "b": 2}) == ["b", 2]
    assert once(_first, events={"yes": 7}) == ["answer", 7]
    assert once(_first) == ["soon", None]
    assert once(_first, {"b": 2}, steps={"decision": "late"}) == ["late", None]
    assert once(_first, {"b": 2, "c": 3}, steps={"decision": lambda: "c"}) == ["c", 3]
    with pytest.raises(BodyError, match="which the body does not wait for there"):
        once(_first, steps={"decision": "nobody"})
    with pytest.raises(ChildFailed, match="no"):
        once(_first, {"a": ValueError("no"), "b": 2})
    assert once(lambda ctx: _first(ctx, until="succeeded"), {"a": ValueError("no"), "b": 2}) == ["b", 2]


def test_none_of_a_first_succeeds() -> None:
    def body(ctx: ExecutionContext) -> Any:
        return ctx.first("decision", *_three(ctx), until="succeeded")

    with pytest.raises(NoneSucceeded, match="None of 3 has succeeded"):
        once(body, {scenarios.echo: ValueError("no")})
    with pytest.raises(BodyError, match="gives no outcome of any that decides it"):
        once(body)


def test_handles_come_in_the_order_that_the_test_gives() -> None:
    def body(ctx: ExecutionContext) -> list[Any]:
        handles = [*_three(ctx), ctx.event("answer", "yes")]
        return [[handle.step, handle.result()] for handle in ctx.as_completed("arrivals", *handles)]

    given: Any = {"children": {scenarios.echo: 1}, "events": {"yes": 2}}
    assert once(body, **given) == [["a", 1], ["b", 1], ["c", 1], ["answer", 2]]
    order = ["answer", "c", "b", "a"]
    assert [step for step, _ in once(body, **given, steps={"arrivals": order})] == order
    with pytest.raises(BodyError, match='waits for the event "yes" in step "answer"'):
        once(body, {scenarios.echo: 1})


def test_looks_at_events_and_timers() -> None:
    def body(ctx: ExecutionContext) -> list[Any]:
        answer, late = ctx.event("answer", "yes"), ctx.timer("late", 60)
        return [answer.peek(), answer.peek(), late.peek(), late.peek(), late.result()]

    says = {"peek(answer)": False, "peek(late,2)": True}
    assert once(body, events={"yes": 1}, steps=says) == [False, True, False, True, None]
