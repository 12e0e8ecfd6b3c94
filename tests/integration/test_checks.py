"""System checks: when each one speaks, what it says, and what it advises."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, _state
from celery.concurrency import get_implementation
from django.core import checks as system_checks
from django.core.checks import CheckMessage
from django.db import OperationalError, connection

from conductor_app import checks, durable_task
from conductor_app.conf import ConductorSettings
from conductor_app.tasks.task import DurableTask
from project.celery import app as project_app
from tests.app import scenarios
from tests.support.worker import ROOT, Worker

SOURCE = "\n".join(path.read_text() for path in sorted(Path(checks.__path__[0]).glob("*.py")))


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Celery]:
    """A function that puts another Celery app, with these settings, in the place of the project's."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)

    def use(**conf: Any) -> Celery:
        app = Celery("shop", set_as_current=False)
        app.conf.update({"broker_url": "memory://", "result_backend": "django-db", **conf})
        monkeypatch.setattr(checks.subject, "app", lambda: app)
        return app

    return use


@pytest.fixture
def stored_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes the checks believe in another database."""

    def use(vendor: str, options: Mapping[str, Any] | None = None, *, in_memory: bool = False, **settings: Any) -> None:
        connection = SimpleNamespace(
            vendor=vendor, settings_dict={"OPTIONS": options or {}, **settings}, is_in_memory_db=lambda: in_memory
        )
        monkeypatch.setattr(checks.database, "connections", {"default": connection})

    return use


def only(messages: list[CheckMessage], id: str, text: str, hint: str) -> None:  # noqa: A002
    """There is one message, this one."""
    assert [message.id for message in messages] == [f"conductor.{id}"]
    assert messages[0].msg == text
    assert hint in str(messages[0].hint)
    assert isinstance(messages[0], system_checks.Error if id.startswith("E") else system_checks.Warning)


# ------------------------------------------------------------------------------------------------------- the whole set


def test_the_project_has_nothing_to_say() -> None:
    # In a process of its own: other tests have registered tasks that the checks have something to say about.
    command = [sys.executable, "manage.py", "check", "--tag", "conductor", "--deploy", "--fail-level", "WARNING"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def test_ids_are_used_once_and_documented() -> None:
    ids = set(re.findall(r"conductor\.[EW]\d{3}", SOURCE)) | {"conductor.E002"}
    numbers = [name[-3:] for name in ids]
    assert len(numbers) == len(set(numbers)) == 26
    page = (ROOT / "docs/reference/checks.md").read_text()
    sections = set(re.findall(r"^### (conductor\.[EW]\d{3})", page, re.MULTILINE))
    assert sections == ids


def test_each_setting_is_documented_with_its_default() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \| \S", page, re.MULTILINE))
    defaults = dataclasses.asdict(ConductorSettings())
    assert set(rows) == set(defaults)
    for name, default in defaults.items():
        documented = ast.literal_eval(rows[name])
        assert (documented if default is None else type(default)(documented)) == default, name


def test_a_check_can_be_silenced(
    settings: Any, capsys: pytest.CaptureFixture[str], shop: Callable[..., Celery]
) -> None:
    shop(result_backend=None)
    checks.report_to_worker()
    assert "conductor.W009" in capsys.readouterr().err
    settings.SILENCED_SYSTEM_CHECKS = ["conductor.W009"]
    checks.report_to_worker()
    assert "conductor.W009" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- E001, E002


def test_e001_tables_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.schema, "missing_tables", lambda using: ["conductor_app_step"])
    only(
        checks.schema.check_tables(databases=["default"]),
        "E001",
        'conductor_app tables do not exist in database "default".',
        "Run: python manage.py migrate conductor_app",
    )
    assert checks.schema.check_tables(databases=["replica"]) == []
    assert checks.schema.check_tables() == []


@pytest.mark.django_db
def test_e001_looks_at_the_real_database() -> None:
    assert checks.schema.missing_tables("default") == []
    assert checks.schema.check_tables(databases=["default"]) == []


def test_e001_leaves_a_database_that_is_away_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(using: str) -> list[str]:
        raise OperationalError("connection refused")

    monkeypatch.setattr(checks.schema, "missing_tables", refuse)
    assert checks.schema.check_tables(databases=["default"]) == []


def test_e001_does_not_keep_migrate_from_making_the_tables(tmp_path: Path) -> None:
    def manage(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "DATABASE_URL": f"sqlite:///{tmp_path}/new.sqlite3",
            "DJANGO_SETTINGS_MODULE": "project.settings",
        }
        return subprocess.run(
            [sys.executable, "manage.py", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    before = manage("check", "--database", "default")
    assert before.returncode == 1
    assert "conductor.E001" in before.stderr
    migrated = manage("migrate", "conductor_app")
    assert migrated.returncode == 0, migrated.stderr
    assert "E001" not in migrated.stderr
    assert manage("check", "--database", "default").returncode == 0


def test_e002_the_app_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "shop_tasks.py").write_text("from conductor_app import durable_task\n")
    code = (
        "import django; from django.conf import settings\n"
        "settings.configure(INSTALLED_APPS=['django.contrib.contenttypes'])\n"
        "django.setup()\n"
        "import shop_tasks\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stderr.strip().splitlines()[-1] == (
        "django.core.exceptions.ImproperlyConfigured: shop_tasks uses conductor_app.durable_task, but "
        '"conductor_app" is not in INSTALLED_APPS. Add it, then run: python manage.py migrate conductor_app '
        "(conductor.E002)"
    )


# ---------------------------------------------------------------------------------------------------- Celery's settings


def test_e003_there_is_no_celery_app(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = Celery("default", loader="default", set_as_current=False)
    monkeypatch.setattr(checks.subject, "app", lambda: made_up)
    only(
        checks.broker.check_app(),
        "E003",
        "No Celery app is configured; messages would go to amqp://guest@localhost.",
        'Add "from .celery import app as celery_app" to the __init__.py',
    )
    assert checks.result_backend.check_result_backend() == []


def test_e003_there_is_no_broker(shop: Callable[..., Celery]) -> None:
    shop(broker_url=None)
    only(
        checks.broker.check_app(),
        "E003",
        'No broker is configured for the Celery app "shop"; messages would go to amqp://guest@localhost.',
        "Set CELERY_BROKER_URL",
    )
    shop(broker_url="memory://")
    assert checks.broker.check_app() == []


@pytest.mark.parametrize("backend", [None, "disabled", "disabled://"])
def test_w009_there_is_no_result_backend(shop: Callable[..., Celery], backend: str | None) -> None:
    shop(result_backend=backend)
    only(
        checks.result_backend.check_result_backend(),
        "W009",
        "CELERY_RESULT_BACKEND is not set: durable execution works, but AsyncResult.get() cannot.",
        'Use "django-db" (django-celery-results), or conductor_app.api.get_result().',
    )
    shop(result_backend="redis://localhost/1")
    assert checks.result_backend.check_result_backend() == []


def test_w013_eager_mode(shop: Callable[..., Celery]) -> None:
    shop(task_always_eager=True)
    only(
        checks.celery_settings.check_eager(),
        "W013",
        "CELERY_TASK_ALWAYS_EAGER is on: .delay() runs the whole tree in the caller's process.",
        "it is made for tests",
    )
    shop()
    assert checks.celery_settings.check_eager() == []


@pytest.mark.parametrize("accepted", [["json", "pickle"], {"application/x-python-serialize"}])
def test_e018_pickle_is_accepted(shop: Callable[..., Celery], accepted: Any) -> None:
    shop(accept_content=accepted)
    only(
        checks.celery_settings.check_pickle(),
        "E018",
        "CELERY_ACCEPT_CONTENT has pickle: whoever can write to the broker can run code in the workers.",
        'Remove pickle from CELERY_ACCEPT_CONTENT; durable tasks need "json" and nothing else.',
    )
    shop(accept_content=["json"])
    assert checks.celery_settings.check_pickle() == []


@pytest.mark.parametrize(
    ("accepted", "named"),
    [(["yaml"], "yaml"), ({"pickle"}, "pickle"), (("msgpack", "yaml"), "msgpack, yaml"), ([], "nothing")],
    ids=repr,
)
def test_e030_json_is_not_accepted(shop: Callable[..., Celery], accepted: Any, named: str) -> None:
    shop(accept_content=accepted)
    only(
        checks.celery_settings.check_json(),
        "E032",
        f"CELERY_ACCEPT_CONTENT has no json, only {named}: workers refuse the messages of durable tasks, and none of "
        "them ever runs.",
        'Add "json" to CELERY_ACCEPT_CONTENT.',
    )


@pytest.mark.parametrize("accepted", [["json"], ("application/json", "yaml"), {"json"}, None], ids=repr)
def test_e030_json_is_accepted(shop: Callable[..., Celery], accepted: Any) -> None:
    shop(accept_content=accepted)
    assert checks.celery_settings.check_json() == []


def test_w021_workers_take_more_than_they_can_run(shop: Callable[..., Celery]) -> None:
    shop(broker_url="redis://localhost", worker_prefetch_multiplier=4)
    only(
        checks.celery_settings.check_prefetch(),
        "W021",
        "CELERY_WORKER_PREFETCH_MULTIPLIER is 4: short executions are parked behind a long one while other workers "
        "are idle.",
        "Set CELERY_WORKER_PREFETCH_MULTIPLIER = 1.",
    )
    for conf in (
        {"worker_prefetch_multiplier": 1},
        {"worker_prefetch_multiplier": 4, "worker_disable_prefetch": True},
        {"worker_prefetch_multiplier": 4, "broker_url": "memory://"},
    ):
        shop(**{"broker_url": "redis://localhost", **conf})
        assert checks.celery_settings.check_prefetch() == []


def test_w022_a_redis_client_waits_for_ever(shop: Callable[..., Celery]) -> None:
    for url in ("redis://localhost", "rediss://localhost", "sentinel://one;sentinel://two"):
        shop(broker_url=url)
        only(
            checks.broker.check_redis(),
            "W022",
            "The Redis broker has no socket_timeout: a process that publishes while the server is silently gone "
            "waits for ever.",
            '"socket_timeout": 5',
        )
    shop(broker_url="redis://localhost", broker_transport_options={"socket_timeout": 5})
    assert checks.broker.check_redis() == []
    shop(broker_url="amqp://localhost")
    assert checks.broker.check_redis() == []


def test_w023_rabbitmq_confirms_nothing(shop: Callable[..., Celery]) -> None:
    for url in ("amqp://localhost", "amqps://localhost", "pyamqp://localhost"):
        shop(broker_url=url)
        only(
            checks.broker.check_amqp(),
            "W023",
            "The AMQP broker does not confirm what is published: a message that it drops is missed only after "
            'CONDUCTOR["REDISPATCH_SECONDS"].',
            'Add to CELERY_BROKER_TRANSPORT_OPTIONS: "confirm_publish": True.',
        )
    shop(broker_url="amqp://localhost", broker_transport_options={"confirm_publish": True})
    assert checks.broker.check_amqp() == []
    shop(broker_url="memory://")
    assert checks.broker.check_amqp() == []


def test_w027_workers_give_up_on_the_broker(shop: Callable[..., Celery]) -> None:
    shop(broker_url="amqp://localhost")
    only(
        checks.broker.check_broker_retries(),
        "W027",
        "CELERY_BROKER_CONNECTION_MAX_RETRIES is 100: a worker exits when the broker is away for longer, and nothing "
        "starts it again unless a supervisor does.",
        "Set CELERY_BROKER_CONNECTION_MAX_RETRIES = None.",
    )
    shop(broker_url="amqp://localhost", broker_connection_max_retries=None)
    assert checks.broker.check_broker_retries() == []
    shop(broker_url="memory://")
    assert checks.broker.check_broker_retries() == []


def test_w028_sigterm_kills_what_runs(shop: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch) -> None:
    shop()
    assert checks.celery_settings.check_soft_shutdown() == []
    monkeypatch.setenv("REMAP_SIGTERM", "SIGQUIT")
    only(
        checks.celery_settings.check_soft_shutdown(),
        "W028",
        "REMAP_SIGTERM=SIGQUIT makes SIGTERM a cold shutdown, and CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT is 0: what runs "
        "is killed, and its bodies begin again.",
        "Set CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT",
    )
    shop(worker_soft_shutdown_timeout=20)
    assert checks.celery_settings.check_soft_shutdown() == []


# ----------------------------------------------------------------------------------------------------------- databases


def test_w014_sqlite_without_what_several_processes_need(stored_in: Callable[..., None]) -> None:
    stored_in("sqlite")
    only(
        checks.database.check_sqlite(),
        "W014",
        'SQLite database "default" has no transaction_mode IMMEDIATE and no journal_mode WAL: processes that write at '
        'the same time will meet "database is locked".',
        'Add to DATABASES["default"]["OPTIONS"]: "transaction_mode": "IMMEDIATE"',
    )
    stored_in("sqlite", {"transaction_mode": "IMMEDIATE"})
    assert "has no journal_mode WAL:" in checks.database.check_sqlite()[0].msg
    stored_in("sqlite", {"transaction_mode": "IMMEDIATE"}, in_memory=True)
    assert checks.database.check_sqlite() == []
    stored_in("postgresql")
    assert checks.database.check_sqlite() == []


def test_w014_advises_what_silences_it(stored_in: Callable[..., None]) -> None:
    stored_in("sqlite", eval("{" + checks.database.SQLITE_OPTIONS + "}"))
    assert checks.database.check_sqlite() == []


@pytest.mark.parametrize(
    ("vendor", "level", "named"),
    [
        ("postgresql", "serializable", "SERIALIZABLE"),
        ("postgresql", 3, "REPEATABLE READ"),
        ("mysql", "repeatable read", "REPEATABLE READ"),
        ("mysql", None, "of the server's default (REPEATABLE READ)"),
    ],
)
def test_w025_the_isolation_level_is_too_high(
    stored_in: Callable[..., None], vendor: str, level: Any, named: str
) -> None:
    if isinstance(level, int):
        pytest.importorskip("psycopg")
    stored_in(vendor, {"isolation_level": level})
    only(
        checks.database.check_isolation(),
        "W025",
        f'Database "default" works at the isolation level {named}: transactions that meet fail and are repeated, '
        "where at READ COMMITTED one waits for the other.",
        'Remove "isolation_level" from DATABASES["default"]["OPTIONS"]',
    )


@pytest.mark.parametrize(
    ("vendor", "options"),
    [
        ("postgresql", {}),
        ("postgresql", {"isolation_level": None}),
        ("mysql", {"isolation_level": "read committed"}),
        ("sqlite", {"isolation_level": None}),
    ],
)
def test_w025_is_silent_about_the_usual_level(stored_in: Callable[..., None], vendor: str, options: Any) -> None:
    stored_in(vendor, options)
    assert checks.database.check_isolation() == []


@pytest.mark.django_db
@pytest.mark.parametrize("level", ["serializable", "repeatable read", "read committed"])
def test_w025_the_server_sets_the_level_for_the_role(level: str) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("PostgreSQL")
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL default_transaction_isolation = %s", [level])
        found = checks.database.check_session(databases=["default"])
        assert checks.database.check_session(databases=[]) == checks.database.check_session() == []
    if level == "read committed":
        assert found == []
        return
    only(
        found,
        "W025",
        f'Database "default" works at the isolation level {level.upper()}: transactions that meet fail and are '
        "repeated, where at READ COMMITTED one waits for the other.",
        "ALTER ROLE … RESET default_transaction_isolation",
    )


def test_w025_asks_no_server_that_is_not_postgresql_nor_against_the_settings(stored_in: Callable[..., None]) -> None:
    stored_in("mysql")
    assert checks.database.check_session(databases=["default"]) == []
    stored_in("postgresql", {"isolation_level": 2})
    assert checks.database.check_session(databases=["default"]) == []


def test_w024_a_connection_pool_in_prefork_workers(stored_in: Callable[..., None], shop: Callable[..., Celery]) -> None:
    stored_in("postgresql", {"pool": True})
    shop(worker_pool="prefork")
    only(
        checks.database.check_connection_pool(),
        "W024",
        'DATABASES["default"]["OPTIONS"]["pool"] is on, and Celery\'s prefork pool closes it before and after each '
        "task: every run builds a pool of connections to use one of them.",
        "use --pool=threads",
    )
    shop(worker_pool="threads")
    assert checks.database.check_connection_pool() == []
    stored_in("postgresql")
    shop(worker_pool="prefork")
    assert checks.database.check_connection_pool() == []


def test_w030_nothing_ends_a_connection_to_a_host_that_is_gone(stored_in: Callable[..., None]) -> None:
    stored_in("postgresql", {"connect_timeout": 3}, HOST="db.example.com")
    only(
        checks.database.check_dead_connections(),
        "W030",
        'Database "default" has no tcp_user_timeout and no keepalives_idle: a process whose database host is silently '
        "gone waits for it for as long as the kernel does, up to two hours.",
        '"tcp_user_timeout": 15000',
    )
    stored_in("mysql", HOST="db.example.com")
    only(
        checks.database.check_dead_connections(),
        "W030",
        'Database "default" has no connect_timeout and no read_timeout and no write_timeout: a process whose database '
        "host is silently gone waits for it for as long as the kernel does, up to two hours.",
        '"read_timeout": 60',
    )
    for vendor, options in checks.database.DEAD_CONNECTION_OPTIONS.items():
        stored_in(vendor, options, HOST="db.example.com")
        assert checks.database.check_dead_connections() == []
    for options, host in ({}, ""), ({}, "/run/postgresql"), ({"service": "shop"}, "db.example.com"):
        stored_in("postgresql", options, HOST=host)
        assert checks.database.check_dead_connections() == [], (
            "a socket of this machine's, or a file that may have them"
        )


def test_w031_a_connection_pool_smaller_than_the_workers(
    stored_in: Callable[..., None], shop: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(worker_pool="threads")
    concurrency: ContextVar[int | None] = ContextVar("concurrency", default=None)
    monkeypatch.setattr(checks.subject, "worker_concurrency", concurrency)
    for pool, size in (True, 4), ({"min_size": 2}, 2), ({"min_size": 2, "max_size": 8}, 8):
        stored_in("postgresql", {"pool": pool})
        concurrency.set(None)
        assert checks.database.check_pool_size() == [], "only a worker knows how many it needs"
        concurrency.set(size - 1)
        assert checks.database.check_pool_size() == []
        concurrency.set(size)
        only(
            checks.database.check_pool_size(),
            "W031",
            f'DATABASES["default"]["OPTIONS"]["pool"] has {size} connections at most, and this worker runs {size} '
            "bodies at once: those that find none free wait, and fail after the pool's timeout.",
            f'Set "max_size" to {size + 1} or more',
        )
    shop(worker_pool="prefork")
    assert checks.database.check_pool_size() == []


def test_e029_nothing_would_be_committed(stored_in: Callable[..., None]) -> None:
    stored_in("postgresql", AUTOCOMMIT=False)
    only(
        checks.database.check_autocommit(),
        "E029",
        'DATABASES["default"]["AUTOCOMMIT"] is False: the moves of executions would never be committed.',
        "Remove AUTOCOMMIT",
    )
    stored_in("postgresql", AUTOCOMMIT=True)
    assert checks.database.check_autocommit() == []


def test_no_hint_drops_what_a_project_has_set_itself() -> None:
    """Settings that hold several things are added to: `X = {…}` followed literally drops the others."""
    hints = [
        ast.unparse(keyword.value)
        for call in ast.walk(ast.parse(SOURCE))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "hint"
    ]
    assert len(hints) > 20
    assert [hint for hint in hints if re.search(r"[A-Z_]{5,} = [\[{]|: .OPTIONS.: \{", hint)] == []


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Chicago", "Australia/Sydney"])
def test_e033_local_times_where_clocks_are_put_back(settings: Any, zone: str) -> None:
    settings.USE_TZ, settings.TIME_ZONE = False, zone
    only(
        checks.settings.check_time_zone(),
        "E033",
        f"USE_TZ is False and the clocks of {zone} are put forward and back: what is due around then comes an hour "
        "late, or at once, and leases lapse an hour late, or at once.",
        "Set USE_TZ = True, or a TIME_ZONE without daylight saving",
    )
    settings.USE_TZ = True
    assert checks.settings.check_time_zone() == []


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "Africa/Nairobi"])
def test_e033_is_silent_where_they_are_not(settings: Any, zone: str) -> None:
    settings.USE_TZ, settings.TIME_ZONE = False, zone
    assert checks.settings.check_time_zone() == []


@pytest.mark.parametrize("backend", ["rpc://", "rpc", "celery.backends.rpc:RPCBackend"])
def test_w034_results_that_are_sent_to_their_caller(shop: Callable[..., Celery], backend: str) -> None:
    shop(result_backend=backend)
    (found,) = checks.result_backend.check_result_address()
    assert found.id == "conductor.W034"
    assert found.msg.endswith("that of a durable task never arrives, and AsyncResult.get() waits for ever.")
    assert 'Use "django-db"' in str(found.hint)


@pytest.mark.parametrize("backend", ["django-db", "redis://localhost", "cache+memory://", None, "nowhere://"])
def test_w034_is_silent_about_results_that_are_kept(shop: Callable[..., Celery], backend: Any) -> None:
    shop(result_backend=backend)
    assert checks.result_backend.check_result_address() == []


@pytest.mark.parametrize(
    ("apps", "where"),
    [
        ({"TENANT_APPS": ["shop", "conductor_app"]}, "TENANT_APPS"),
        ({"TENANT_APPS": ["conductor_app.apps.ConductorConfig"], "SHARED_APPS": ["conductor_app"]}, "TENANT_APPS"),
        (
            {
                "HAS_MULTI_TYPE_TENANTS": True,
                "TENANT_TYPES": {"public": {"APPS": ["conductor_app"]}, "free": {"APPS": ["conductor_app"]}},
            },
            'TENANT_TYPES["free"]',
        ),
    ],
)
def test_e035_each_tenant_has_tables_of_its_own(settings: Any, apps: dict[str, Any], where: str) -> None:
    for name, value in {"TENANT_MODEL": "shop.Tenant", **apps}.items():
        setattr(settings, name, value)
    only(
        checks.settings.check_tenants(),
        "E035",
        f"conductor_app is in {where}: each tenant gets tables of its own, and workers look at those of the public "
        "schema. What a tenant's request starts is stored and never runs.",
        "Move conductor_app to SHARED_APPS",
    )


def test_e035_is_silent_about_shared_tables(settings: Any) -> None:
    settings.TENANT_APPS = ["conductor_app"]
    assert checks.settings.check_tenants() == [], "of somebody else"
    settings.TENANT_MODEL, settings.TENANT_APPS, settings.SHARED_APPS = "shop.Tenant", ["shop"], ["conductor_app"]
    assert checks.settings.check_tenants() == []


@pytest.mark.parametrize(
    ("url", "name", "reason"),
    [
        ("redis+cluster://localhost:7000", "redis+cluster", "kombu knows no Redis cluster"),
        ("nowhere://localhost", "nowhere", "No such transport: nowhere"),
        ("amqp://localhost;nowhere://localhost", "nowhere", "No such transport: nowhere"),
    ],
)
def test_e036_no_transport_for_the_broker(shop: Callable[..., Celery], url: str, name: str, reason: str) -> None:
    shop(broker_url=url)
    only(
        checks.broker.check_transport(),
        "E036",
        f'Celery cannot talk to a broker "{name}://": {reason}. Executions are stored and no message is ever sent.',
        "Check CELERY_BROKER_URL",
    )


@pytest.mark.parametrize("url", ["memory://", "amqp://a;amqp://b", "amqps://a", "redis+socket:///run/redis", None])
def test_e036_is_silent_about_transports_that_there_are(shop: Callable[..., Celery], url: str | None) -> None:
    if url is not None and url.startswith("redis"):
        pytest.importorskip("redis", reason="the client is one of requirements-services.txt")
    shop(broker_url=url)
    assert checks.broker.check_transport() == []


def test_e017_conductor_is_wrong(settings: Any) -> None:
    settings.CONDUCTOR = {"LEASE_TTLL": 5}
    messages = checks.settings.check_settings()
    assert messages[0].msg.startswith('CONDUCTOR has an unknown key "LEASE_TTLL".')
    settings.CONDUCTOR = {"LEASE_SECONDS": 5, "HEARTBEAT_SECONDS": 4}
    only(
        checks.settings.check_settings(),
        "E017",
        'CONDUCTOR["LEASE_SECONDS"] = 5 must be at least 3 times CONDUCTOR["HEARTBEAT_SECONDS"] = 4: a lease must '
        "survive a late heartbeat.",
        "docs/reference/settings.md",
    )


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tasks that the checks about tasks look at."""
    found: list[Any] = []
    monkeypatch.setattr(checks.tasks, "durable_tasks", lambda app: found)
    return found


@pytest.fixture
def _forget_tasks() -> Iterator[None]:
    """Take tasks that a test defines out of the registry."""
    before, finalizers = set(project_app.tasks), set(_state._on_app_finalizers)
    yield
    for name in set(project_app.tasks) - before:
        del project_app.tasks[name]
    _state._on_app_finalizers.intersection_update(finalizers)


@pytest.mark.usefixtures("_forget_tasks")
def test_w019_message_options_that_mean_nothing(tasks: list[Any]) -> None:
    @durable_task(name="checks.late", acks_late=True, serializer="pickle", track_started=False)
    def late(ctx: Any) -> None: ...

    tasks.append(late)
    only(
        checks.tasks.check_message_options(),
        "W019",
        "Task checks.late sets acks_late, serializer, which means nothing for a durable task: its message only says "
        "that there is something to run and is acknowledged at once; leases bring back what a dead worker ran.",
        "Remove it from @durable_task, its base class or CELERY_TASK_ANNOTATIONS.",
    )


@pytest.mark.usefixtures("_forget_tasks")
def test_w019_sees_what_annotations_have_set(tasks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @durable_task(name="checks.annotated", acks_late=False, serializer="json")
    def annotated(ctx: Any) -> None: ...

    tasks.append(annotated)
    assert checks.tasks.check_message_options() == []
    task = project_app.tasks["checks.annotated"]
    monkeypatch.setattr(type(task), "acks_late", True)
    assert "checks.annotated sets acks_late, which" in checks.tasks.check_message_options()[0].msg


@pytest.mark.usefixtures("_forget_tasks")
def test_w020_celerys_own_retries_around_a_durable_body(tasks: list[Any]) -> None:
    class Base(DurableTask):
        abstract = True
        autoretry_for = (ConnectionError,)

    @durable_task(name="checks.wrapped", base=Base)
    def wrapped(ctx: Any) -> None: ...

    @durable_task(name="checks.plain", autoretry_for=(ConnectionError,))
    def plain(ctx: Any) -> None: ...

    tasks.extend([wrapped, plain])
    for task in tasks:
        assert task.name  # evaluates the lazy task
    only(
        checks.tasks.check_autoretry(),
        "W020",
        "Task checks.wrapped gets autoretry_for from its base class: Celery's own retries are wrapped around the "
        "durable body, and would publish messages that nothing asked for.",
        "Pass autoretry_for to @durable_task",
    )


def test_w026_time_limits_on_a_pool_without_them(
    tasks: list[Any], shop: Callable[..., Celery], capsys: pytest.CaptureFixture[str]
) -> None:
    tasks.append(SimpleNamespace(name="shop.tasks.charge", time_limit=30, soft_time_limit=None, serializer="json"))
    shop()
    assert checks.tasks.check_time_limits() == []  # `manage.py check` knows no pool
    checks.report_to_worker(options={"pool_cls": None, "pool": get_implementation("threads")})
    assert (
        "WARNING conductor.W026: This worker's pool, threads, does not enforce the time limits of shop.tasks.charge.\n"
        "    Use --pool=prefork, or a timeout in the parent: ctx.invoke(…, timeout=30).\n"
    ) in capsys.readouterr().err
    checks.report_to_worker(options={"pool_cls": get_implementation("prefork")})
    assert "W026" not in capsys.readouterr().err
    shop(worker_pool="gevent")
    checks.report_to_worker()
    assert "This worker's pool, gevent, does not enforce" in capsys.readouterr().err
    tasks.clear()
    shop(task_time_limit=60)
    checks.report_to_worker(options={"pool_cls": "celery.concurrency.solo:TaskPool"})
    assert "This worker's pool, solo, does not enforce CELERY_TASK_TIME_LIMIT." in capsys.readouterr().err


def test_tasks_are_looked_at_only_in_an_app_that_is_finalized() -> None:
    app = Celery("shop", set_as_current=False, broker="memory://")

    assert checks.tasks.durable_tasks(app) == []
    assert app.finalized is False
    app.finalize()
    durable = checks.tasks.durable_tasks(app)
    assert scenarios.echo.name in [task.name for task in durable]
    assert all(isinstance(task, DurableTask) for task in durable)


# ------------------------------------------------------------------------------------------------------------ a worker


def test_a_broken_check_does_not_reach_the_worker(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(**kwargs: Any) -> list[CheckMessage]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(system_checks, "run_checks", broken)
    checks.report_to_worker()
    assert "The checks of conductor_app failed: ZeroDivisionError: oops" in caplog.text


def test_a_database_that_hangs_does_not_hold_up_the_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    monkeypatch.setattr(checks.worker, "DATABASE_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(checks.schema, "missing_tables", lambda using: released.wait(30) and [])
    started = time.monotonic()
    checks.report_to_worker()
    assert time.monotonic() - started < 15
    released.set()
    assert 'Database "default" does not answer (no answer yet), so its tables were not checked.' in (
        capsys.readouterr().err
    )


def test_the_checks_of_a_worker_can_be_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shop: Callable[..., Celery]
) -> None:
    shop(result_backend=None)
    monkeypatch.setenv("CELERY_SKIP_CHECKS", "1")
    checks.report_to_worker()
    assert capsys.readouterr().err == ""


def on_sqlite(path: Path) -> dict[str, str]:
    """The environment of a worker on another database than the test's own."""
    return {"DATABASE_URL": f"sqlite:///{path}", "CONDUCTOR_TEST_DATABASE_NAME": str(path)}


def test_a_worker_shows_what_is_wrong_and_starts_all_the_same(worker: Callable[..., Worker], tmp_path: Path) -> None:
    env = {**on_sqlite(tmp_path / "empty.sqlite3"), "CELERY_RESULT_BACKEND": "disabled://", "COLUMNS": "80"}
    started = worker(pool="solo", env=env)
    assert (
        'ERROR conductor.E001: conductor_app tables do not exist in database "default".\n'
        "    Run: python manage.py migrate conductor_app\n"
    ) in started.log
    assert "WARNING conductor.W009: CELERY_RESULT_BACKEND is not set" in started.log
    assert "This worker's pool, solo, does not enforce the time limits of tests.app." in started.log
    assert started.log.index("conductor.W009") < started.log.index(" ready.")
    assert "Traceback" not in started.log


def test_a_worker_starts_while_its_database_is_away(worker: Callable[..., Worker], tmp_path: Path) -> None:
    started = worker(pool="solo", env=on_sqlite(tmp_path / "nowhere" / "db.sqlite3"))
    assert (
        'WARNING conductor: Database "default" does not answer (unable to open database file), so its tables were not '
        "checked.\n"
    ) in started.log
    assert "Traceback" not in started.log
