"""The broker, and the Celery app that names it."""

from __future__ import annotations

from typing import Any

from celery import Celery
from django.core import checks
from django.core.checks import CheckMessage

from conductor_app.checks import subject
from conductor_app.transitions import dispatch


def broker_transports(app: Celery) -> set[str]:
    """Return the transports of the broker's URLs: ``amqp``, ``redis`` …"""
    return {name.partition("+")[0].partition(":")[0] for name in _broker_urls(app)}


def _broker_urls(app: Celery) -> dict[str, str]:
    """Return a URL of the broker for each scheme: ``amqp``, ``redis+socket`` …"""
    urls = app.conf.broker_write_url or app.conf.broker_url or "amqp://"
    found = urls.split(";") if isinstance(urls, str) else urls
    return {str(url).partition("://")[0]: str(url) for url in found}


@checks.register(subject.TAG)
def check_app(**_kwargs: Any) -> list[CheckMessage]:
    """E003: no Celery app, or no broker."""
    app = subject.app()
    if not subject.has_app(app):
        return [
            checks.Error(
                "No Celery app is configured; messages would go to amqp://guest@localhost.",
                hint='Add "from .celery import app as celery_app" to the __init__.py of the project\'s package.',
                id="conductor.E003",
            )
        ]
    if not (app.conf.broker_write_url or app.conf.broker_url):
        return [
            checks.Error(
                f'No broker is configured for the Celery app "{app.main}"; messages would go to amqp://guest@localhost.',
                hint='Set CELERY_BROKER_URL, to "memory://" if there is no broker server.',
                id="conductor.E003",
            )
        ]
    return []


@checks.register(subject.TAG)
def check_transport(**_kwargs: Any) -> list[CheckMessage]:
    """E036: a broker to which nothing can be sent, which ``.delay()`` takes for one that is away."""
    app = subject.app()
    if not subject.has_app(app):
        return []
    return [
        checks.Error(
            f'Celery cannot talk to a broker "{name}://": {reason}. Executions are stored and no message is ever sent.',
            hint="Check CELERY_BROKER_URL, and that the transport's library is installed.",
            id="conductor.E036",
        )
        for name, url in _broker_urls(app).items()
        if (reason := _unusable(app, name, url))
    ]


def _unusable(app: Celery, name: str, url: str) -> str:
    """Return why there is no transport for a broker's URL, or an empty text."""
    kind, _, part = name.partition("+")
    if kind in ("redis", "rediss") and part not in ("", "socket"):
        # kombu takes it for a server of its own on this machine.
        return f"kombu knows no Redis {part}"
    try:
        app.connection_for_write(url).transport  # noqa: B018 - it is made here
    except Exception as error:  # noqa: BLE001 - whatever a library raises that is missing
        return str(error).strip("'\" ").rstrip(".") or type(error).__name__
    return ""


@checks.register(subject.TAG, deploy=True)
def check_redis(**_kwargs: Any) -> list[CheckMessage]:
    """W022: a Redis client that waits for ever."""
    app = subject.app()
    options = app.conf.broker_transport_options or {}
    if not broker_transports(app) & {"redis", "rediss", "sentinel"} or options.get("socket_timeout"):
        return []
    return [
        checks.Warning(
            "The Redis broker has no socket_timeout: a process that publishes while the server is silently gone waits "
            "for ever.",
            hint='Add to CELERY_BROKER_TRANSPORT_OPTIONS: "socket_timeout": 5, "socket_connect_timeout": 3, '
            '"socket_keepalive": True, "health_check_interval": 25.',
            id="conductor.W022",
        )
    ]


@checks.register(subject.TAG, deploy=True)
def check_amqp(**_kwargs: Any) -> list[CheckMessage]:
    """W023: RabbitMQ may lose messages and nobody is told."""
    app = subject.app()
    options = app.conf.broker_transport_options or {}
    if not broker_transports(app) & {"amqp", "amqps", "pyamqp"} or options.get("confirm_publish"):
        return []
    return [
        checks.Warning(
            "The AMQP broker does not confirm what is published: a message that it drops is missed only after "
            'CONDUCTOR["REDISPATCH_SECONDS"].',
            hint='Add to CELERY_BROKER_TRANSPORT_OPTIONS: "confirm_publish": True.',
            id="conductor.W023",
        )
    ]


@checks.register(subject.TAG, deploy=True)
def check_broker_retries(**_kwargs: Any) -> list[CheckMessage]:
    """W027: workers that give up on a broker that is away."""
    app = subject.app()
    retries = app.conf.broker_connection_max_retries
    if dispatch.is_embedded(app) or not retries:
        return []
    return [
        checks.Warning(
            f"CELERY_BROKER_CONNECTION_MAX_RETRIES is {retries}: a worker exits when the broker is away for longer, "
            "and nothing starts it again unless a supervisor does.",
            hint="Set CELERY_BROKER_CONNECTION_MAX_RETRIES = None.",
            id="conductor.W027",
        )
    ]
