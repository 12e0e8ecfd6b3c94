"""``conductor fork``: run again from a step, from the command line."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from conductor_app import ExecutionContext, api
from conductor_app.models import Execution, Fork, OperationItem
from tests.app import scenarios
from tests.support.bodies import durable, run
from tests.support.command import told
from tests.support.process import note_published

NOBODY = "00000000-0000-7000-8000-000000000000"


@pytest.fixture(autouse=True)
def published(db: None) -> list[uuid.UUID]:
    return note_published()


@durable
def ordered(ctx: ExecutionContext, order: int = 1) -> Any:
    ctx.step("check", str, "checked")
    ctx.invoke("charge", scenarios.echo, {"value": order})
    return ctx.step("notify", str, "notified")


def test_a_fork_is_started_and_named() -> None:
    source = run(ordered)
    answer = told("fork", source.pk, "--before", "charge", "--payload", '{"order": 2}', "--as", "ana", "--reason", "x")
    assert answer.code == 0
    fork = Execution.objects.get(fork__forked_from=source)
    assert f"The new execution is {fork.pk}." in answer.out
    assert (fork.fork.before, fork.kwargs) == ("charge", {"order": 2})
    item = OperationItem.objects.get()
    assert (item.operation.actor, item.operation.reason, item.created_id) == ("ana", "x", fork.pk)
    assert told("fork", source.pk, "--before", "charge", "-q").out.strip() != str(fork.pk)
    found = told("show", fork.pk, "--json").json
    assert found["execution"]["forked_from"] == str(source.pk)
    assert found["execution"]["forked_before"] == "charge"
    assert [step["copied"] for step in found["steps"]] == [True]
    shown = told("show", fork.pk).out
    assert f'{source.pk}, before step "charge"' in shown
    assert "copied" in shown
    forks = told("show", source.pk, "--json").json["execution"]["forks"]
    assert {"execution": str(fork.pk), "before": "charge"} in forks
    assert len(forks) == 2


def test_a_dry_run_says_what_is_kept_and_what_runs_again() -> None:
    source = run(ordered)
    answer = told("fork", source.pk, "--before", "charge", "--dry-run", "--json")
    (only,) = answer.json["results"]
    assert (only["outcome"], only["kept"], only["again"]) == ("would be forked", ["check"], ["charge", "notify"])
    assert only["message"] == "Kept: check. Runs again: charge, notify, and what follows."
    refused = told("fork", source.pk, "--before", "chrage", "--dry-run")
    assert refused.code == 1
    assert 'Did you mean "charge"?' in " ".join(refused.out.split())
    assert told("fork", source.pk, "--before", "charge", "--dry-run", "--payload", '{"oder": 1}').code == 2
    assert not Fork.objects.exists()


def test_what_is_impossible_is_told() -> None:
    source = run(ordered)
    answer = told("fork", source.pk, NOBODY, "--before", "chrage", "--json")
    assert answer.code == 1
    assert [one["outcome"] for one in answer.json["results"]] == ["refused", "not found"]
    assert "--before" in told("fork", source.pk).error
    wrong = told("fork", source.pk, "--before", "charge", "--payload", '{"oder": 1}')
    assert wrong.code == 2
    assert "does not fit" in wrong.error
    assert not Fork.objects.exists()


def test_filters_choose_as_for_a_rerun() -> None:
    rows = [run(ordered) for _ in range(2)]
    assert told("fork", "--task", ordered.name, "--before", "notify").code == 0
    assert {fork.forked_from_id for fork in Fork.objects.all()} == {row.pk for row in rows}
    assert api.find(rows[0]).forks.count() == 1
