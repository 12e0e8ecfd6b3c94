"""Celery's settings of messages and workers."""

from __future__ import annotations

import os
from typing import Any, cast

from django.core import checks
from django.core.checks import CheckMessage
from kombu import serialization

from conductor_app.checks import subject
from conductor_app.transitions import dispatch


@checks.register(subject.TAG, deploy=True)
def check_eager(**_kwargs: Any) -> list[CheckMessage]:
    """W013: eager mode."""
    if not subject.app().conf.task_always_eager:
        return []
    return [
        checks.Warning(
            "CELERY_TASK_ALWAYS_EAGER is on: .delay() runs the whole tree in the caller's process.",
            hint="Remove it from production settings; it is made for tests.",
            id="conductor.W013",
        )
    ]


@checks.register(subject.TAG)
def check_pickle(**_kwargs: Any) -> list[CheckMessage]:
    """E018: workers would unpickle messages."""
    accepted = {str(item) for item in subject.app().conf.accept_content or ()}
    if not accepted & {"pickle", "application/x-python-serialize"}:
        return []
    return [
        checks.Error(
            "CELERY_ACCEPT_CONTENT has pickle: whoever can write to the broker can run code in the workers.",
            hint='Remove pickle from CELERY_ACCEPT_CONTENT; durable tasks need "json" and nothing else. While other '
            'tasks of yours send pickles, add "conductor.E018" to SILENCED_SYSTEM_CHECKS.',
            id="conductor.E018",
        )
    ]


@checks.register(subject.TAG)
def check_json(**_kwargs: Any) -> list[CheckMessage]:
    """E032: workers would read none of our messages."""
    accepted = subject.app().conf.accept_content
    types: Any = cast(Any, serialization).registry.name_to_type  # its stubs do not know it
    if accepted is None or types["json"] in {types.get(str(item), str(item)) for item in accepted}:
        return []
    named = ", ".join(sorted(map(str, accepted))) or "nothing"
    return [
        checks.Error(
            f"CELERY_ACCEPT_CONTENT has no json, only {named}: workers refuse the messages of durable tasks, and none "
            "of them ever runs.",
            hint='Add "json" to CELERY_ACCEPT_CONTENT. What other tasks send may stay in it.',
            id="conductor.E032",
        )
    ]


@checks.register(subject.TAG, deploy=True)
def check_prefetch(**_kwargs: Any) -> list[CheckMessage]:
    """W021: a worker takes more messages than it can run."""
    app = subject.app()
    conf = app.conf
    if dispatch.is_embedded(app) or conf.worker_prefetch_multiplier == 1 or conf.get("worker_disable_prefetch"):
        return []
    return [
        checks.Warning(
            f"CELERY_WORKER_PREFETCH_MULTIPLIER is {conf.worker_prefetch_multiplier}: short executions are parked "
            "behind a long one while other workers are idle.",
            hint="Set CELERY_WORKER_PREFETCH_MULTIPLIER = 1.",
            id="conductor.W021",
        )
    ]


@checks.register(subject.TAG, deploy=True)
def check_soft_shutdown(**_kwargs: Any) -> list[CheckMessage]:
    """W028: SIGTERM kills what runs."""
    if os.environ.get("REMAP_SIGTERM") != "SIGQUIT" or subject.app().conf.worker_soft_shutdown_timeout:
        return []
    return [
        checks.Warning(
            "REMAP_SIGTERM=SIGQUIT makes SIGTERM a cold shutdown, and CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT is 0: what "
            "runs is killed, and its bodies begin again.",
            hint="Set CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT to the supervisor's grace period less 10 seconds.",
            id="conductor.W028",
        )
    ]
