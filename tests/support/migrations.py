"""Run an operation as a project's migration does."""

from __future__ import annotations

from functools import cache

from django.db import connection
from django.db.migrations import Migration
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState


@cache
def state() -> ProjectState:
    """The models as the migrations of all installed apps leave them."""
    return MigrationLoader(connection).project_state()


def migrate(*operations: Operation, backwards: bool = False, atomic: bool = True) -> None:
    """Apply a migration of the app ``shop`` with these operations, or take it back."""
    migration = Migration("0002_operations", "shop")
    migration.operations = list(operations)
    migration.atomic = atomic
    with connection.schema_editor(atomic=atomic) as editor:
        if backwards:
            migration.unapply(state(), editor)
        else:
            migration.apply(state(), editor)
