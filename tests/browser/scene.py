"""A shop in trouble, as rows: what an operator finds in the admin on a bad morning. No body runs.

Two workers; an hour of orders, tagged by tenant; a card charge that has been slow for ten minutes, with orders waiting
for it; failures of one cause since a deployment; an order that failed twice, was retried and succeeded; one that
somebody has cancelled; one that waits for a person, one that sleeps, one that is scheduled.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone

from conductor_app.exceptions import Failure
from conductor_app.models import Attempt, Execution, FailedExecution, Operation, OperationItem, Step, Tag, Worker
from conductor_app.store.ids import derive_child_id, first_at
from conductor_app.values.failures import dump_failure

WEB_1, WEB_2 = "celery@web-1/aaaaaaaa", "celery@web-2/bbbbbbbb"
TENANTS = ("acme", "globex", "initech")
FULFIL, VALIDATE, CHARGE = "shop.orders.fulfil", "shop.orders.validate", "shop.payments.charge"
PICK, SHIP = "shop.warehouse.pick_item", "shop.shipping.ship"
LONG_TASK = "warehouse.replenishment.suppliers.recalculate_safety_stock_levels_for_all_regions_and_seasons"
#: How many orders have failed since the deployment.
FAILURES = 37
DEPLOYMENT = Failure(
    type="builtins.KeyError",
    message="'currency'",
    traceback=(
        "Traceback (most recent call last):\n"
        '  File "/srv/shop/shop/shipping.py", line 41, in ship\n    label = carrier.book(order["currency"])\n'
        "KeyError: 'currency'\n"
    ),
)
TIMED_OUT = Failure(
    type="shop.bank.BankUnavailable",
    message="The bank did not answer in 30 s",
    traceback="Traceback …\nBankUnavailable\n",
)


@dataclass
class Scene:
    """The rows, written at once by ``save``."""

    now: dt.datetime = field(default_factory=timezone.now)
    executions: list[Execution] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    failures: list[FailedExecution] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    #: Executions that tests and people look for, by a name.
    known: dict[str, Execution] = field(default_factory=dict)
    number: int = 0

    def ago(self, minutes: float) -> dt.datetime:
        """Return an instant before now."""
        return self.now - dt.timedelta(minutes=minutes)

    def execution(
        self, task: str, at: dt.datetime, *, parent: Execution | None = None, step: str = "", **fields: Any
    ) -> Execution:
        """Add a queued execution."""
        self.number += 1
        if parent is None:
            key = first_at(at)
            key = type(key)(int=key.int + self.number)
        else:
            key = derive_child_id(parent.pk, f"{step}[{fields['position']}]" if "position" in fields else step)
        row = Execution(
            id=key,
            task=task,
            queue=fields.pop("queue", "payments" if task == CHARGE else "celery"),
            payload=json.dumps([[], fields.pop("payload", {"order_id": 1_000 + self.number})]),
            status="queued",
            max_attempts=4,
            parent_id=None if parent is None else parent.pk,
            root_id=key if parent is None else parent.root_id,
            depth=0 if parent is None else parent.depth + 1,
            step=step,
            created_at=at,
            due_at=at,
            dispatch_at=at + dt.timedelta(days=1),
            dispatches=1,
            **fields,
        )
        self.executions.append(row)
        return row

    def tag(self, root: Execution, **tags: str) -> None:
        """Tag a tree."""
        self.tags += [Tag(root_id=root.pk, key=key, value=value) for key, value in tags.items()]

    def run(
        self,
        row: Execution,
        begin: dt.datetime,
        end: dt.datetime,
        outcome: str,
        *,
        worker: str = f"{WEB_1}/11",
        step: str = "",
        failure: Failure | None = None,
    ) -> None:
        """Add a run that has ended."""
        row.fence += 1
        row.started_at = row.started_at or begin
        self.attempts.append(
            Attempt(
                execution_id=row.pk,
                attempt=row.attempt,
                run=row.fence,
                worker=worker,
                due_at=row.due_at or begin,
                started_at=begin,
                finished_at=end,
                outcome=outcome,
                step=step,
                **(
                    {}
                    if failure is None
                    else {"error_class": failure.type, "message": failure.message, "traceback": failure.traceback}
                ),
            )
        )

    def running(self, row: Execution, since: dt.datetime, worker: str) -> Execution:
        """Let a worker run it now."""
        row.status, row.fence, row.started_at = "running", row.fence + 1, row.started_at or since
        row.run_started_at, row.due_at, row.dispatch_at = since, None, None
        row.lease_owner, row.lease_expires_at = worker, self.now + dt.timedelta(days=1)
        return row

    def end(
        self,
        row: Execution,
        at: dt.datetime,
        status: str = "succeeded",
        result: Any = None,
        failure: Failure | None = None,
    ) -> Execution:
        """End it."""
        row.status, row.finished_at, row.due_at, row.dispatch_at = status, at, None, None
        row.result = json.dumps(result) if status == "succeeded" else None
        row.error = None if failure is None else dump_failure(failure)
        return row

    def wait(self, row: Execution, name: str, kind: str, since: dt.datetime, **fields: Any) -> Step:
        """Let it wait at a step."""
        row.status, row.due_at, row.dispatch_at = "waiting", None, None
        return self.step(row, name, kind, since, None, status="pending", **fields)

    def step(
        self, row: Execution, name: str, kind: str, begin: dt.datetime, end: dt.datetime | None, **fields: Any
    ) -> Step:
        """Add a step."""
        fields.setdefault("status", "succeeded")
        step = Step(
            execution_id=row.pk, name=name, kind=kind, fence=row.fence, created_at=begin, finished_at=end, **fields
        )
        self.steps.append(step)
        return step

    def fail(
        self, row: Execution, at: dt.datetime, failure: Failure, *, step: str = "", cause: Execution | None = None
    ) -> None:
        """Let it fail for good."""
        self.end(row, at, "failed", failure=failure)
        self.failures.append(
            FailedExecution(
                execution_id=row.pk,
                task=row.task,
                attempts=row.attempt,
                error_class=failure.type,
                message=failure.message,
                traceback=failure.traceback,
                step=step,
                root_cause_id=None if cause is None else cause.pk,
                failed_at=at,
            )
        )

    # ------------------------------------------------------------------------------------------------------- orders

    def child(
        self,
        parent: Execution,
        name: str,
        task: str,
        begin: dt.datetime,
        seconds: float,
        *,
        queued: float = 0.2,
        worker: str = f"{WEB_1}/12",
        step: str | None = None,
        **fields: Any,
    ) -> dt.datetime:
        """Add a child that has succeeded, and return when."""
        row = self.execution(task, begin, parent=parent, step=name, **fields)
        start = begin + dt.timedelta(seconds=queued)
        end = start + dt.timedelta(seconds=seconds)
        self.run(row, start, end, "succeeded", worker=worker)
        if task == CHARGE:
            self.step(
                row,
                "call-bank",
                "step",
                start,
                end - dt.timedelta(seconds=0.05),
                result=json.dumps({"reference": "R-1"}),
            )
        self.end(row, end, result={"ok": True})
        if "position" not in fields:
            self.step(parent, name, "invoke", begin, end, task=task, child_id=row.pk)
        return end

    def order(
        self, minutes: float, tenant: str, *, upto: str = "", charge_seconds: float = 0.8, worker: str = WEB_1
    ) -> tuple[Execution, dt.datetime]:
        """Add an order that has come as far as before a step; all of it by default."""
        at = self.ago(minutes)
        row = self.execution(FULFIL, at)
        number = str(1_000 + self.number)
        self.tag(row, tenant=tenant, order=number)
        now = at + dt.timedelta(seconds=0.1)
        for name, task, seconds in (
            ("validate", VALIDATE, 0.3),
            ("charge", CHARGE, charge_seconds),
            ("pick", PICK, 1.5),
            ("ship", SHIP, 0.6),
        ):
            if name == upto:
                return row, now
            self.run(row, now, now + dt.timedelta(seconds=0.05), "suspended", step=name, worker=f"{worker}/11")
            begin = now + dt.timedelta(seconds=0.05)
            if name == "pick":
                ends = [
                    self.child(
                        row, name, task, begin, seconds * (1 + place), step=name, position=place, worker=f"{worker}/12"
                    )
                    for place in range(3)
                ]
                now = max(ends)
                self.step(row, name, "map", begin, now, task=task, total=3, remaining=0)
            else:
                now = self.child(row, name, task, begin, seconds, worker=f"{worker}/12")
            row.due_at = now
            now += dt.timedelta(seconds=0.1)
        end = now + dt.timedelta(seconds=0.05)
        self.run(row, now, end, "succeeded", worker=f"{worker}/11")
        self.end(row, end, result={"status": "shipped", "parcel": f"PKG-{number}"})
        return row, end

    def save(self) -> None:
        """Write all rows."""
        Execution.objects.bulk_create(sorted(self.executions, key=lambda row: row.depth))
        Step.objects.bulk_create(self.steps)
        # In the order in which runs end, as workers write them.
        Attempt.objects.bulk_create(sorted(self.attempts, key=lambda attempt: attempt.finished_at))
        FailedExecution.objects.bulk_create(self.failures)
        Tag.objects.bulk_create(self.tags)


def play() -> Scene:
    """Write the rows, and return them."""
    scene = Scene()
    for number in range(36):
        scene.order(58 - 1.3 * number, TENANTS[number % 3], worker=(WEB_1, WEB_2)[number % 2])
    scene.known["worked"] = scene.order(15, "acme")[0]
    _failed_since_the_deployment(scene)
    _waiting_for_the_bank(scene)
    _retried(scene)
    _others(scene)
    _cancelled(scene)
    scene.save()
    _asked_for(scene)
    _workers(scene)
    return scene


def _failed_since_the_deployment(scene: Scene) -> None:
    for number in range(FAILURES):
        order, at = scene.order(22 - number / 4, TENANTS[number % 3], upto="ship")
        scene.run(order, at, at + dt.timedelta(seconds=0.05), "suspended", step="ship")
        ship = scene.execution(SHIP, at, parent=order, step="ship")
        for attempt in range(1, 5):
            ship.attempt = attempt
            begin = at + dt.timedelta(seconds=4 * attempt)
            scene.run(
                ship,
                begin,
                begin + dt.timedelta(seconds=0.1),
                "failed" if attempt == 4 else "retried",
                failure=DEPLOYMENT,
                worker=f"{WEB_2}/21",
            )
        end = at + dt.timedelta(seconds=17)
        scene.fail(ship, end, DEPLOYMENT)
        scene.step(order, "ship", "invoke", at, end, task=SHIP, child_id=ship.pk, status="failed")
        told = Failure(
            type="conductor_app.exceptions.ChildFailed",
            message="Child execution failed: KeyError: 'currency'",
            traceback=DEPLOYMENT.traceback,
        )
        order.due_at = end
        scene.run(order, end + dt.timedelta(seconds=0.1), end + dt.timedelta(seconds=0.15), "failed", failure=told)
        scene.fail(order, end + dt.timedelta(seconds=0.15), told, step="ship", cause=ship)
        scene.known["failed"] = order


def _waiting_for_the_bank(scene: Scene) -> None:
    for number in range(9):
        order, at = scene.order(10 - number, TENANTS[number % 3], upto="charge")
        scene.run(order, at, at + dt.timedelta(seconds=0.05), "suspended", step="charge", worker=f"{WEB_2}/22")
        charge = scene.execution(CHARGE, at, parent=order, step="charge")
        scene.wait(
            order,
            "charge",
            "invoke",
            at,
            task=CHARGE,
            child_id=charge.pk,
            timeout_seconds=600 if number else None,
            deadline_at=at + dt.timedelta(hours=2),
        )
        if number < 2:
            scene.running(charge, at + dt.timedelta(seconds=2), f"{WEB_1}/1{number + 1}")
            scene.step(
                charge,
                "find-card",
                "step",
                at + dt.timedelta(seconds=2),
                at + dt.timedelta(seconds=2.2),
                result='"card-7"',
            )
        elif number == 2:
            charge.attempt = 2
            scene.run(charge, at + dt.timedelta(seconds=1), at + dt.timedelta(seconds=31), "retried", failure=TIMED_OUT)
            charge.error, charge.due_at = dump_failure(TIMED_OUT), scene.now + dt.timedelta(minutes=2)
        scene.known.setdefault("stuck", order)
        scene.known.setdefault("slow child", charge)
    scene.known["queued order"] = order


def _retried(scene: Scene) -> None:
    order, at = scene.order(75, "globex", upto="charge")
    declined = Failure(type="shop.bank.Maintenance", message="closed until noon", traceback=TIMED_OUT.traceback)
    for attempt, begin in ((1, at), (2, at + dt.timedelta(seconds=30))):
        order.attempt = attempt
        scene.run(
            order, begin, begin + dt.timedelta(seconds=2), "failed" if attempt == 2 else "retried", failure=declined
        )
    begin = scene.ago(12)
    order.attempt, order.due_at = 1, begin
    scene.run(order, begin, begin + dt.timedelta(seconds=3), "succeeded", worker=f"{WEB_2}/21")
    scene.end(order, begin + dt.timedelta(seconds=3), result={"status": "shipped"})
    scene.known["retried"] = order


def _others(scene: Scene) -> None:
    asking = scene.execution("shop.orders.refund", scene.ago(95), payload={"order_id": 7, "amount": "219.90"})
    scene.tag(asking, tenant="acme", order="7")
    scene.run(asking, scene.ago(95), scene.ago(94.9), "suspended", step="approval")
    scene.wait(
        asking, "approval", "event", scene.ago(94.9), task="approved", deadline_at=scene.now + dt.timedelta(days=3)
    )
    scene.known["asking"] = asking
    asleep = scene.execution("shop.mail.remind_customer", scene.ago(40))
    scene.run(asleep, scene.ago(40), scene.ago(39.9), "suspended", step="a-day")
    scene.wait(asleep, "a-day", "sleep", scene.ago(39.9), deadline_at=scene.now + dt.timedelta(hours=23))
    later = scene.execution("shop.reports.send_daily_report", scene.ago(3))
    later.due_at = scene.now + dt.timedelta(hours=5)
    long = scene.execution(LONG_TASK, scene.ago(30), queue="warehouse-nightly")
    scene.known["long"] = scene.running(long, scene.ago(29), f"{WEB_2}/22")
    unserved = scene.execution("reports.exports.export_year", scene.ago(25), queue="reports")
    scene.known["unserved"] = unserved


def _cancelled(scene: Scene) -> None:
    order, at = scene.order(33, "initech", upto="charge")
    end = at + dt.timedelta(minutes=4)
    order.cancel_requested_at, order.cancel_reason = end, "customer called, wrong address"
    scene.known["cancelled"] = scene.end(order, end, "cancelled")


def _asked_for(scene: Scene) -> None:
    order = scene.known["cancelled"]
    end = order.finished_at
    operation = Operation.objects.create(
        kind="cancel",
        actor="ben",
        reason="customer called, wrong address",
        source="admin",
        created_at=end,
        finished_at=end,
        total=1,
        done=1,
    )
    OperationItem.objects.create(operation=operation, execution_id=order.pk, state="done", decided_at=end)
    retried = scene.known["retried"]
    operation = Operation.objects.create(
        kind="retry",
        actor="ana",
        reason="the bank is open again",
        source="command",
        created_at=scene.ago(12),
        finished_at=scene.ago(12),
        total=1,
        done=1,
    )
    OperationItem.objects.create(operation=operation, execution_id=retried.pk, state="done", decided_at=scene.ago(12))


def _workers(scene: Scene) -> None:
    for number, (key, release) in enumerate(((WEB_1, "shop 2026.11.2"), (WEB_2, "shop 2026.11.1"))):
        Worker.objects.create(
            id=key,
            name=key.partition("/")[0],
            host=f"web-{number + 1}.internal",
            pid=4_000 + number,
            pool="prefork",
            slots=2,
            queues=json.dumps(["celery", "payments"] if not number else ["celery", "warehouse-nightly"]),
            package="0.9.0",
            celery="5.7.0",
            django="5.2.19",
            python="3.11.9",
            release=release,
            started_at=scene.ago(200 - 179 * number),
            seen_at=scene.now + dt.timedelta(days=1),
        )
