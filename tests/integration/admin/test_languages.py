"""The admin in other languages: what people read is translated, what programs read stays as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache
from django.test import Client
from django.utils import translation

from conductor_app import api, transitions
from conductor_app.admin import selection
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, Operation, OperationItem
from tests.integration.admin.test_actions import ask, confirm, failed, post, said
from tests.support import executions
from tests.support.command import told
from tests.support.process import note_published
from tests.unit.test_catalogues import entries

BASE = "/admin/conductor_app"
LOCALE = "django.middleware.locale.LocaleMiddleware"
#: What the pages of executions say in each language.
WORDS = {
    "de": ("Übersicht", "Ausführung", "fehlgeschlagen", "Warteschlange", "Schritt"),
    "es": ("Resumen", "ejecución", "fallida", "cola", "paso"),
}


@pytest.fixture(autouse=True)
def _published(db: None, settings: Any) -> Iterator[None]:
    note_published()
    cache.clear()
    middleware = list(settings.MIDDLEWARE)
    middleware.insert(1 + middleware.index("django.contrib.sessions.middleware.SessionMiddleware"), LOCALE)
    settings.MIDDLEWARE = middleware
    yield
    # The middleware leaves the language of the last request.
    translation.deactivate()


def browser(language: str) -> Client:
    user, _ = User.objects.get_or_create(username="ana", is_staff=True, is_superuser=True)
    client = Client(headers={"accept-language": language})
    client.force_login(user)
    return client


@pytest.fixture
def rows() -> dict[str, Execution]:
    """An execution of each sort."""
    parent, child = executions.family()
    transitions.fail(child, Failure(type="shop.Declined", message="no funds", traceback="T"))
    nested = executions.running()
    transitions.record_step(nested, "look", result="1")
    listening = executions.running()
    api.send_event(listening, "approved", "yes", id="mail-7")
    lone = failed()
    api.retry(failed(), actor="ana", reason="stock is back")
    api.cancel(executions.queued(), reason="wrong order")
    return {
        "parent": executions.fresh(parent),
        "child": executions.fresh(child),
        "nested": nested,
        "listening": listening,
        "asleep": executions.napping(),
        "failed": lone,
    }


def read(client: Client, address: str) -> str:
    answer = client.get(f"{BASE}/{address}")
    assert answer.status_code == 200, address
    text = answer.content.decode()
    # What stands on the page, without styles and the classes that they go by.
    return html.unescape(re.sub(r"(?s)<style.*?</style>|<[^>]*>", "\n", text))


def addresses(rows: dict[str, Execution]) -> list[str]:
    lists = ["", *(f"{name}/" for name in ("execution", "step", "event", "failedexecution", "operation"))]
    pages = [f"execution/{name}/" for name in ("overview", "slow", "workers")]
    changes = [f"execution/{row.pk}/change/" for row in rows.values()]
    compared = f"execution/{rows['failed'].pk}/compare/?with={rows['child'].pk}"
    operation = f"operation/{Operation.objects.first().pk}/change/"  # type: ignore[union-attr]
    return [*lists, *pages, *changes, compared, operation]


@pytest.mark.parametrize("language", sorted(WORDS))
def test_pages_are_in_the_language_that_a_browser_asks_for(language: str, rows: dict[str, Execution]) -> None:
    client = browser(language)
    texts = {address: read(client, address) for address in addresses(rows)}
    whole = "\n".join(texts.values())
    assert [word for word in WORDS[language] if word not in whole] == []
    # Whole phrases of the source are not left anywhere: words alone can be names, or the same in both languages.
    known = entries(language)
    translated = {text for entry in known for text in entry.translations}
    phrases = [entry.message for entry in known if " " in entry.message and "%" not in entry.message]
    for address, text in texts.items():
        assert "%(" not in text, address
        assert [phrase for phrase in phrases if phrase not in translated and f"\n{phrase}\n" in text] == [], address


@pytest.mark.parametrize("language", sorted(WORDS))
def test_classes_of_the_stylesheets_are_the_same_in_every_language(language: str, rows: dict[str, Execution]) -> None:
    def classes(client: Client, address: str) -> set[str]:
        text = client.get(f"{BASE}/{address}").content.decode()
        return {name for names in re.findall(r'class="([^"]*)"', text) for name in names.split() if "cd-" in name}

    for address in ("execution/", "step/", *(f"execution/{row.pk}/change/" for row in rows.values())):
        assert classes(browser(language), address) == classes(browser("en"), address)


@pytest.mark.parametrize("language", sorted(WORDS))
def test_what_programs_read_is_the_same_in_every_language(language: str, rows: dict[str, Execution]) -> None:
    def plain(value: Any) -> Any:
        """Without sentences, and without what goes by the clock."""
        if isinstance(value, dict):
            apart = ("headline", "hints", "text", "read_at", "ran_seconds", "age_seconds")
            return {name: plain(inner) for name, inner in value.items() if name not in apart}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    lists = [f"{name}/json/" for name in ("execution", "step", "event", "failedexecution", "operation")]
    pages = [f"execution/{name}/json/" for name in ("overview", "slow", *(row.pk for row in rows.values()))]
    for address in (*lists, *pages):
        here, there = (browser(one).get(f"{BASE}/{address}").json() for one in (language, "en"))
        assert plain(here) == plain(there), address
    document = browser(language).get(f"{BASE}/execution/{rows['parent'].pk}/json/").json()
    assert document["headline"] != browser("en").get(f"{BASE}/execution/{rows['parent'].pk}/json/").json()["headline"]
    for words in (["ls"], ["show", rows["parent"].pk], ["show", rows["failed"].pk], ["operations"]):
        translation.activate("en")
        expected = told(*words, "--json").json
        translation.activate(language)
        assert plain(told(*words, "--json").json) == plain(expected), words


def test_what_is_stored_is_not_in_the_language_of_whoever_acted() -> None:
    """Others read it in theirs."""
    client, row, other = browser("de"), executions.running(), executions.queued()
    asked = ask(client, "cancel", row.pk, other.pk)
    transitions.succeed(row, "1")
    assert said(confirm(client, asked)) == "1 abgebrochen, 1 übersprungen: schon beendet."
    assert set(OperationItem.objects.values_list("message", flat=True)) == {"", "ended already"}
    assert said(post(client, "cancel", row.pk)) == "Es wurde nichts getan: schon beendet."


def test_filters_are_stored_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "AT_ONCE", 1)
    client = browser("de")
    rows = [failed() for _ in range(3)]
    asked = ask(client, "retry", rows[0].pk, query="?status__exact=failed", select_across="1")
    answer = confirm(client, asked)
    operation = Operation.objects.get()
    assert operation.filters == "status: failed"
    assert said(answer).startswith(f"Wiederholung {operation.pk} hat begonnen, mit 3 Ausführungen.")
