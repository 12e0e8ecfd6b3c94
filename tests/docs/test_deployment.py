"""What the page on deployment says about connections and probes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from django.db import OperationalError

from conductor_app import transitions
from conductor_app.host import inline
from conductor_app.models import Execution
from project.celery import app
from tests.app.scenarios import echo
from tests.docs.pages import blocks
from tests.docs.test_examples import check_command


@pytest.mark.django_db
def test_a_kept_connection_that_died_between_two_runs_costs_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = Execution.objects.get(pk=echo.delay(value=1).id)
    claim, claims = transitions.claim, []

    def first_on_a_dead_connection(*args: Any) -> Any:
        claims.append(args)
        if len(claims) == 1:
            raise OperationalError("the connection is closed")
        return claim(*args)

    monkeypatch.setattr(transitions, "claim", first_on_a_dead_connection)
    inline.run_once(execution, app)
    execution.refresh_from_db()
    assert execution.status == "succeeded"


def test_each_command_of_kubernetes_exists_with_its_options() -> None:
    found = []
    for block in blocks("docs/howto/deployment.md"):
        if block.language == "yaml":
            for words in re.findall(r"command: (\[.*\])", block.text):
                found.append(" ".join(json.loads(words)))
                check_command(found[-1], str(block))
    assert any("conductor alive" in command for command in found)
