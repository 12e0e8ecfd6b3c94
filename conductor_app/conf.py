"""``settings.CONDUCTOR``, read once, checked whole."""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import math
import re
import string
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

#: What a URL of ``LINKS`` may name in braces.
LINK_PLACEHOLDERS = (
    *("execution_id", "root_id", "task", "trace_id"),
    *("started", "finished", "started_ms", "finished_ms"),
)
#: What ``REPORTED_STATE`` may be.
REPORTED_STATES = ("SUSPENDED", "STARTED")


#: 100 years.
_LONGEST_SECONDS = 100 * 366 * 86_400


@dataclass(frozen=True)
class ConductorSettings:
    """All keys of ``CONDUCTOR`` with their defaults. Times are seconds, sizes are bytes."""

    #: How long a worker may run an execution without renewing its lease. A dead worker's executions are queued again
    #: at most this long plus 1.2 sweeps after its death.
    LEASE_SECONDS: float = 60.0
    #: How often a running execution's lease is renewed; runs shorter than this write no heartbeat.
    HEARTBEAT_SECONDS: float = 15.0
    #: How often each worker's sweeper looks for due executions, timeouts, lost messages and lapsed leases.
    SWEEP_SECONDS: float = 5.0
    #: How long a queued execution's message may stay unanswered before it is published again; doubles up to 32 times.
    REDISPATCH_SECONDS: float = 30.0
    #: How often the sweeper looks for executions that wait for nothing. It should never find one.
    AUDIT_SECONDS: float = 60.0
    #: How often a worker with the ``memory://`` broker asks the database for due executions.
    FEED_SECONDS: float = 0.05
    #: Whether a process goes on with what its run has made runnable, a child or a parent, without a message.
    HAND_OFF: bool = True
    #: How many rows one sweep takes in one statement.
    SWEEP_BATCH: int = 500
    #: How many of the last runs of an execution are kept as attempts; those that failed are all kept.
    KEEP_ATTEMPTS: int = 50
    #: How long trees are kept whose root has succeeded or was cancelled, unless the root's task says otherwise: seconds
    #: or a ``timedelta``; ``None`` for good.
    KEEP: float | None = None
    #: The same of trees whose root has failed.
    KEEP_FAILED: float | None = None
    #: Longest encoded payload.
    MAX_PAYLOAD_BYTES: int = 1_048_576
    #: Longest encoded result of a step or an execution.
    MAX_RESULT_BYTES: int = 1_048_576
    #: Longest stored error message, and longest stored traceback; more is cut.
    MAX_ERROR_BYTES: int = 65_536
    #: Deepest chain of parents and children.
    MAX_DEPTH: int = 100
    #: Most steps of one execution.
    MAX_STEPS: int = 10_000
    #: Most children of one ``ctx.map``.
    MAX_CHILDREN: int = 10_000
    #: Whether a replay that passes another payload than the recorded one raises ``StepMismatch`` instead of a warning.
    STRICT_REPLAY: bool = False
    #: Dotted path of a function that gets the context and the body's arguments, and returns a context manager around
    #: each run of a durable body.
    AROUND_BODY: str = ""
    #: What the result backend shows of an execution that waits: ``SUSPENDED`` or ``STARTED``.
    REPORTED_STATE: str = "SUSPENDED"
    #: Whether each process counts what happens in it, for Prometheus; needs the extra ``metrics``.
    METRICS: bool = False
    #: ``host:port`` at which a worker serves what its processes have counted; with ``METRICS`` only.
    METRICS_LISTEN: str = ""
    #: What a request for ``conductor_app.metrics.view`` has to bear; without one, only users with a permission see it.
    METRICS_TOKEN: str = ""
    #: Whether runs and steps are spans of OpenTelemetry; needs the extra ``otel``.
    TRACING: bool = False
    #: The project's own release, as workers show it: the version, or the commit, that was deployed.
    RELEASE: str = ""
    #: Keys whose values the admin and ``manage.py conductor show`` mask, at any depth; case and ``-`` or ``_`` do not
    #: matter.
    REDACT: tuple[str, ...] = (
        "password",
        "passwd",
        "passphrase",
        "secret",
        "client_secret",
        "token",
        "access_token",
        "refresh_token",
        "id_token",
        "api_key",
        "apikey",
        "private_key",
        "authorization",
        "cookie",
        "set_cookie",
        "card_number",
        "cvc",
        "cvv",
    )

    #: What an execution's page leads to elsewhere, its logs and traces for example: by the link's label, a URL with
    #: placeholders.
    LINKS: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> ConductorSettings:
        """Return the checked settings.

        Raises:
            ImproperlyConfigured: A key is unknown, or a value has a wrong type or does not fit the others.
        """
        if not isinstance(values, dict):
            raise ImproperlyConfigured(f"CONDUCTOR must be a dict, got {type(values).__name__}.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        checked: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
                hint = f' Did you mean "{nearest[0]}"?' if nearest else f" Known keys: {', '.join(sorted(fields))}."
                raise ImproperlyConfigured(f'CONDUCTOR has an unknown key "{key}".{hint}')
            default = fields[key].default
            checked[key] = cls._check(key, value, dict if default is dataclasses.MISSING else type(default))
        result = cls(**checked)
        if result.LEASE_SECONDS < 3 * result.HEARTBEAT_SECONDS:
            raise ImproperlyConfigured(
                f'CONDUCTOR["LEASE_SECONDS"] = {result.LEASE_SECONDS:g} must be at least 3 times '
                f'CONDUCTOR["HEARTBEAT_SECONDS"] = {result.HEARTBEAT_SECONDS:g}: a lease must survive a late heartbeat.'
            )
        if result.SWEEP_SECONDS > result.LEASE_SECONDS:
            raise ImproperlyConfigured(
                f'CONDUCTOR["SWEEP_SECONDS"] = {result.SWEEP_SECONDS:g} must not exceed '
                f'CONDUCTOR["LEASE_SECONDS"] = {result.LEASE_SECONDS:g}.'
            )
        if result.REPORTED_STATE not in REPORTED_STATES:
            raise ImproperlyConfigured(
                f'CONDUCTOR["REPORTED_STATE"] must be "SUSPENDED" or "STARTED", got {result.REPORTED_STATE!r}.'
            )
        if result.METRICS_LISTEN:
            host_and_port(result.METRICS_LISTEN)
            if not result.METRICS:
                raise ImproperlyConfigured('CONDUCTOR["METRICS_LISTEN"] needs CONDUCTOR["METRICS"] = True.')
        return result

    @staticmethod
    def _check(key: str, value: Any, expected: type[Any]) -> Any:
        if expected is type(None):
            return _checked_duration(key, value)
        if expected is tuple:
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
                raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be a tuple of texts, got {value!r}.')
            return tuple(value)
        if expected is dict:
            return _checked_links(key, value)
        if expected is bool:
            if not isinstance(value, bool):
                raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be True or False, got {value!r}.')
            return value
        if expected is str:
            # Bearer tokens go through a header.
            if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value != value.strip():
                raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be printable ASCII text, got {_kind(key, value)}.')
            return value
        allowed = int if expected is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            kind = "an integer" if expected is int else "a number of seconds"
            raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be {kind}, got {value!r}.')
        if not 0 < value < math.inf:
            raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be greater than 0 and finite, got {value!r}.')
        return expected(value)


def _checked_duration(key: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = value.total_seconds() if isinstance(value, dt.timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ImproperlyConfigured(
            f'CONDUCTOR["{key}"] must be a number of seconds, a timedelta or None, got {value!r}.'
        )
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be greater than 0 and at most 100 years, got {value!r}.')
    return float(seconds)


def _kind(key: str, value: object) -> str:
    """Return a wrong value as an error may show it: nothing of a secret."""
    return f"other text or {type(value).__name__}" if key == "METRICS_TOKEN" else repr(value)


def _checked_links(key: str, links: object) -> dict[str, str]:
    if not isinstance(links, dict):
        raise ImproperlyConfigured(f'CONDUCTOR["{key}"] must be a dict of labels and URLs, got {links!r}.')
    for label, url in links.items():
        where = f'CONDUCTOR["{key}"][{label!r}]'
        if not isinstance(label, str) or not label.strip() or not isinstance(url, str):
            raise ImproperlyConfigured(f"{where} must be a label and a URL, both texts, got {url!r}.")
        if any(character.isspace() or not character.isprintable() for character in url):
            raise ImproperlyConfigured(f"{where} must be a URL without spaces, got {url!r}.")
        # A browser takes "//host" and "/\\host" for another server's.
        found = re.match(r"https?://([^/?#]+)|/(?![/\\])", url)
        if found is None:
            raise ImproperlyConfigured(f'{where} must begin with "https://", "http://" or "/", got {url!r}.')
        if "{" in (found[1] or ""):
            raise ImproperlyConfigured(f"{where} must name its server without placeholders, got {url!r}.")
        _check_placeholders(where, url)
    return dict(links)


def _check_placeholders(where: str, url: str) -> None:
    try:
        parts = list(string.Formatter().parse(url))
    except ValueError as error:
        raise ImproperlyConfigured(f"{where}: {error}. A brace that is meant is doubled: {{{{ or }}}}.") from None
    for _text, name, form, conversion in parts:
        if name is None:
            continue
        if name not in LINK_PLACEHOLDERS:
            nearest = difflib.get_close_matches(name, LINK_PLACEHOLDERS, n=1, cutoff=0.5)
            known = ", ".join(f"{{{known}}}" for known in LINK_PLACEHOLDERS)
            hint = f" Did you mean {{{nearest[0]}}}?" if nearest else f" There are {known}."
            raise ImproperlyConfigured(f"{where} has an unknown placeholder {{{name}}}.{hint}")
        if form or conversion:
            raise ImproperlyConfigured(f"{where} must have {{{name}}} as it is, without a format or a conversion.")


def host_and_port(listen: str) -> tuple[str, int]:
    """Return the two parts of ``METRICS_LISTEN``; port 0 is one that the system chooses.

    Raises:
        ImproperlyConfigured: It has other parts.
    """
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ImproperlyConfigured(
            f'CONDUCTOR["METRICS_LISTEN"] must be "host:port", for example "127.0.0.1:9464", got {listen!r}.'
        )
    return host, int(port)


@lru_cache(maxsize=1)
def conductor_settings() -> ConductorSettings:
    """Return the project's settings.

    Raises:
        ImproperlyConfigured: See ``ConductorSettings.from_dict``.
    """
    return ConductorSettings.from_dict(getattr(django_settings, "CONDUCTOR", {}))


def _forget_settings(*, setting: str, **_kwargs: Any) -> None:
    if setting == "CONDUCTOR":
        conductor_settings.cache_clear()


setting_changed.connect(_forget_settings, dispatch_uid="conductor_app.conf")
