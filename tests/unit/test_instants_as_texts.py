"""Instants that the database computes have one form, so that SQLite, which compares texts, has them in order."""

from __future__ import annotations

import re

import pytest
from django.db import connection

from conductor_app.models import Execution
from conductor_app.store import clock
from tests.support.executions import queued


@pytest.mark.django_db
@pytest.mark.skipif(connection.vendor != "sqlite", reason="has a type for instants")
@pytest.mark.parametrize("seconds", [0, 60, -60, 0.25])
def test_an_instant_is_stored_with_three_digits_of_its_second(seconds: float) -> None:
    row = queued()
    for _ in range(20):  # of those that Django's function for sums computes, one in a thousand has no fraction at all
        Execution.objects.filter(pk=row.pk).update(due_at=clock.after(seconds))
        with connection.cursor() as cursor:
            cursor.execute("SELECT CAST(due_at AS TEXT) FROM conductor_app_execution")
            assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", cursor.fetchone()[0])


@pytest.mark.django_db
@pytest.mark.parametrize("seconds", [0, 60, -60])
def test_a_null_span_is_a_null_instant_and_a_shift_is_as_long_as_it_says(seconds: float) -> None:
    row = queued()
    there, here = (
        Execution.objects.annotate(then=clock.after(span)).values_list("then", flat=True).get(pk=row.pk)
        for span in (seconds, 0)
    )
    assert (there - here).total_seconds() == pytest.approx(seconds, abs=1)
