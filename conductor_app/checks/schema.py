"""The tables."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Tags
from django.core.management.base import BaseCommand
from django.db import Error as AnyDatabaseError
from django.db import connections
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from conductor_app.models import Execution, FailedExecution, Step, database

MODELS = (Execution, Step, FailedExecution)


def missing_tables(using: str) -> list[str]:
    """Return the tables that the database lacks.

    Raises:
        Error: It cannot be asked.
    """
    connection = connections[using]
    with connection.cursor() as cursor:
        present = set(connection.introspection.table_names(cursor))
    return [table for table in (model._meta.db_table for model in MODELS) if table not in present]


def unapplied_migrations(using: str) -> list[str]:
    """Return our migrations that the database has not seen, in one query and without those of other apps.

    Raises:
        Error: It cannot be asked.
    """
    label = Execution._meta.app_label
    module, _is_named = MigrationLoader.migrations_module(label)
    if module is None:  # The project has switched migrations off: its tables come from the models.
        return []
    names = {found.name for found in pkgutil.iter_modules(import_module(module).__path__) if found.name[0] not in "_~"}
    applied = MigrationRecorder(connections[using]).migration_qs.filter(app=label).values_list("name", flat=True)
    return sorted(names.difference(applied))


def tables_missing(using: str) -> CheckMessage:
    """Return E001 for a database."""
    return checks.Error(
        f'conductor_app tables do not exist in database "{using}".',
        hint="Run: python manage.py migrate conductor_app",
        id="conductor.E001",
    )


# Without our tag: Django 6.1 runs the checks of a tag on all databases, although nobody named one, and a database that
# does not answer would hold up a worker that starts, and `manage.py check --tag conductor`.
@checks.register(Tags.database)
def check_tables(databases: Sequence[str] | None = None, **_kwargs: Any) -> list[CheckMessage]:
    """E001: the tables are missing."""
    using = database()
    if using not in (databases or ()) or _is_migrating():
        return []
    try:
        return [tables_missing(using)] if missing_tables(using) else []
    except AnyDatabaseError:
        return []  # Not about tables; whatever comes next will say so.


def _is_migrating() -> bool:
    """Tell whether ``manage.py migrate`` runs the checks: it would refuse to create the tables for lack of them."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        command = frame.f_locals.get("self")
        if isinstance(command, BaseCommand) and any(
            cls.__module__ == "django.core.management.commands.migrate" for cls in type(command).__mro__
        ):
            return True
    return False
