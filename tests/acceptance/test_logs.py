"""The log of a real worker: each line about a run bears its execution, in processes, threads and greenlets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conductor_app import api
from conductor_app.models import Execution
from tests.app import scenarios
from tests.support.polling import wait_until

#: Celery's own line, which knows nothing of executions, with what the filter has put before it.
_LINE = re.compile(
    r"<(?P<id>[^|]*)\|(?P<root>[^|]*)\|(?P<run>[^>]*)> celery\.app\.trace: Task [\w.]+\[(?P<task_id>[\w-]+)\]"
)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_every_line_of_celery_about_a_run_bears_its_execution(worker: Any, pool: str) -> None:
    if pool == "gevent":
        pytest.importorskip("gevent")
    started = worker(pool=pool, concurrency=3, env={"DJANGO_SETTINGS_MODULE": "tests.logged_settings"})
    results = [scenarios.three_children.delay(value=number) for number in range(6)]
    for result in results:
        api.get_result(result, timeout=60)
    runs = sum(Execution.objects.values_list("fence", flat=True))
    wait_until(lambda: len(_LINE.findall(started.log)) >= runs, message=started.log_tail)
    roots = {str(row.pk): str(row.root_id) for row in Execution.objects.only("root_id")}
    for line in _LINE.finditer(started.log):
        assert line["id"] == line["task_id"], line[0]
        assert line["root"] == roots[line["task_id"]]
        assert int(line["run"]) >= 1
    assert "<||None> celery.worker" in started.log or "<||None> celery.apps.worker" in started.log
