"""The cookbook: short, each with a test beside it; and the bank's page does what it says, on the pages of the admin."""

from __future__ import annotations

import ast
import uuid
from pathlib import Path
from typing import Any

import pytest

from conductor_app.engine import claims, sweeper
from conductor_app.engine.run import RunEnded
from conductor_app.models import Execution
from tests.docs.pages import ROOT, Block, blocks, read
from tests.docs.session import session

PAGES = sorted(str(path.relative_to(ROOT)) for path in Path(ROOT, "docs/cookbook").glob("*.md"))
BANK = "docs/cookbook/bank.md"
#: Lines of code, without empty ones.
SHORT, TEN_OR_SO = 40, 13


def shown(page: str, path: str) -> Block:
    return next(block for block in blocks(page) if block.path.startswith(path))


def lines(block: Block) -> int:
    return len([line for line in block.text.splitlines() if line.strip()])


@pytest.mark.parametrize("page", PAGES)
def test_each_is_short_and_has_its_test_beside_it(page: str) -> None:
    code, test = shown(page, "shop/tasks.py"), shown(page, "shop/tests/")
    assert lines(code) < SHORT
    assert lines(test) < SHORT
    tests = [node.name for node in ast.parse(test.text).body if isinstance(node, ast.FunctionDef)]
    assert any(name.startswith("test_") for name in tests)
    assert page.removeprefix("docs/") in read("docs/README.md")


@pytest.mark.django_db(transaction=True)
def test_the_banks_limits_take_ten_lines_and_are_seen_in_the_admin(admin_client: Any) -> None:
    code = shown(BANK, "shop/tasks.py")
    assert lines(code) - len([line for line in code.text.splitlines() if line.startswith(("#", "from"))]) <= TEN_OR_SO
    with session() as run:
        for block in blocks(BANK):
            if block.path and "tests" not in block.path:
                run.run(block)
        exec("from shop import tasks", run.namespace)
        tasks = run.namespace["tasks"]
        calls = [tasks.fetch.delay("a-1", day) for day in range(5)]
        syncs = [tasks.sync.delay("c-1") for _ in range(2)]
        for task, result in [*((tasks.fetch, one) for one in calls), *((tasks.sync, one) for one in syncs)]:
            # As workers that begin them all at once.
            try:
                claims.take(task, uuid.UUID(result.id), "w@h")
            except RunEnded:
                assert Execution.objects.get(pk=result.id).is_parked
        sweeper.sweep()
        limits = "/admin/conductor_app/execution/limits/"
        keys = {(key["limit"], key["key"]): key for key in admin_client.get(f"{limits}json/").json()["limits"]}
        assert (keys["bank", "a-1"]["taken"], keys["bank", "a-1"]["parked"]) == (3, 2)
        assert (keys["customer", "c-1"]["taken"], keys["customer", "c-1"]["parked"]) == (1, 1)
        page = admin_client.get(limits).content.decode()
        assert "3 of 3 run" in page
        assert "bank-api" in page
        schedules = admin_client.get("/admin/conductor_app/schedule/").content.decode()
        assert "shop.tasks.nightly" in schedules
        assert "0 2 * * *" in schedules
        waiting = admin_client.get(f"/admin/conductor_app/execution/{calls[-1].id}/change/").content.decode()
        assert "a-1" in waiting
        assert "bank" in waiting
