"""Settings of the project. Without any environment variable it runs on SQLite and needs no server.

========================= ============================================ ===========================================
Environment variable      Default                                      For example
========================= ============================================ ===========================================
``DATABASE_URL``          ``sqlite:///`` + ``var/db.sqlite3``          ``postgres://shop:…@db.example.com/shop``
``CELERY_BROKER_URL``     ``memory://``, fed from the database         ``amqp://shop:…@mq.example.com//``
``CELERY_RESULT_BACKEND`` ``django-db``                                ``redis://redis.example.com/1``
``DEBUG``                 ``true``                                     ``false``
``SECRET_KEY``            a constant, only while ``DEBUG`` is on       50 random characters
``ALLOWED_HOSTS``         none; this machine while ``DEBUG`` is on     ``shop.example.com,www.example.com``
``EMAIL_BACKEND``         ``…console.EmailBackend``                    ``…smtp.EmailBackend``
========================= ============================================ ===========================================
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent
VAR_DIR = BASE_DIR / "var"
VAR_DIR.mkdir(exist_ok=True)


# --- Security --------------------------------------------------------------------------------------------------------

DEBUG = os.environ.get("DEBUG", "true").strip().lower() in {"1", "true", "yes", "on"}
ALLOWED_HOSTS = [host for host in os.environ.get("ALLOWED_HOSTS", "").replace(" ", "").split(",") if host]
SECRET_KEY = os.environ.get("SECRET_KEY", "")
if not SECRET_KEY:
    if not DEBUG:
        raise ImproperlyConfigured("SECRET_KEY is not set. With DEBUG off, the environment has to provide it.")
    SECRET_KEY = "django-insecure-this-key-is-public-and-for-development-only"  # noqa: S105


# --- Django ----------------------------------------------------------------------------------------------------------

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_celery_results",
    "conductor_app",
    "project.shop",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

ROOT_URLCONF = "project.urls"
WSGI_APPLICATION = "project.wsgi.application"
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
EMAIL_BACKEND = os.environ.get("EMAIL_BACKEND", "django.core.mail.backends.console.EmailBackend")
DEFAULT_FROM_EMAIL = "shop@example.com"


# --- Database --------------------------------------------------------------------------------------------------------

#: What each database needs for several processes that write at the same time.
DATABASE_OPTIONS: dict[str, dict[str, Any]] = {
    "django.db.backends.sqlite3": {
        # Take the write lock when a transaction begins. SQLite's own default takes it at the first write, and then
        # fails at once, whatever the timeout, if another process has written since the transaction began to read.
        "transaction_mode": "IMMEDIATE",
        # Seconds to wait for that lock.
        "timeout": 20,
        # WAL: readers and the writer do not block each other. FULL: a commit outlives a power cut; with WAL and NORMAL
        # the last ones may be lost.
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL",
    },
    # Without these, a client waits for a server that has silently gone as long as the kernel does, up to two hours.
    "django.db.backends.postgresql": {
        "connect_timeout": 5,
        "tcp_user_timeout": 15_000,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    },
    "django.db.backends.mysql": {
        "charset": "utf8mb4",
        "isolation_level": "read committed",
        # Longer than the longest query.
        "connect_timeout": 5,
        "read_timeout": 60,
        "write_timeout": 60,
    },
}

# Workers keep their connections from one run to the next for so many seconds; connecting anew costs more than a run.
_database_url = os.environ.get("DATABASE_URL") or f"sqlite:///{VAR_DIR / 'db.sqlite3'}"
DATABASES = {"default": dj_database_url.parse(_database_url, conn_max_age=60)}
_database: Any = DATABASES["default"]
_database["OPTIONS"] = {**DATABASE_OPTIONS.get(_database["ENGINE"], {}), **_database.get("OPTIONS", {})}

if _database["ENGINE"] == "django.db.backends.mysql" and importlib.util.find_spec("MySQLdb") is None:
    import pymysql

    pymysql.install_as_MySQLdb()


# --- Celery ----------------------------------------------------------------------------------------------------------

# memory:// is no toy here: conductor_app's workers feed it from the database, so no message can be lost with it.
CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", "memory://")
CELERY_RESULT_BACKEND = os.environ.get("CELERY_RESULT_BACKEND", "django-db")
CELERY_TIMEZONE = TIME_ZONE

# Nothing but JSON: whoever can write to the broker could run code through a pickle.
CELERY_ACCEPT_CONTENT = ["json"]

# One message per pool process at a time. The default, 4, parks short executions behind a long one.
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

# Seconds after which a pool process that died is missed, and what it ran is queued again. Celery's default is 10.
CELERY_WORKER_LOST_WAIT = 1

# Wait for a broker that is away, for ever. By default a worker gives up and exits after some 46 minutes.
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None

_broker = CELERY_BROKER_URL.partition("://")[0].partition("+")[0]
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {}
if _broker in {"redis", "rediss"}:
    # Without these, a client waits for ever for a server that has silently gone.
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }
elif _broker in {"amqp", "amqps", "pyamqp"}:
    # Without it, RabbitMQ may drop a message and nobody is told.
    CELERY_BROKER_TRANSPORT_OPTIONS = {"confirm_publish": True}


# --- conductor_app ---------------------------------------------------------------------------------------------------

# Every key is optional; docs/reference/settings.md lists them.
CONDUCTOR: dict[str, Any] = {}


# --- Logging ---------------------------------------------------------------------------------------------------------

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname:<7} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    # One handler, on the root: in a worker, Celery puts its own in this place.
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        "django": {"handlers": [], "level": "INFO"},
        "conductor_app": {"level": "INFO"},
        "project": {"level": "INFO"},
    },
}
