"""What a replay sees: the record, whatever the code has become since."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import ObjectDoesNotExist, ValidationError

from conductor_app import ExecutionContext, api
from conductor_app.engine import executor
from conductor_app.exceptions import StepFailed, StepMismatch
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.store import clock
from conductor_app.telling.headlines import headline
from conductor_app.telling.situation import Situation
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.app.models import Ledger
from tests.support.bodies import (
    advance,
    child,
    class_name,
    durable,
    failure,
    go_on,
    redeploy,
    reload,
    run,
    start,
)

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@pytest.fixture
def strict(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "STRICT_REPLAY": True}


Body = Callable[[ExecutionContext], Any]


def deploy_while_it_sleeps(before: Body, after: Body) -> Execution:
    """Start ``before``, which sleeps in the step ``pause``; go on with ``after``, and return the execution."""
    task = durable(before)
    execution = start(task)
    assert execution.status == "waiting", execution.error_message
    redeploy(task, after)
    advance(61)
    return reload(execution)


# -------------------------------------------------------------------------------------------- steps that come and go


def test_steps_may_be_added_removed_and_reordered_while_an_execution_waits() -> None:
    def before(ctx: ExecutionContext) -> Any:
        a = ctx.step("a", noted, "a")
        b = ctx.invoke("b", scenarios.echo, {"value": "b"})
        c = ctx.atomic_step("c", noted, "c")
        ctx.sleep("pause", 60)
        return [a, b, c]

    def after(ctx: ExecutionContext) -> Any:
        c = ctx.atomic_step("c", noted, "c")
        new_first = ctx.step("new-first", noted, "new-first")
        b = ctx.invoke("b", scenarios.echo, {"value": "b"})
        ctx.sleep("pause", 60)
        new_child = ctx.invoke("new-child", scenarios.echo, {"value": "new-child"})
        return [c, new_first, b, new_child]

    execution = deploy_while_it_sleeps(before, after)
    assert execution.get_result() == ["c", "new-first", "b", "new-child"]
    assert [count(key) for key in ("a", "c", "new-first")] == [1, 1, 1]
    assert [step.name for step in execution.steps.all()] == ["a", "b", "c", "pause", "new-first", "new-child"]


def test_a_removed_step_that_was_waited_for_is_no_hindrance() -> None:
    def before(ctx: ExecutionContext) -> Any:
        ctx.sleep("pause", 60)
        return "before"

    execution = deploy_while_it_sleeps(before, lambda ctx: ctx.invoke("other", scenarios.echo, {"value": "after"}))
    assert execution.get_result() == "after"


def test_changed_functions_durations_and_timeouts_do_not_matter_to_what_is_recorded() -> None:
    def before(ctx: ExecutionContext) -> Any:
        a = ctx.step("a", noted, "old")
        ctx.invoke("b", scenarios.echo, timeout=30)
        ctx.sleep("pause", 60)
        return a

    def after(ctx: ExecutionContext) -> Any:
        a = ctx.atomic_step("a", noted, "new")  # both are steps
        ctx.invoke("b", scenarios.echo, timeout=60, on_timeout="abandon", queue="other", priority=1)
        ctx.sleep("pause", 1_000_000)
        return a

    assert deploy_while_it_sleeps(before, after).get_result() == "old"


def noted(value: str) -> str:
    note(None, value)
    return value


# ------------------------------------------------------------------------------------------ steps that became others


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (
            lambda ctx: ctx.step("a", int),
            lambda ctx: ctx.invoke("a", scenarios.echo),
            'Step "a" was recorded as step and the code now calls it as invoke. Give the new call its own step name.',
        ),
        (
            lambda ctx: ctx.invoke("a", scenarios.echo),
            lambda ctx: ctx.step("a", int),
            'Step "a" was recorded as invoke and the code now calls it as step. Give the new call its own step name.',
        ),
        (
            lambda ctx: ctx.sleep("a", 0),
            lambda ctx: ctx.atomic_step("a", int),
            'Step "a" was recorded as sleep and the code now calls it as step. Give the new call its own step name.',
        ),
        (
            lambda ctx: ctx.step("a", int),
            lambda ctx: ctx.sleep("a", 1),
            'Step "a" was recorded as step and the code now calls it as sleep. Give the new call its own step name.',
        ),
        (
            lambda ctx: ctx.invoke("a", scenarios.echo),
            lambda ctx: ctx.invoke("a", scenarios.naps, {"seconds": 0}),
            'Step "a" recorded task tests.app.scenarios.echo and the code now calls tests.app.scenarios.naps. '
            "Give the new call its own step name.",
        ),
    ],
)
def test_a_name_that_was_recorded_for_something_else_fails_the_execution_at_once(
    before: Body, after: Body, text: str
) -> None:
    def pausing(ctx: ExecutionContext) -> None:
        before(ctx)
        ctx.sleep("pause", 60)

    execution = deploy_while_it_sleeps(pausing, after)
    assert (failure(execution).error_class, failure(execution).message) == (class_name(StepMismatch), text)
    assert (execution.attempt, execution.steps.count()) == (1, 2)


def test_a_pending_child_of_another_task_fails_the_execution_and_is_cancelled_with_it() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", scenarios.naps, {"seconds": 60})

    root = start(parent)
    redeploy(parent, lambda ctx: ctx.invoke("a", scenarios.echo, {"value": 1}))
    advance(61)
    assert failure(root).error_class == class_name(StepMismatch)


# --------------------------------------------------------------------------------------------- payloads that changed


def changed_payload(ctx: ExecutionContext) -> Any:
    value = ctx.invoke("a", scenarios.echo, {"value": 2})
    ctx.sleep("pause", 60)
    return value


def recorded_payload(ctx: ExecutionContext) -> Any:
    value = ctx.invoke("a", scenarios.echo, {"value": 1})
    ctx.sleep("pause", 60)
    return value


CHANGED = (
    'Step "a" was recorded with another payload than the code now passes; the recorded outcome counts. Payloads should '
    "follow from the execution's own payload and earlier steps."
)


def test_another_payload_than_the_recorded_one_draws_a_warning_and_the_record_counts(caplog: Any) -> None:
    execution = deploy_while_it_sleeps(recorded_payload, changed_payload)
    assert execution.get_result() == 1
    warnings = [record for record in caplog.records if record.getMessage() == CHANGED]
    assert [(record.levelname, record.execution_id) for record in warnings] == [("WARNING", str(execution.pk))]


@pytest.mark.usefixtures("strict")
def test_another_payload_than_the_recorded_one_fails_the_execution_if_replays_are_strict() -> None:
    execution = deploy_while_it_sleeps(recorded_payload, changed_payload)
    assert (failure(execution).error_class, failure(execution).message) == (class_name(StepMismatch), CHANGED)
    assert execution.attempt == 1


@pytest.mark.usefixtures("strict")
def test_the_order_of_a_payloads_keys_is_no_change() -> None:
    def before(ctx: ExecutionContext) -> Any:
        value = ctx.invoke("a", scenarios.echo, {"value": {"x": 1, "y": [{"p": 1, "q": 'a":'}]}})
        ctx.sleep("pause", 60)
        return value

    def after(ctx: ExecutionContext) -> Any:
        value = ctx.invoke("a", scenarios.echo, {"value": {"y": [{"q": 'a":', "p": 1}], "x": 1}})
        ctx.sleep("pause", 60)
        return list(value)

    assert deploy_while_it_sleeps(before, after).get_result() == ["x", "y"]


@pytest.mark.usefixtures("strict")
def test_a_replay_of_unchanged_code_is_never_a_mismatch() -> None:
    assert run(scenarios.steps_then_child).get_result() == [1, 2, 3, 4]
    assert run(scenarios.grandparent_of_boom).error_message.startswith("Child execution failed: ")


# ------------------------------------------------------------------------------------------------- caught step failures


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.hint = hint
        self._private = "remembered too"


class NeedsArguments(Exception):
    def __new__(cls, code: int) -> NeedsArguments:
        return super().__new__(cls)

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__()

    def __str__(self) -> str:
        return f"code {self.code}"


class ReadOnly(Exception):
    @property
    def code(self) -> int:
        return 7


class Answered(Exception):
    """Holds something that JSON cannot hold, as errors of HTTP clients do."""

    def __init__(self, message: str, response: object = None) -> None:
        super().__init__(message)
        self.response = response
        self.code = 404


class Outer:
    class Inner(Exception):
        pass


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda: ValueError("a", 1), lambda error: error.args),
        (lambda: KeyError("a"), lambda error: (error.args, error.args[0])),
        (lambda: OSError(errno.ENOENT, "No such file", "x.txt"), lambda error: (error.errno, error.filename)),
        (lambda: ConnectionRefusedError(111, "Connection refused"), lambda error: (error.errno, error.strerror)),
        (
            lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            lambda error: (error.encoding, error.object, error.start, error.reason),
        ),
        (lambda: Slotted(7, hint="again"), lambda error: (error.code, error.hint, error._private)),
        (lambda: NeedsArguments(7), lambda error: error.code),
        (lambda: ReadOnly("x"), lambda error: error.code),
        (lambda: Outer.Inner("nested"), lambda error: error.args),
        (lambda: Ledger.DoesNotExist("no such row"), lambda error: isinstance(error, ObjectDoesNotExist)),
        (lambda: ValidationError("no", code="x"), lambda error: (error.message, error.code)),
        (lambda: ValidationError({"name": ["no"]}), lambda error: error.message_dict),
        (lambda: Answered("not found", object()), lambda error: (error.code, hasattr(error, "response"))),
        (lambda: ImportError("no", name="x"), lambda error: error.name),
        (lambda: StopIteration(5), lambda error: error.value),
    ],
)
@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_caught_failure_of_a_step_is_raised_again_by_a_replay_as_it_was(
    call: str, make: Callable[[], Exception], facts: Callable[[Any], Any]
) -> None:
    seen = []

    def failing() -> None:
        note(None, "ran")
        raise make()

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        try:
            getattr(ctx, call)("work", failing)
        except Exception as error:  # noqa: BLE001
            seen.append((type(error), str(error), facts(error)))
        ctx.sleep("nap", 60)
        return ctx.invoke("after", scenarios.echo, {"value": "compensated"})

    execution = run(body)
    assert execution.get_result() == "compensated"
    assert seen == [(type(make()), str(make()), facts(make()))] * 3
    assert count("ran") == (1 if call == "step" else 0)
    step = execution.steps.get(name="work")
    assert (step.kind, step.status, step.result) == ("step", "failed", None)


def test_a_caught_failure_whose_class_is_gone_is_a_step_failed_with_its_message() -> None:
    seen = []

    def body(ctx: ExecutionContext) -> str:
        class Local(Exception):
            pass

        def failing() -> None:
            raise Local("gone")

        try:
            ctx.step("work", failing)
        except Exception as error:  # noqa: BLE001
            seen.append((type(error).__name__, str(error)))
        ctx.sleep("pause", 60)
        return "done"

    assert run(durable(body)).get_result() == "done"
    assert seen == [("Local", "gone"), ("StepFailed", "gone")]


@pytest.mark.parametrize(
    "stored", ["os.system", "builtins.SystemExit", "builtins.print", "no.such.Error", "", "x", "."]
)
def test_what_the_database_names_is_never_called_and_never_imported(stored: str) -> None:
    seen = []

    def body(ctx: ExecutionContext) -> str:
        try:
            ctx.step("work", int, "x")
        except Exception as error:  # noqa: BLE001
            seen.append((type(error), str(error)))
        ctx.sleep("pause", 60)
        return "done"

    task = durable(body)
    execution = start(task)
    Step.objects.filter(name="work").update(error=f'{{"type":"{stored}","message":"no"}}')
    advance(61)
    assert reload(execution).get_result() == "done"
    assert seen[1] == (StepFailed, "no")


def test_a_caught_failure_without_another_call_is_not_worth_remembering() -> None:
    @durable(max_retries=1)
    def body(ctx: ExecutionContext) -> str:
        try:
            ctx.step("work", lambda: note(None, "ran") or int("x"))
        except ValueError:
            if ctx.attempt == 1:
                raise RuntimeError("again") from None
        return "done"

    execution = run(body)
    assert (execution.get_result(), count("ran"), execution.steps.count()) == ("done", 2, 0)


def test_a_failed_step_is_remembered_before_the_next_one_runs() -> None:
    @durable(max_retries=1)
    def body(ctx: ExecutionContext) -> str:
        try:
            ctx.step("work", lambda: note(None, "ran") or int("x"))
        except ValueError:
            ctx.step("compensate", note, None, "compensated")
        if ctx.attempt == 1:
            raise RuntimeError("again")
        return "done"

    execution = run(body)
    assert (execution.get_result(), count("ran"), count("compensated")) == ("done", 1, 1)
    assert [(step.name, step.status) for step in execution.steps.all()] == [
        ("work", "failed"),
        ("compensate", "succeeded"),
    ]


# ------------------------------------------------------------------------------------------------ waiting for the same


def test_a_parent_that_is_woken_for_nothing_waits_for_the_same_child() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("nap", scenarios.naps, {"seconds": 60})

    root = start(parent)
    first = child(root, "nap")
    Execution.objects.filter(pk=root.pk).update(status="queued", due_at=clock.now(), dispatch_at=clock.now())
    assert go_on() == 1
    assert reload(root).status == "waiting"
    assert child(root, "nap").pk == first.pk
    advance(61)
    assert reload(root).get_result() == "rested"
    assert (root.children.count(), root.steps.count()) == (1, 1)


def test_the_childs_id_follows_from_its_parent_and_its_step() -> None:
    from conductor_app.store.ids import derive_child_id

    root = run(scenarios.pass_through, value=1)
    assert root.children.get().pk == derive_child_id(root.pk, "echo")


# ------------------------------------------------------------------------------------------- runs that take another way


def lines(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if "was woken by step" in record.getMessage()]


def said(execution: Execution) -> str:
    steps = list(execution.steps.all())
    failures = {row.pk: row for row in FailedExecution.objects.filter(pk=execution.pk)}
    return headline(Situation(execution, clock.read("default"), steps, failures=failures)).text


def before_the_deployment(ctx: ExecutionContext) -> str:
    ctx.sleep("pause", 60)
    return "before"


def test_a_run_that_misses_the_step_that_woke_it_is_told_of_in_log_and_show(caplog: Any) -> None:
    def after(ctx: ExecutionContext) -> str:
        ctx.sleep("rest", 60)
        return "after"

    execution = deploy_while_it_sleeps(before_the_deployment, after)
    assert lines(caplog) == [
        f'{execution.task} was woken by step "pause", and came to step "rest" without coming to that step again. That '
        "is right if a deployment has added or removed steps. If not: A body has to take the same steps on each run. "
        "Put what may differ from run to run (the time, random numbers, queries) into ctx.step()."
    ]
    missed = 'A run that step "pause" had woken came to step "rest" without coming to it again.'
    assert execution.status == "waiting"
    assert said(execution).endswith(f". {missed}")
    advance(61)
    execution = reload(execution)
    assert execution.get_result() == "after"
    assert said(execution).endswith(f". {missed}")
    assert len(lines(caplog)) == 1


def test_a_run_that_returns_without_the_step_that_woke_it_is_told_of(caplog: Any) -> None:
    execution = deploy_while_it_sleeps(before_the_deployment, lambda ctx: "after")
    assert execution.get_result() == "after"
    (line,) = lines(caplog)
    assert line.startswith(
        f'{execution.task} was woken by step "pause", and returned without coming to that step again.'
    )
    assert said(execution).endswith('. A run that step "pause" had woken returned without coming to it again.')


@pytest.mark.parametrize("after", [lambda ctx: "after", lambda ctx: ctx.invoke("rest", scenarios.echo)])
@pytest.mark.usefixtures("strict")
def test_a_run_that_misses_the_step_that_woke_it_fails_if_replays_are_strict(after: Body) -> None:
    execution = deploy_while_it_sleeps(before_the_deployment, after)
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert failure(execution).error_class == class_name(StepMismatch)
    assert f'{execution.task} was woken by step "pause", and ' in failure(execution).message
    assert [step.name for step in execution.steps.all()] == ["pause"]
    assert "woken" not in said(execution).replace("was woken by", "")


def endless(suspend: Callable[[ExecutionContext, str], Any]) -> Any:
    numbers = iter(range(1_000))

    @durable
    def body(ctx: ExecutionContext) -> None:
        suspend(ctx, f"step-{next(numbers)}")

    return body


@pytest.mark.parametrize(
    "suspend",
    [
        lambda ctx, name: ctx.invoke(name, scenarios.echo),
        lambda ctx, name: ctx.sleep(name, 60),
        lambda ctx, name: ctx.map(name, scenarios.echo, [1, 2]),
        lambda ctx, name: ctx.map(name, scenarios.echo, []),
        lambda ctx, name: ctx.gather(ctx.start(name, scenarios.echo)),
        lambda ctx, name: ctx.wait_for(name, "never", timeout=60),
    ],
    ids=["invoke", "sleep", "map", "empty-map", "gather", "wait_for"],
)
def test_new_names_run_after_run_fail_the_execution(suspend: Callable[[ExecutionContext, str], Any]) -> None:
    execution = run(endless(suspend))
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert failure(execution).error_class == class_name(StepMismatch)
    assert f"So it was {executor.MAX_RUNS_ASTRAY} times in a row." in failure(execution).message
    opened = execution.steps.exclude(kind="start").count()
    assert opened == executor.MAX_RUNS_ASTRAY


def test_an_operators_retry_of_what_has_become_deterministic_goes_on() -> None:
    task = endless(lambda ctx, name: ctx.sleep(name, 60))
    execution = run(task)

    def mended(ctx: ExecutionContext) -> str:
        for number in range(3):
            ctx.invoke(f"mended-{number}", scenarios.echo)
        return "mended"

    redeploy(task, mended)
    api.retry(execution.pk)
    go_on()
    assert reload(execution).get_result() == "mended"


def test_two_versions_side_by_side_do_not_count_as_new_names_for_ever(caplog: Any) -> None:
    """Each comes to its own step; what the other one waited for it does not know."""

    def first(ctx: ExecutionContext) -> str:
        for number in range(3):
            ctx.sleep(f"first-{number}", 60)
        return "first"

    def second(ctx: ExecutionContext) -> str:
        for number in range(3):
            ctx.sleep(f"second-{number}", 60)
        return "second"

    task = durable(first)
    execution = start(task)
    for number in range(5):
        redeploy(task, first if number % 2 else second)
        advance(61)
    assert reload(execution).status == "waiting"
    assert len(lines(caplog)) == 5
    redeploy(task, second)
    while reload(execution).status == "waiting":
        advance(61)
    assert reload(execution).get_result() == "second"


@pytest.mark.usefixtures("strict")
def test_a_step_named_by_the_attempt_is_no_other_way(caplog: Any) -> None:
    @durable(max_retries=2, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> int:
        ctx.invoke(f"try-{ctx.attempt}", scenarios.echo)
        ctx.map(f"none-{ctx.attempt}", scenarios.echo, [])
        if ctx.attempt < 3:
            raise ConnectionError
        return ctx.attempt

    assert run(body).get_result() == 3
    assert lines(caplog) == []
