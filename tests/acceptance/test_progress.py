"""What a body tells is there while it runs, and a run that has lost its lease tells nothing."""

from __future__ import annotations

from typing import Any

from conductor_app import api
from tests.app import telling
from tests.app.ledger import count, note
from tests.support.polling import wait_until
from tests.support.watching import frozen, wait_for_body


def test_what_a_body_tells_is_seen_while_it_runs_and_at_its_end(worker: Any) -> None:
    worker()
    result = telling.tells.delay()
    wait_until(lambda: api.state(result).done, 40)
    state = api.state(result)
    assert (state.status, state.done, state.total, state.note) == ("running", 1, 3, "begun")
    note(None, "go")
    assert api.get_result(result, timeout=40) == "done"
    state = api.state(result)
    assert (state.status, state.done, state.note, state.published) == ("succeeded", 3, "rested", {"receipt": {"id": 7}})


def test_a_zombie_cannot_tell(worker: Any) -> None:
    zombie = worker()
    result = telling.tells_late.delay()
    wait_for_body(telling.tells_late)
    wait_until(lambda: api.state(result).done == 1, 20)
    with frozen(zombie):
        worker()
        assert api.get_result(result, timeout=60) == 2
    note(None, "go")
    wait_until(lambda: count("refused"), 40, message="The zombie's call did not come")
    assert (api.state(result).done, api.state(result).note) == (2, "attempt 2")
