"""``conductor operations``, ``--as``, ``--reason`` and ``--background``."""

from __future__ import annotations

import getpass
from typing import Any

import pytest

from conductor_app import api
from conductor_app.engine import sweeper
from conductor_app.management.subcommands import acting
from conductor_app.models import Execution, Operation, OperationItem
from conductor_app.states import OperationSource
from conductor_app.store.process import process
from tests.integration.test_acting import failed
from tests.support.command import told
from tests.support.executions import TASK, fresh, napping, queued
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _broker(monkeypatch: pytest.MonkeyPatch) -> None:
    process.broker = NotingBroker()
    monkeypatch.setattr(getpass, "getuser", lambda: "deploy")


def test_a_command_acts_for_the_user_of_the_operating_system() -> None:
    row = failed()
    assert told("retry", row.pk).code == 0
    operation = Operation.objects.get()
    assert (operation.actor, operation.reason, operation.source) == ("deploy", "", OperationSource.COMMAND)
    assert "retried by deploy" in told("show", row.pk).out


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no user"), ImportError("pwd")])
def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def nobody() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert told("cancel", queued().pk).code == 0
    assert Operation.objects.get().actor.startswith("uid ")


@pytest.mark.parametrize(
    ("words", "arrange"),
    [
        (["retry"], failed),
        (["rerun"], failed),
        (["cancel"], queued),
        (["wake"], lambda: napping(3_600)),
        (["publish"], queued),
        (["send"], queued),
    ],
)
def test_each_command_tells_who_and_why(words: list[str], arrange: Any) -> None:
    row = arrange()
    event = ["approved"] if words == ["send"] else []
    assert told(*words, row.pk, *event, "--as", "ana", "--reason", "stock is back").code == 0
    operation = Operation.objects.get()
    assert (operation.kind, operation.actor, operation.reason) == (words[0], "ana", "stock is back")
    (shown,) = told("show", row.pk, "--json").json["operations"]
    assert (shown["kind"], shown["actor"], shown["reason"]) == (words[0], "ana", "stock is back")
    assert shown["source"] == "command"


def test_a_name_that_cannot_be_stored_is_a_wrong_call() -> None:
    row = queued()
    answer = told("cancel", row.pk, "--as", "a" * 151)
    assert (answer.code, "at most 150 characters" in answer.error) == (2, True)
    assert fresh(row).cancel_requested_at is None


def test_several_ids_are_one_operation_with_what_was_refused() -> None:
    rows, gone = [failed(), queued()], "01a204f6-723a-74c3-823f-e677cee24b51"
    assert told("retry", *(row.pk for row in rows), gone).code == 1
    operation = Operation.objects.get()
    assert (operation.total, operation.done, operation.refused, operation.gone) == (3, 1, 1, 1)


def test_in_the_background_workers_do_it() -> None:
    rows, other = [failed() for _ in range(3)], queued()
    answer = told("retry", "--task", "echo", "--status", "failed", "--background", "--reason", "stock is back")
    operation = Operation.objects.get()
    assert answer.out.startswith(f"Operation {operation.pk} has begun, on 3 executions.")
    assert (operation.filters, operation.finished_at) == ("status failed, task echo", None)
    assert {fresh(row).status for row in rows} == {"failed"}
    assert "3 to come" in told("operations", "--going-on").out
    sweeper.sweep()
    assert {fresh(row).status for row in rows} == {"queued"}
    assert not OperationItem.objects.filter(execution=other).exists()
    shown = told("operations", operation.pk).out
    assert f"Operation {operation.pk}: retry by deploy: stock is back" in shown
    assert "3 retried: 3 go on." in shown
    assert told("operations", "--going-on").out.strip() == "No operation."


def test_many_are_left_to_the_workers_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acting, "AT_ONCE", 3)
    for _ in range(5):
        queued()
    answer = told("cancel", "--task", TASK, "--limit", "4", "--json").json
    assert answer == {"ok": True, "operation": Operation.objects.get().pk, "total": 4}
    assert not Execution.objects.filter(cancel_requested_at__isnull=False).exists()


def test_a_rerun_of_many_is_no_danger_in_the_background() -> None:
    for _ in range(3):
        failed()
    assert told("rerun", "--status", "failed", "--background", "-q").out.strip() == str(Operation.objects.get().pk)
    sweeper.sweep()
    assert Execution.objects.count() == 6


def test_nothing_that_matches_is_said() -> None:
    assert "Nothing was done" in told("retry", "--task", "echo", "--background").out


@pytest.mark.parametrize(
    "words", [["retry", "01a204f6-723a-74c3-823f-e677cee24b51", "--background"], ["retry", "--background"]]
)
def test_the_background_takes_filters(words: list[str]) -> None:
    assert told(*words).code == 2
    assert not Operation.objects.exists()


def test_a_dry_run_begins_nothing() -> None:
    failed()
    assert "would be retried" in told("retry", "--status", "failed", "--background", "--dry-run").out
    assert not Operation.objects.exists()


# ---------------------------------------------------------------------------------------------------------- operations


def test_an_operation_is_stopped() -> None:
    row = failed()
    told("retry", "--status", "failed", "--background")
    key = Operation.objects.get().pk
    assert told("operations", "--stop", key).out.strip() == (
        f"Operation {key} is stopped. 0 retried; 1 stopped before their turn."
    )
    answer = told("operations", "--stop", key, "--json").json
    assert (answer["stopped_now"], answer["results"]["stopped"]) == (False, 1)
    sweeper.sweep()
    assert fresh(row).status == "failed"


def test_the_list_is_newest_first_and_bounded() -> None:
    for name in ("ana", "bob", "cara"):
        api.cancel(queued(), actor=name, reason=f"{name} says so")
    lines = told("operations", "--limit", 2).out.splitlines()
    assert len(lines) == 3
    assert "cara says so" in lines[1]
    assert "1 cancelled" in lines[2]
    document = told("operations", "--json").json
    assert [row["actor"] for row in document["operations"]] == ["cara", "bob", "ana"]


def test_the_document_of_one_has_each_execution() -> None:
    row = failed()
    created = api.rerun(row, actor="ana")
    document = told("operations", Operation.objects.get().pk, "--json").json
    (item,) = document["items"]
    assert (item["execution"], item["created"], item["status"]) == (str(row.pk), str(created.pk), "queued")
    assert document["text"] == "1 run again as new: 1 go on."


def test_a_followed_one_ends_when_all_that_it_has_done_has_ended() -> None:
    api.cancel(queued(), actor="ana")
    key = Operation.objects.get().pk
    assert "1 cancelled" in told("operations", key, "--watch").out


@pytest.mark.parametrize(
    "words", [["--watch"], ["7", "--stop", "7"], ["7", "--watch", "--json"], ["x"], ["--stop", "0"]]
)
def test_a_wrong_call_is_said(words: list[str]) -> None:
    assert told("operations", *words).code != 0


def test_one_that_is_not_there_is_said() -> None:
    answer = told("operations", "77")
    assert (answer.code, answer.error) == (1, "There is no operation 77. It may have been pruned.")
    assert told("operations", "--stop", "77").code == 1
