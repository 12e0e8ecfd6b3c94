"""Who may see the lists, and not payloads, cannot tell two of them apart: nor two results, errors or events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.cache import cache
from django.test import Client, RequestFactory, override_settings
from django.urls import clear_url_caches, path

from conductor_app import api, transitions
from conductor_app.admin import EventAdmin, ExecutionAdmin, FailedExecutionAdmin, StepAdmin, causes
from conductor_app.admin.access import PRIVATE_COLUMNS
from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store import clock
from conductor_app.values.failures import dump_failure
from conductor_app.values.payloads import digest
from conductor_app.values.redaction import MASK
from tests.support import executions

BASE = "/admin/conductor_app"
MODELS: dict[str, Any] = {"execution": Execution, "step": Step, "event": Event, "failedexecution": FailedExecution}
VIEW = tuple(f"view_{model}" for model in MODELS)
ACT = ("retry_execution", "cancel_execution", "send_event")
#: As different as can be, in length too.
SECRETS = ("canary-4111 1111 1111 1111", "a")
LONG_AGO = -3 * 86_400 - 7_200.0


def login(client: Client, *codenames: str) -> User:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    assert user.user_permissions.count() == len(codenames)
    client.force_login(user)
    return user


@pytest.fixture
def viewer(db: None, client: Client) -> Client:
    """A browser of somebody who may see all lists, and act, and see no payloads."""
    login(client, *VIEW, *ACT)
    return client


@pytest.fixture
def world(db: None) -> dict[str, Any]:
    """Rows of each kind in each state that has an error, so long ago that their ages do not change."""
    failure = Failure("shop.CardDeclined", "card declined", "Traceback …", ("x",), {"code": 7})
    root, child = executions.family()
    transitions.fail(child, failure)
    again = executions.claimed(executions.fresh(root))
    wrapped = Failure("conductor_app.exceptions.ChildFailed", "Child execution failed: card declined", "Traceback …")
    transitions.fail(again, wrapped, step="child", child_id=child.pk)
    retrying = executions.running()
    transitions.record_step(retrying, "charge", failure=failure)
    transitions.retry_later(retrying, failure, 100)
    done = executions.running(idempotency_key="order-7")
    transitions.record_step(done, "look", result="1")
    api.send_event(done, "approved", 1, id="mail-7")
    transitions.succeed(done, "1")
    for model in (Execution, Step, Event, FailedExecution):
        for name in {"created_at", "started_at", "finished_at", "failed_at"} & {f.name for f in model._meta.fields}:
            model.objects.exclude(**{name: None}).update(**{name: clock.after(LONG_AGO)})
    Execution.objects.filter(pk=retrying.pk).update(due_at=clock.after(-LONG_AGO), dispatch_at=clock.after(-LONG_AGO))
    return {"root": root, "child": child, "retrying": retrying, "done": done}


def fill(secret: str) -> None:
    """Write a secret into every private column, and into nothing else."""
    text = json.dumps(secret)
    error = dump_failure(Failure("shop.CardDeclined", f"declined: {secret}", "", (secret,), {"card": secret}))
    Execution.objects.update(payload=f'[[],{{"card":{text}}}]', options=f'{{"headers":{{"card":{text}}}}}')
    Execution.objects.exclude(result=None).update(result=text)
    Execution.objects.exclude(error=None).update(error=error)
    Step.objects.update(payload_digest=digest(text))
    Step.objects.exclude(result=None).update(result=text)
    Step.objects.exclude(error=None).update(error=error)
    Event.objects.update(payload=text)
    FailedExecution.objects.update(message=f"declined: {secret}\nand more", traceback=f"Traceback: {secret}")
    cache.clear()


def normalised(content: str) -> str:
    """A page without what two answers to the same person differ in."""
    content = re.sub(r'name="csrfmiddlewaretoken" value="\w+"', "", content)
    content = re.sub(r"admin-[0-9a-f]{32}", "", content)  # the keys of forms
    content = re.sub(r"<svg.*?</svg>", "", content, flags=re.DOTALL)  # an axis that ends at the present
    content = re.sub(r"As of [^<]*", "", content)
    return re.sub(r'"(read_at|minute)": "[^"]*"', "", content)


def same_answers(client: Client, addresses: list[str]) -> list[str]:
    """Answers to these addresses, after making sure that they are the same for both secrets, and hold none."""
    answers: dict[str, list[str]] = {address: [] for address in addresses}
    for secret in SECRETS:
        fill(secret)
        for address in addresses:
            response = client.get(address)
            assert response.status_code < 500, address
            content = normalised(response.content.decode())
            # What was asked for stands in the answer again.
            assert "canary" in address or "canary" not in content, address
            answers[address].append(f"{response.status_code} {response.headers.get('Location')} {content}")
    for address, (first, second) in answers.items():
        assert first == second, address
    return [first for first, _ in answers.values()]


def test_no_page_tells_two_secrets_apart(viewer: Client, world: dict[str, Any]) -> None:
    fill(SECRETS[0])
    lists = [f"{BASE}/{model}/" for model in MODELS]
    rows: list[str] = [
        *(f"{BASE}/execution/{row.pk}" for row in world.values()),
        *(f"{BASE}/step/{key}" for key in Step.objects.values_list("pk", flat=True)),
        *(f"{BASE}/event/{key}" for key in Event.objects.values_list("pk", flat=True)),
        *(f"{BASE}/failedexecution/{key}" for key in FailedExecution.objects.values_list("pk", flat=True)),
    ]
    acts = [f"{BASE}/execution/{world['root'].pk}/act/{name}/" for name in ("retry", "rerun", "cancel", "send", "wake")]
    guesses = [causes.cause_of("shop.CardDeclined", f"declined: {secret}") for secret in SECRETS]
    autocomplete = "/admin/autocomplete/?app_label=conductor_app&model_name=step&field_name=execution&term="
    addresses = [
        *lists,
        *(f"{address}json/" for address in lists),
        *(f"{row}/{page}/" for row in rows for page in ("change", "json", "history")),
        *(f"{BASE}/execution/{row.pk}/{name}.json" for row in world.values() for name in ("payload", "result")),
        *(f"{BASE}/execution/overview/{page}" for page in ("", "json/", "?refresh=5")),
        *acts,
        *(f"{BASE}/failedexecution/json/?cause={guess}" for guess in guesses),
        *(f"{BASE}/failedexecution/?cause={guess}" for guess in guesses),
        *(f"{address}?o={order}" for address in lists for order in ("1", "-2", "3.-4", "-5")),
        *(f"{address}?_popup=1&_to_field={name}" for address in lists for name in ("id", "payload", "message")),
        *(f"{address}?q={term}" for address in lists for term in ("declined", "canary", "key:order-7", "key:canary")),
        *(f"{address}?e=1&all=1&_facets=True" for address in lists),
        *(f"{autocomplete}{term}" for term in ("canary", "declined", "tests")),
    ]
    answers = dict(zip(addresses, same_answers(viewer, addresses), strict=True))
    assert answers[f"{BASE}/execution/overview/json/"].startswith("200")
    assert sum(answer.startswith("200") for answer in answers.values()) > 60


@pytest.mark.parametrize("status", ["failed", "retrying"])
def test_of_an_error_a_viewer_sees_the_class_and_which_permission_shows_more(
    viewer: Client, world: dict[str, Any], status: str
) -> None:
    fill(SECRETS[0])
    row = world["child"] if status == "failed" else world["retrying"]
    page = viewer.get(f"{BASE}/execution/{row.pk}/change/").content.decode()
    assert "shop.CardDeclined" in page
    assert "conductor_app.view_payload" in page
    document = viewer.get(f"{BASE}/execution/{row.pk}/json/").json()
    assert (document["error"], document["error_class"]) == (None, "shop.CardDeclined")
    said = {
        "failed": "✕ Failed (CardDeclined, attempt 1 of 4).",
        "retrying": "↻ Attempt 1 of 4 failed (CardDeclined). Next try in 3 d.",
    }
    assert document["headline"] == said[status]


def test_lists_pages_and_overview_name_the_permission(viewer: Client, world: dict[str, Any]) -> None:
    fill(SECRETS[0])
    step = Step.objects.get(name="charge")
    for address in (
        "failedexecution/",
        f"failedexecution/{world['child'].pk}/change/",
        f"step/{step.pk}/change/",
        "execution/overview/",
    ):
        page = viewer.get(f"{BASE}/{address}").content.decode()
        assert "conductor_app.view_payload" in page, address
        assert "CardDeclined" in page, address
    assert viewer.get(f"{BASE}/step/{step.pk}/json/").json()["error"] == {"type": "shop.CardDeclined"}
    failure = viewer.get(f"{BASE}/failedexecution/{world['child'].pk}/json/").json()
    assert (failure["error_class"], failure["message"], failure["traceback"]) == ("shop.CardDeclined", None, None)
    groups = viewer.get(f"{BASE}/execution/overview/json/").json()["failures"]
    assert [(group["error_class"], group["message"], group["count"]) for group in groups] == [
        ("shop.CardDeclined", None, 1)
    ]
    found = viewer.get(f"{BASE}/failedexecution/json/", {"cause": groups[0]["cause"]}).json()
    assert {row["execution"] for row in found["rows"]} == {str(world["root"].pk), str(world["child"].pk)}


def test_an_overview_in_the_cache_is_not_for_who_may_see_less(viewer: Client, world: dict[str, Any]) -> None:
    fill("canary")
    ana = Client()
    ana.force_login(User.objects.create_superuser("ana"))
    for _ in range(2):
        assert "canary" in ana.get(f"{BASE}/execution/overview/").content.decode()
        assert "canary" not in viewer.get(f"{BASE}/execution/overview/").content.decode()


def test_the_permission_shows_errors_and_masks_their_attributes(
    client: Client, world: dict[str, Any], settings: Any
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "REDACT": ("card",)}
    login(client, *VIEW, "view_payload")
    fill("canary")
    step = Step.objects.get(name="charge")
    error = client.get(f"{BASE}/step/{step.pk}/json/").json()["error"]
    assert (error["message"], error["args"], error["attributes"]) == ("declined: canary", ["canary"], {"card": MASK})
    page = client.get(f"{BASE}/step/{step.pk}/change/").content.decode()
    assert "declined: canary" in page
    assert MASK in page
    for address in (f"execution/{world['child'].pk}", f"failedexecution/{world['child'].pk}"):
        for kind in ("change", "json"):
            assert "Traceback: canary" in client.get(f"{BASE}/{address}/{kind}/").content.decode()
    assert "declined: canary" in client.get(f"{BASE}/failedexecution/").content.decode()


# ---------------------------------------------------------------------------------------------------------- lookups


def columns(model: Any, depth: int) -> Iterator[tuple[str, Any, bool]]:
    """Each column that a lookup may lead to, over relations in both directions, and whether it is private."""
    for field in model._meta.get_fields():
        if field.concrete:
            yield field.name, field, field.name in PRIVATE_COLUMNS.get(model, ())
        if depth and field.is_relation and field.related_model in PRIVATE_COLUMNS:
            for below, column, is_private in columns(field.related_model, depth - 1):
                yield f"{field.name}__{below}", column, is_private


VALUES = {"isnull": "1", "in": "a,canary", "range": "a,z", "regex": "canary", "iregex": "^a"}


def test_no_lookup_over_any_column_tells_two_secrets_apart(world: dict[str, Any], rf: RequestFactory) -> None:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=VIEW))
    user.get_all_permissions()  # once for all requests
    asked: list[tuple[str, str, str]] = []
    for name, model in MODELS.items():
        for depth in (0, 1, 2):
            for column, field, is_private in columns(model, depth):
                if column.count("__") != depth or (depth == 2 and not is_private):
                    continue
                lookups = ["", *field.get_lookups()] if depth < 2 or is_private else [""]
                for lookup in lookups[:: 1 if is_private or not depth else 5]:
                    value = VALUES.get(lookup, str(world["root"].pk) if field.is_relation else "canary")
                    values = [value, "a"] if is_private else [value]
                    asked += [(name, f"{column}__{lookup}" if lookup else column, value) for value in values]
    assert len(asked) > 5_000
    answers: list[list[tuple[int, bytes]]] = []
    for secret in SECRETS:
        fill(secret)
        found = []
        for name, parameter, value in asked:
            request = rf.get(f"{BASE}/{name}/json/", {parameter: value})
            request.user = user
            response = admin.site.get_model_admin(MODELS[name]).list_as_json(request)
            found.append((response.status_code, response.content))
        answers.append(found)
    for question, first, second in zip(asked, *answers, strict=True):
        assert first == second, question
        assert first[0] in (200, 400), question
    taken = [parameter for (_, parameter, _), (status, _) in zip(asked, answers[0], strict=True) if status == 200]
    assert {"status__exact", "task", "task__exact", "root", "parent"} <= set(taken)
    private = {"payload", "payload_digest", "result", "error", "options", "message", "traceback"}
    assert not [parameter for parameter in taken if private & set(parameter.split("__"))]
    assert not [parameter for parameter in taken if "regex" in parameter or "contains" in parameter]


def test_a_page_refuses_what_its_twin_refuses(viewer: Client, world: dict[str, Any]) -> None:
    for name, model in MODELS.items():
        for column in PRIVATE_COLUMNS[model]:
            for lookup in ("contains", "regex", "gt", "startswith", "isnull", "exact", "length"):
                assert viewer.get(f"{BASE}/{name}/?{column}__{lookup}=a").status_code == 400
                answer = viewer.get(f"{BASE}/{name}/json/?{column}__{lookup}=a")
                assert (answer.status_code, set(answer.json())) == (400, {"error"})


@pytest.mark.parametrize("name", ["beginning__contains", "failed_at_step__contains", "read_at__gt"])
def test_what_a_list_computes_is_no_parameter(viewer: Client, world: dict[str, Any], name: str) -> None:
    for model in MODELS:
        assert viewer.get(f"{BASE}/{model}/json/", {name: "a"}).status_code == 400


@pytest.mark.parametrize(
    "parameters",
    [
        {"depth__range": "1"},
        {"created_at__year": "99999999999"},
        {"task__regex": "("},
        {"task": "\x00"},
        {"ta\x00sk": "x"},
        {"q": "\x00"},
        {"q": "key:\x00"},
        {"before": "\x00"},
        {"before": "9" * 40},
        {"before": "0001-01-01T00:00:00+23:59"},
        {"root__id__exact": "nonsense"},
        {"execution": "nonsense"},
        {"id": "nonsense"},
        {"created_at": "nonsense"},
        {"created_at": "9999-12-31T23:59:59-23:59"},
        {"created_at": "0001-01-01T00:00:00+23:59"},
        {"attempt": "nonsense"},
        {"attempt": "9" * 30},
        {"priority": "99999"},
        {"timeout_seconds": "nan"},
        {"fails_fast": "maybe"},
        {"within": "nonsense"},
        {"kind": "nonsense"},
        {"scope": "nonsense"},
        {"failed_child": "nonsense"},
        {"taken_at__isempty": "nonsense"},
        {"cause": "nonsense"},
        {"p": "9" * 30},
        {"p": "9" * 5_000},
        {"p": "-1"},
        {"o": "99"},
        {"_to_field": "payload"},
        {"_connector": "OR"},
        {"": "x"},
        {"__": "x"},
        {"pk__": "x"},
        {"status__exact": ["queued", "failed"]},
        {"status__in": "queued"},
    ],
)
def test_no_address_is_an_error_of_the_server(viewer: Client, world: dict[str, Any], parameters: Any) -> None:
    for model in MODELS:
        twin = viewer.get(f"{BASE}/{model}/json/", parameters)
        page = viewer.get(f"{BASE}/{model}/", parameters)
        assert twin.status_code in (200, 400), model
        # What a filter cannot read leads back to the list, as in all of Django's admin.
        assert (page.status_code == 200) is (twin.status_code == 200), model
        assert page.status_code in (200, 302, 400), model
        if page.status_code == 302:
            assert page.headers["Location"] == f"{BASE}/{model}/?e=1"


def test_what_has_no_meaning_is_refused_and_not_passed_over(viewer: Client, world: dict[str, Any]) -> None:
    for model, query in (
        ("execution", "depth__range=1"),
        ("execution", "task=%00"),
        ("execution", "within=nonsense"),
        ("execution", "kind=nonsense"),
        ("failedexecution", "scope=nonsense"),
        ("event", "taken_at__isempty=nonsense"),
        ("execution", "created_at=nonsense"),
    ):
        assert viewer.get(f"{BASE}/{model}/json/?{query}").status_code == 400, query


@pytest.mark.parametrize("key", ["%00", "9" * 40, "nonsense", "..", "1e400"])
def test_a_row_with_an_impossible_key_is_not_there(viewer: Client, key: str) -> None:
    for model in MODELS:
        assert viewer.get(f"{BASE}/{model}/{key}/json/").status_code == 404
        assert viewer.get(f"{BASE}/{model}/{key}/change/").status_code == 302
    autocomplete = "/admin/autocomplete/?app_label=conductor_app&model_name=step&field_name=execution&term="
    assert viewer.get(f"{autocomplete}key:{key}").json()["results"] == []


# ------------------------------------------------------------------------------------------------- a project's own


class AttemptsFilter(admin.SimpleListFilter):
    """Has two parameters."""

    title = "attempts"
    parameter_name = "least"

    def __init__(self, request: Any, params: dict[str, Any], model: Any, model_admin: Any) -> None:
        self.most = int(params.pop("most", ["9"])[-1])
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        return [("1", "1")]

    def expected_parameters(self) -> list[str]:
        return ["least", "most"]

    def queryset(self, request: Any, queryset: Any) -> Any:
        return queryset.filter(attempt__gte=int(self.value() or 1), attempt__lte=self.most)


class OwnExecutionAdmin(ExecutionAdmin):
    list_filter = (
        *ExecutionAdmin.list_filter,
        AttemptsFilter,
        "max_attempts",
        ("started_at", admin.DateFieldListFilter),
        ("priority", admin.EmptyFieldListFilter),
        ("result", admin.EmptyFieldListFilter),
    )
    date_hierarchy = "created_at"
    named_lookups = frozenset({"depth__gte", "payload__contains", "failure__message__contains"})


own_site = admin.AdminSite(name="own")
own_site.register(Execution, OwnExecutionAdmin)
own_site.register(Step, StepAdmin)
own_site.register(Event, EventAdmin)
own_site.register(FailedExecution, FailedExecutionAdmin)
urlpatterns = [path("admin/", own_site.urls)]


@pytest.fixture
def own() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__):
        clear_url_caches()
        yield
    clear_url_caches()


def test_filters_and_lookups_of_a_subclass_work(own: None, viewer: Client, world: dict[str, Any]) -> None:
    page = viewer.get(f"{BASE}/execution/").content.decode()
    links = {link.replace("&amp;", "&") for link in re.findall(r'<a href="(\?[^"]+)"', page)}
    for name in ("max_attempts", "started_at__gte", "priority__isempty", "created_at__"):
        assert any(name in link for link in links), name
    # One of each kind: there is one for each task, for example.
    kinds = {re.sub(r"=[^&]*", "=", link): link for link in links - {"?result__isempty=0", "?result__isempty=1"}}
    for link in kinds.values():
        assert viewer.get(f"{BASE}/execution/{link}").status_code == 200, link
        assert viewer.get(f"{BASE}/execution/json/{link}").status_code == 200, link
    for query, status in (
        ("depth__gte=1", 200),
        ("least=1&most=2", 200),
        ("least=nonsense", 400),
        ("most=nonsense", 400),
        ("payload__contains=a", 400),
        ("nonsense=1", 400),
        ("max_attempts=4", 200),
        ("max_attempts__lt=4", 400),
        ("started_at__regex=(", 400),
        ("created_at__year=2026", 200),
        ("created_at__year=99999999999", 400),
        ("created_at__year=2026&created_at__month=13", 400),
        ("created_at__regex=(", 400),
    ):
        assert viewer.get(f"{BASE}/execution/json/?{query}").status_code == status, query


def test_what_a_subclass_declares_opens_no_private_column(own: None, viewer: Client, world: dict[str, Any]) -> None:
    declared = ("payload__contains=a", "result__isempty=1", "failure__message__contains=a")
    for query in declared:
        assert viewer.get(f"{BASE}/execution/json/?{query}").status_code == 400
    User.objects.get().user_permissions.add(Permission.objects.get(codename="view_payload"))
    for query in declared:
        assert viewer.get(f"{BASE}/execution/json/?{query}").status_code == 200


def test_a_popup_may_have_what_a_foreign_key_is_limited_to(viewer: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    executions.queued(task="shop.tasks.rare")
    executions.queued()
    limits = [{"task__startswith": "shop."}, lambda: {"depth__lt": 1}, {"payload__contains": "x"}]
    monkeypatch.setattr(Execution._meta, "related_fkey_lookups", limits)
    for query, count in (("task__startswith=shop.", 1), ("depth__lt=1", 2)):
        found = viewer.get(f"{BASE}/execution/json/?{query}")
        assert found.json()["count"] == count
    for query in ("task__startswith=sho", "depth__lt=2", "payload__contains=x"):
        assert viewer.get(f"{BASE}/execution/json/?{query}").status_code == 400
