"""Threats that no other test is about; docs/explanation/security.md says where each of them is tested."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import current_app
from kombu.exceptions import ContentDisallowed
from kombu.serialization import dumps as encode
from kombu.serialization import loads as decode

import conductor_app
from conductor_app import ExecutionContext, api, durable_task
from conductor_app.exceptions import UnknownTask
from conductor_app.models import Execution, FailedExecution
from conductor_app.tasks.own import find
from conductor_app.testing import drain
from tests.support.executions import queued

pytestmark = pytest.mark.django_db

ROOT = Path(conductor_app.__file__).parents[1]
PAGE = ROOT / "docs/explanation/security.md"
#: What must not be found where it does not belong.
CANARY = "canary-5f1c9e"
HOSTILE = f"{CANARY}\r\n[2026-01-01 00:00:00: CRITICAL/Main] all is lost \x1b[31m\u202e"


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_in_a_message_is_not_loaded() -> None:
    """The worker decodes with ``accept_content``; an app that accepts pickles is told so by a system check."""
    content_type, content_encoding, body = encode(_Bomb(), serializer="pickle")
    with pytest.raises(ContentDisallowed):
        decode(body, content_type, content_encoding, accept=current_app.conf.accept_content)


def test_the_values_of_variables_are_in_no_traceback_and_no_error() -> None:
    @durable_task(name="tests.security.leaks", max_retries=0)
    def leaks(ctx: ExecutionContext, password: str) -> None:
        secret = password.upper()
        raise ValueError(f"refused, {len(secret)} characters")

    root = leaks.delay(password=CANARY)
    drain()
    failure = FailedExecution.objects.get(pk=root.id)
    assert "refused, 13 characters" in failure.message
    assert "leaks" in failure.traceback
    for text in (failure.message, failure.traceback):
        assert CANARY.upper() not in text
        assert CANARY not in text


@pytest.mark.django_db(transaction=True)  # lines are written after the commit
def test_no_log_line_of_ours_has_a_payload_or_a_result(caplog: pytest.LogCaptureFixture) -> None:
    @durable_task(name="tests.security.discreet", max_retries=0)
    def discreet(ctx: ExecutionContext, card: str) -> str:
        ctx.step("charge", lambda: card)
        return card

    with caplog.at_level(logging.DEBUG, logger="conductor_app"):
        root = discreet.delay(card=CANARY)
        drain()
    assert api.get_result(root, timeout=0) == CANARY
    ours = [record for record in caplog.records if record.name.startswith("conductor_app")]
    assert ours
    assert not [record for record in ours if CANARY in record.getMessage()]


@pytest.mark.django_db(transaction=True)
def test_a_hostile_error_is_one_line_in_our_log(caplog: pytest.LogCaptureFixture) -> None:
    @durable_task(name="tests.security.hostile", max_retries=1, default_retry_delay=0, retry_backoff=False)
    def hostile(ctx: ExecutionContext) -> None:
        raise ValueError(HOSTILE)

    @durable_task(name="tests.security.victim", max_retries=0)
    def victim(ctx: ExecutionContext) -> None:
        ctx.invoke("child", hostile)

    with caplog.at_level(logging.DEBUG, logger="conductor_app"):
        root = victim.delay()
        drain()
    assert Execution.objects.get(pk=root.id).status == "failed"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("conductor_app")]
    assert any(CANARY in line for line in ours), "Nothing says why it failed"
    assert not [line for line in ours if re.search(r"[\r\n\x00-\x08\x1b\u202e]", line)]


def test_the_engine_marks_nothing_safe_and_imports_nothing_by_name() -> None:
    """HTML is built by ``format_html`` and templates; a name from a row or a message is looked up, not imported."""
    forbidden = re.compile(
        r"\bmark_safe\b|\|\s*safe\b|\bautoescape off\b|\bimport_string\(|\b(pickle|yaml)\.|\beval\(|\bexec\("
    )
    root = ROOT / "conductor_app"
    # What ``scopes`` imports is named by a setting.
    files = [path for path in root.rglob("*") if path.suffix in {".py", ".html"} and path.name != "scopes.py"]
    assert len(files) > 40
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line.partition("#")[0])
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", ["this.s", "antigravity.fly_unittest", "os.no_such", "no.such", "tasks", "", ".", "..x"]
)
def test_a_stored_path_imports_no_module_that_is_not_the_projects(path: str) -> None:
    assert not {"this", "antigravity"} & set(sys.modules)
    with pytest.raises(UnknownTask, match="CELERY_IMPORTS"):
        find(path)
    assert not {"this", "antigravity"} & set(sys.modules)


def test_a_stored_path_finds_what_installed_apps_have_and_nothing_that_a_module_makes_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "conductor_app.management.subcommands.prune"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert find(f"{name}.Prune") is sys.modules[name].Prune
    for lazy in ("conductor_app.ChildFailed", "conductor_app.management.no_such.thing"):
        vars(conductor_app).pop("ChildFailed", None)
        with pytest.raises(UnknownTask):
            find(lazy)


def test_who_may_only_see_executions_can_do_nothing_to_them(client: Any, django_user_model: Any) -> None:
    """A POST that would change or delete a row in any other admin does not, whoever sends it."""
    django_user_model.objects.create_superuser("root", "root@example.com", "x")
    client.login(username="root", password="x")
    execution = queued()
    before = Execution.objects.values().get(pk=execution.pk)
    url = f"/admin/conductor_app/execution/{execution.pk}/change/"
    assert client.post(url, {"status": "succeeded", "payload": "[]"}).status_code == 403
    assert client.post(url.replace("change", "delete"), {"post": "yes"}).status_code == 403
    assert Execution.objects.values().get(pk=execution.pk) == before


def test_each_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) > 20
    missing = []
    for file, name in named:
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text()):
            missing.append(f"{file}::{name}")
    assert not missing, "\n".join(missing)
