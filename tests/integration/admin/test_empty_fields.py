"""What is empty says so on a row's own page, in the word of the lists."""

from __future__ import annotations

import re

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from conductor_app import api, transitions
from conductor_app.models import Event, FailedExecution, Operation, PausedTask, Schedule, Step
from conductor_app.store import clock
from tests.support.executions import FAILURE, claimed, family, fresh, queued

pytestmark = pytest.mark.django_db

FIELD = re.compile(r'<div class="readonly">\s*(.*?)\s*</div>', re.DOTALL)


@pytest.mark.parametrize("model", [Event, Step, FailedExecution, Operation, Schedule, PausedTask])
def test_no_field_says_none(client: Client, model: type) -> None:
    client.force_login(User.objects.create_superuser("ana"))
    root, child = family()
    assert transitions.send(root.pk, "approved", "1", "key")
    transitions.fail(child, FAILURE)
    transitions.fail(claimed(fresh(root)), FAILURE)
    api.cancel(queued())
    now = clock.read("default")
    Schedule.objects.create(name="nightly", task="shop.nightly", seen_at=now, declared_at=now)
    PausedTask.objects.create(name="shop.charge", paused_at=now)
    row = model.objects.first()
    page = client.get(reverse(f"admin:conductor_app_{model.__name__.lower()}_change", args=[row.pk])).content.decode()
    values = FIELD.findall(page)
    assert "None" not in values
    if model is not PausedTask:
        assert "-" in values
