"""Random programs under random faults: whatever comes, each execution ends once, and as its program says."""

from __future__ import annotations

import datetime as dt
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection
from django.db.models import Count
from django_celery_results.models import TaskResult
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conductor_app import api, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import ActionRefused, DuplicateExecution, ExecutionFinished, RetryRefused
from conductor_app.models import (
    Attempt,
    CopiedOutcome,
    Event,
    Execution,
    FailedExecution,
    Fork,
    LimitKey,
    PausedTask,
    Place,
    Schedule,
    Step,
)
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import dispatch
from conductor_app.values.schedules import CatchUp, Overlap
from tests.app.programs import EVENT, TASKS, interpret
from tests.model import promises
from tests.model.oracle import Oracle
from tests.model.simulation import Actor, Stage, World, renew
from tests.support import history, invariants

pytestmark = pytest.mark.skipif(
    connection.vendor != "sqlite", reason="the actors share one connection; tests/races has one for each"
)

#: With HYPOTHESIS_PROFILE=thorough: a soak of many minutes.
IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
EXAMPLES, STEPS = (3_000, 80) if IS_THOROUGH else (30, 40)

#: At most so many actors at once, and so many roots.
MOST_ACTORS, MOST_ROOTS = 6, 2
#: Beside those, about so many that are called with one unique key.
MOST_KEYED = 4
#: And so many of tasks that have limits.
MOST_LIMITED = 5
#: Rounds of sweeps and deliveries in which everything has to end when nothing goes wrong any more.
MOST_ROUNDS = 80

# ------------------------------------------------------------------------------------------------------------- programs

_timeouts = st.sampled_from([None, None, 2, 10])
_simple = st.one_of(
    st.sampled_from([{"do": "step"}, {"do": "atomic"}, {"do": "failing_step"}, {"do": "checkpoint"}, {"do": "fail"}]),
    st.fixed_dictionaries({"do": st.just("flaky"), "failures": st.integers(1, 3)}),
    st.fixed_dictionaries({"do": st.just("sleep"), "seconds": st.sampled_from([0, 3])}),
    st.fixed_dictionaries({"do": st.just("event"), "timeout": _timeouts, "catch": st.booleans()}),
)


def _with_children(programs: st.SearchStrategy[Any], limited: list[str]) -> st.SearchStrategy[Any]:
    by = st.sampled_from(["", "", "", *limited])
    outcomes = {"timeout": _timeouts, "on_timeout": st.sampled_from(["cancel", "abandon"]), "catch": st.booleans()}
    several = {"programs": st.lists(programs, min_size=1, max_size=3), "return_exceptions": st.booleans(), **outcomes}
    parallel = st.sampled_from([None, 1, 2])
    return st.one_of(
        st.fixed_dictionaries({"do": st.just("invoke"), "by": by, "program": programs, **outcomes}),
        st.fixed_dictionaries({"do": st.just("map"), "by": by, "max_parallel": parallel, **several}),
        st.fixed_dictionaries({"do": st.just("gather"), "by": by, **several}),
        st.fixed_dictionaries({"do": st.just("start"), "by": by, "program": programs}),
        st.fixed_dictionaries(
            {
                "do": st.just("first"),
                "by": by,
                "programs": st.lists(programs, min_size=1, max_size=2),
                "until": st.sampled_from(["decided", "succeeded"]),
                "losers": st.sampled_from(["abandon", "cancel"]),
                "event": st.booleans(),
                "seconds": st.sampled_from([None, 0, 3]),
                "catch": st.booleans(),
            }
        ),
    )


#: What has a place until it ends has no children: two of them could wait for each other's places.
_FOR_RUNS = ["two", "both", "all"]
_LIMITED = [*_FOR_RUNS, "two open"]
_leaves = st.lists(_simple, max_size=2)
_inner = st.lists(st.one_of(_simple, _with_children(_leaves, _LIMITED)), max_size=2)
_programs = st.lists(st.one_of(_with_children(_inner, _FOR_RUNS), _simple), min_size=1, max_size=3)
_keyed_programs = st.lists(_simple, min_size=1, max_size=2)
_conflicts = st.sampled_from(
    [
        *({"on_conflict": how} for how in ("return", "refuse", "replace", "replace")),
        *({"debounce": 2, **more} for more in ({}, {"on_conflict": "replace"})),
    ]
)
_picks = st.integers(0, 11)
_EVENTS = (StepKind.EVENT, StepKind.MESSAGE)
#: The schedule that there is in an example; none in some.
_plans = st.one_of(st.none(), st.tuples(st.sampled_from(Overlap), st.sampled_from([CatchUp.LAST, CatchUp.ALL])))

# -------------------------------------------------------------------------------------------------------------- machine


class Machine(RuleBasedStateMachine):
    """Starts programs, lets actors go on, and breaks things."""

    stage: Stage

    def __init__(self) -> None:
        super().__init__()
        _empty_tables()
        self.world = self.stage.world = World()
        self.roots: list[uuid.UUID] = []
        #: What each step was when it was first seen decided; a retry of its tree forgets it.
        self._decided: dict[int, tuple[Any, ...]] = {}
        self._retried: dict[Actor, uuid.UUID] = {}
        #: Of what is held: its fence, and how many children it has.
        self._held: dict[tuple[uuid.UUID, Any], tuple[int, int]] = {}
        self._changes = -1
        self._ticks: promises.Ticks | None = None

    # Rules: what users do

    @initialize(program=_programs, plan=_plans)
    def begin(self, program: Any, plan: tuple[Overlap, CatchUp] | None) -> None:
        self.stage.plan = plan
        if plan is not None:
            self._ticks = promises.Ticks(self.stage.scheduled[plan])
        self._start(program)

    @precondition(lambda self: len(self.roots) < MOST_ROOTS)
    @rule(program=_programs)
    def start(self, program: Any) -> None:
        self._start(program)

    def _start(self, program: Any) -> None:
        self.roots.append(uuid.UUID(interpret.delay(program=program).id))

    @precondition(lambda self: _roots_of(*TASKS.values()) < MOST_ROOTS + MOST_KEYED + MOST_LIMITED)
    @rule(program=_keyed_programs, by=st.sampled_from(_LIMITED), number=st.integers(1, 3))
    def call_limited(self, program: Any, by: str, number: int) -> None:
        for _ in range(number):
            TASKS[by].delay(program=program)

    @precondition(lambda self: _roots_of(interpret) < MOST_ROOTS + MOST_KEYED)
    @rule(program=_keyed_programs, options=_conflicts, stops=_picks)
    def call_with_key(self, program: Any, options: dict[str, Any], stops: int) -> None:
        def call() -> None:
            _unless(
                DuplicateExecution,
                lambda: interpret.apply_async(kwargs={"program": program}, unique_key="k", **options),
            )

        self._spawn("caller", call, stops)

    @rule(pick=_picks, stops=_picks)
    def cancel(self, pick: int, stops: int) -> None:
        execution = self._execution(pick)
        self._spawn("cancel", lambda: api.cancel(execution, "a test"), stops)

    @rule(pick=_picks, stops=_picks)
    def send_event(self, pick: int, stops: int) -> None:
        execution, payload = self._execution(pick), Event.objects.count()
        self._spawn(
            "sender", lambda: _unless(ExecutionFinished, lambda: api.send_event(execution, EVENT, payload)), stops
        )

    @precondition(lambda self: Execution.objects.filter(parent=None, status__in=["failed", "cancelled"]).exists())
    @rule(pick=_picks, stops=_picks)
    def retry(self, pick: int, stops: int) -> None:
        execution = _at(list(Execution.objects.filter(parent=None).order_by("pk")), pick)
        actor = self._spawn("operator", lambda: _unless(RetryRefused, lambda: api.retry(execution)), 0)
        if actor is not None:
            self._retried[actor] = execution.pk
            actor.advance(stops)

    @precondition(
        lambda self: (
            len(self.roots) <= MOST_ROOTS and Execution.objects.filter(parent=None, finished_at__isnull=False).exists()
        )
    )
    @rule(pick=_picks, cut=_picks, stops=_picks)
    def fork(self, pick: int, cut: int, stops: int) -> None:
        """Run again from a step. Its source may be retried, and its children end, before, meanwhile and after."""
        source = _at(self.roots, pick)
        names = list(Step.objects.filter(execution=source).order_by("id").values_list("name", flat=True))
        if names:
            before = _at(names, cut)
            self._spawn(
                "fork",
                lambda: _unless(ActionRefused, lambda: self.roots.append(api.fork(source, before).pk)),
                stops,
            )

    @rule(pick=_picks, stops=_picks, tree=st.booleans())
    def hold(self, pick: int, stops: int, tree: bool) -> None:
        execution = self._execution(pick)
        self._spawn("holder", lambda: _unless(ActionRefused, lambda: api.hold(execution, "a test", tree)), stops)

    @precondition(lambda self: Execution.objects.held().exists())
    @rule(pick=_picks, stops=_picks)
    def release(self, pick: int, stops: int) -> None:
        execution = _at(list(Execution.objects.held().order_by("pk")), pick).pk
        self._spawn("releaser", lambda: api.release(execution), stops)

    @rule(is_paused=st.booleans(), by=st.sampled_from(["", "", *_LIMITED]), stops=_picks)
    def pause(self, is_paused: bool, by: str, stops: int) -> None:
        task = TASKS[by]
        act = (lambda: api.pause(task, "a test")) if is_paused else (lambda: api.unpause(task))
        self._spawn("pauser", act, stops)

    @precondition(lambda self: self._schedule() is not None)
    @rule(is_paused=st.booleans(), stops=_picks)
    def pause_schedule(self, is_paused: bool, stops: int) -> None:
        name = self.ticks.plan.name
        act = (lambda: api.pause_schedule(name)) if is_paused else (lambda: api.unpause_schedule(name))
        self._spawn("scheduler", act, stops)

    @precondition(lambda self: self._schedule() is not None)
    @rule(stops=_picks)
    def run_schedule(self, stops: int) -> None:
        # At no instant of its line: what is run now would be what ticks then.
        clock.shift(dt.timedelta(milliseconds=1))
        name = self.ticks.plan.name
        self._spawn("scheduler", lambda: _unless(ActionRefused, lambda: api.run_schedule(name)), stops)

    @precondition(lambda self: self._schedule() is not None)
    @rule(ticks=st.sampled_from([1, 1, 1, 3]))
    def wait_for_tick(self, ticks: int) -> None:
        row = self._schedule()
        assert row is not None
        seconds = promises.seconds_to_next(row) + 60 * (ticks - 1)
        if seconds > 0:
            clock.shift(dt.timedelta(seconds=seconds))
        self._spawn("sweeper", sweeper.sweep, 12)

    # Rules: what workers do

    @precondition(lambda self: self.world.messages and len(self.world.actors) < MOST_ACTORS)
    @rule(pick=_picks, stops=_picks)
    def deliver(self, pick: int, stops: int) -> None:
        self.world.deliver(pick % len(self.world.messages)).advance(stops)

    @precondition(lambda self: self.world.actors)
    @rule(pick=_picks, stops=st.integers(1, 6))
    def advance(self, pick: int, stops: int) -> None:
        _at(self.world.actors, pick).advance(stops)

    @precondition(lambda self: self.world.actors)
    @rule(pick=_picks)
    def finish(self, pick: int) -> None:
        _at(self.world.actors, pick).finish()

    @precondition(lambda self: self.world.messages and len(self.world.actors) < MOST_ACTORS)
    @rule()
    def work_off(self) -> None:
        """Let workers take what there is now, one after another."""
        for _ in range(len(self.world.messages)):
            self.world.deliver(0).finish()

    @rule(stops=_picks, audit=st.booleans())
    def sweep(self, stops: int, audit: bool) -> None:
        self._spawn("sweeper", lambda: sweeper.sweep(audit=audit), stops * 4)

    @precondition(lambda self: not self.world.actors)
    @rule()
    def sweep_alone(self) -> None:
        """Whoever waits for a place after that, while nobody else does anything, waits for one that is taken."""
        sweeper.sweep()
        wrong = list(promises.stranded())
        assert not wrong, "\n".join(wrong)

    @precondition(lambda self: any(actor.held for actor in self.world.actors))
    @rule(pick=_picks)
    def heartbeat(self, pick: int) -> None:
        renew(_at([actor for actor in self.world.actors if actor.held], pick))

    @rule(seconds=st.sampled_from([0.5, 1.6, 3.1, 5, 11]))
    def wait(self, seconds: float) -> None:
        clock.shift(dt.timedelta(seconds=seconds))

    @rule()
    def change_shutdown(self) -> None:
        self.world.is_draining = not self.world.is_draining

    # Rules: what goes wrong

    @precondition(lambda self: self.world.actors)
    @rule(pick=_picks, is_noticed=st.booleans(), stops=_picks)
    def kill(self, pick: int, is_noticed: bool, stops: int) -> None:
        """Kill a process; its worker may notice, and say so at once."""
        actor = _at(self.world.actors, pick)
        actor.kill()
        self.world.reap()
        execution_id = actor.execution_id
        if execution_id is not None and is_noticed:
            self._spawn("main", lambda: transitions.lose(execution_id, owner=actor.name), stops)

    @precondition(lambda self: any(actor.held for actor in self.world.actors))
    @rule(pick=_picks, stops=st.integers(0, 6))
    def overtake(self, pick: int, stops: int) -> None:
        """Freeze a run for longer than its lease; it wakes up when another one has come so far."""
        zombie = _at([actor for actor in self.world.actors if actor.held], pick)
        key = zombie.execution_id
        if not transitions.lose(key, owner=zombie.name):
            return
        if Execution.objects.filter(pk=key, status="queued").exists():
            clock.shift(dt.timedelta(seconds=61))  # the longest pause after a loss
            self.world.messages.append(key)
            self.world.deliver(-1).advance(stops)
        before = _written(key)
        zombie.finish()
        assert _written(key) == before, "a zombie has written"

    @precondition(lambda self: self.world.actors)
    @rule(pick=_picks)
    def lose_answer(self, pick: int) -> None:
        """The next COMMIT of an actor gets no answer."""
        _at(self.world.actors, pick).loses_answer = True

    @precondition(lambda self: self.world.messages)
    @rule(pick=_picks)
    def lose_message(self, pick: int) -> None:
        self.world.messages.pop(pick % len(self.world.messages))

    @precondition(lambda self: self.world.messages)
    @rule(pick=_picks)
    def double_message(self, pick: int) -> None:
        self.world.messages.append(_at(self.world.messages, pick))

    @rule(pick=_picks)
    def forge_message(self, pick: int) -> None:
        self.world.messages.append(self._execution(pick))

    @rule()
    def change_broker(self) -> None:
        self.world.is_broker_away = not self.world.is_broker_away
        dispatch.reset_breaker()

    # What holds at any time

    @invariant()
    def nothing_is_wrong(self) -> None:
        self._forget_retried(self.world.reap())
        changes = connection.connection.total_changes if connection.connection is not None else -1
        if changes == self._changes:
            return
        self._changes = changes
        wrong = invariants.violations()
        wrong += [f"{row} waits for nothing" for row in waiting_for_nothing(Execution.objects.all())]
        wrong += self._changed_decisions()
        wrong += self._begun_while_held()
        wrong += promises.limits_exceeded()
        wrong += self._ticks.mistakes() if self._ticks is not None else []
        # Else what a rule does to the lease of a process would meet none.
        running = Execution.objects.filter(status="running").values_list("lease_owner", flat=True)
        wrong += [f"{owner} is no process of the model" for owner in running if "/" in owner]
        assert not wrong, "\n".join(wrong)

    def _begun_while_held(self) -> Iterator[str]:
        before, self._held = self._held, {}
        for row in Execution.objects.held().annotate(number=Count("children")):
            now = (row.fence, row.number)
            self._held[row.pk, row.held_at] = now
            if before.get((row.pk, row.held_at), now) != now:
                yield f"A run of {row} has begun, or has stored children, while it was held: {before} {self._held}"

    def _changed_decisions(self) -> Iterator[str]:
        retried = set(self._retried.values())
        for step in Step.objects.exclude(status=StepStatus.PENDING).select_related("execution"):
            if step.execution.root_id in retried:
                continue
            now = (step.status, step.result, step.error, step.child_id, step.finished_at)
            before = self._decided.setdefault(step.pk, now)
            if now != before:
                yield f"The step {step} of {step.execution} was {before}, and is {now}"

    def _forget_retried(self, done: list[Actor]) -> None:
        for actor in done:
            if actor.error is not None:
                raise actor.error
            root_id = self._retried.pop(actor, None)
            if root_id is not None:
                for key in Step.objects.filter(execution__root_id=root_id).values_list("pk", flat=True):
                    self._decided.pop(key, None)

    # What holds at the end

    def teardown(self) -> None:
        try:
            if sys.exception() is None:
                self._settle()
        finally:
            self.world.end()

    def _settle(self) -> None:
        """Let nothing go wrong any more: then everything ends, and as it has to."""
        world = self.world
        world.is_draining = world.is_broker_away = False
        dispatch.reset_breaker()
        for actor in list(world.actors):
            actor.loses_answer = False
            actor.finish()
        for task in TASKS.values():
            api.unpause(task)
        if self._schedule() is not None:
            api.pause_schedule(self.ticks.plan.name)
        while held := Execution.objects.held().first():
            assert api.release(held)
        for _ in range(MOST_ROUNDS):
            self.nothing_is_wrong()
            found = sweeper.sweep(audit=True)
            assert not found["stranded"], "a wake-up was lost"
            wrong = list(promises.stranded())
            assert not wrong, "\n".join(wrong)
            for _ in range(len(world.messages)):
                world.deliver(0).finish()
            if not invariants.unsettled():
                break
            for step in Step.objects.filter(kind__in=_EVENTS, status=StepStatus.PENDING, deadline_at=None):
                _unless(ExecutionFinished, lambda step=step: api.send_event(step.execution_id, EVENT, "at last"))
            clock.shift(dt.timedelta(seconds=3))
        wrong = [*invariants.unsettled(), *invariants.violations(), *Oracle().mistakes()]
        assert not wrong, "\n".join(wrong)
        self._let_wait_no_more()

    def _let_wait_no_more(self) -> None:
        """What waits for the end of an execution of its schedule starts when all have ended."""
        row = self._schedule()
        if row is not None and row.waiting_instants:
            api.unpause_schedule(row.name)
            assert sweeper.sweep()["schedules"], f"{row.waiting_instants} of {row} wait for nothing"

    # Helpers

    @property
    def ticks(self) -> promises.Ticks:
        assert self._ticks is not None
        return self._ticks

    def _schedule(self) -> Schedule | None:
        return self._ticks.row() if self._ticks is not None else None

    def _spawn(self, name: str, act: Callable[[], Any], stops: int) -> Actor | None:
        if len(self.world.actors) >= MOST_ACTORS:
            return None
        actor = self.world.spawn(name, act)
        actor.advance(stops)
        return actor

    def _execution(self, pick: int) -> uuid.UUID:
        return _at(
            list(
                Execution.objects.order_by("depth", "parent_id", "step", "position", "pk").values_list("pk", flat=True)
            ),
            pick,
        )


def _at(items: list[Any], pick: int) -> Any:
    return items[pick % len(items)]


def _roots_of(*tasks: Any) -> int:
    return Execution.objects.filter(parent=None, task__in=[task.name for task in tasks]).count()


def _unless(refusal: type[Exception], act: Callable[[], Any]) -> Any:
    try:
        return act()
    except refusal:
        return None


def _written(key: uuid.UUID) -> list[Any]:
    """Return what runs of an execution write."""
    written: list[Any] = []
    for rows in (
        Execution.objects.filter(pk=key),
        Step.objects.filter(execution=key),
        Execution.objects.filter(parent=key),
    ):
        written += rows.order_by("pk").values_list()
    return written


def _empty_tables() -> None:
    for model in (
        Attempt,
        Event,
        CopiedOutcome,
        PausedTask,
        Place,
        LimitKey,
        Schedule,
        Step,
        FailedExecution,
        Fork,
        TaskResult,
    ):
        model.objects.all()._raw_delete("default")
    for depth in sorted(set(Execution.objects.values_list("depth", flat=True)), reverse=True):
        Execution.objects.filter(depth=depth)._raw_delete("default")
    history.forget()


@pytest.mark.timeout(0)
def test_whatever_happens_each_execution_ends_once_and_as_its_program_says(stage: Stage) -> None:
    Machine.stage = stage
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not IS_THOROUGH,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
