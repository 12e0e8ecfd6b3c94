"""Operations for a project's own migrations: what has to change in stored executions when code changes."""

from __future__ import annotations

import logging
from typing import Any

from django.apps.registry import Apps
from django.core.exceptions import FieldDoesNotExist, ImproperlyConfigured
from django.db import transaction
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.db.models import Exists, OuterRef, Q, QuerySet

from conductor_app.body.names import check_name, gather_name
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, RenameRefused
from conductor_app.states import ExecutionStatus, StepKind
from conductor_app.store import clock, owners
from conductor_app.values.payloads import dumps, loads

logger = logging.getLogger(__name__)

#: How many steps are renamed in one transaction, if the migration has none of its own (``atomic = False``).
BATCH = 1_000
#: How many executions an error names.
_SHOWN = 5


class RenameStep(Operation):
    """Rename a step in the stored executions of a task, so that a replay by the new code finds it.

    It concerns every execution that may run again: open, failed and cancelled ones. Their children come along, and what
    is noted about failures. Run it while no worker runs: old code knows the old name only, new code the new one.
    The migration depends on one of ``conductor_app``'s, and may be reversed. It may be interrupted and run again.

    Args:
        task: Name of the task whose body calls the step.
        old: The step's name in the stored executions.
        new: Its name in the new code.

    Raises:
        InvalidArgument, InvalidArgumentType: An argument cannot be the name of a task or a step.
    """

    reversible = True
    reduces_to_sql = False

    def __init__(self, task: str, old: str, new: str) -> None:
        if not isinstance(task, str):
            raise InvalidArgumentType(f"task must be a task's name, got {type(task).__name__}")
        if not task:
            raise InvalidArgument("task must be a task's name, got an empty one")
        self.task = task
        self.old = check_name(old, "old step name")
        self.new = check_name(new, "new step name")
        if self.old == self.new:
            raise InvalidArgument(f'The old and the new name of the step are both "{self.old}".')

    def describe(self) -> str:
        """Return what the operation does, for ``migrate --plan``."""
        return f"Rename step {self.old} of {self.task} to {self.new}"

    @property
    def migration_name_fragment(self) -> str:
        """What ``makemigrations`` would call a migration with this operation alone."""
        return f"rename_step_{self.old}_{self.new}".lower()

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        """Change nothing: models stay as they are."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Rename ``old`` to ``new``.

        Raises:
            RenameRefused: The new name is taken in an execution, or a worker runs one. Nothing was changed.
        """
        self._rename(schema_editor, from_state, self.old, self.new)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Rename ``new`` to ``old``.

        Raises:
            RenameRefused: As for the way forwards.
        """
        self._rename(schema_editor, from_state, self.new, self.old)

    def _rename(self, schema_editor: BaseDatabaseSchemaEditor, state: ProjectState, old: str, new: str) -> None:
        state.clear_delayed_apps_cache()
        execution, failed_execution, step = _models(state.apps)
        alias = schema_editor.connection.alias
        if not self.allow_migrate_model(alias, step):
            return  # a router keeps our tables in another database
        executions, steps = execution.objects.using(alias), step.objects.using(alias)
        concerned = steps.filter(name=old, execution__task=self.task).exclude(
            execution__status=ExecutionStatus.SUCCEEDED.value
        )
        self._check_idle(executions, old)
        self._check_free(concerned, steps, old, new)
        renamed, last = 0, 0
        while True:
            with transaction.atomic(using=alias):
                rows = list(concerned.filter(pk__gt=last).order_by("pk").values_list("pk", "execution_id")[:BATCH])
                if not rows:
                    break
                parents = [parent for _, parent in rows]
                # The children first, as everywhere.
                executions.filter(parent_id__in=parents, step=old).update(step=new)
                failed_execution.objects.using(alias).filter(execution_id__in=parents, step=old).update(step=new)
                steps.filter(pk__in=[pk for pk, _ in rows]).update(name=new)
                _rename_gathers(steps.filter(execution_id__in=parents, kind=StepKind.GATHER.value), old, new)
                _rename_in_others(steps.filter(execution_id__in=parents, kind__in=_OTHERS), old, new)
            renamed, last = renamed + len(rows), rows[-1][0]
        logger.info("Step %s of %s is now %s, in %d executions.", old, self.task, new, renamed)

    def _check_idle(self, executions: QuerySet[Any], old: str) -> None:
        running = executions.filter(
            Q(task=self.task) | Q(parent__task=self.task, step=old),
            status=ExecutionStatus.RUNNING.value,
            lease_expires_at__gt=clock.now(),
        )
        found = list(running.order_by("pk").values_list("pk", "lease_owner")[:_SHOWN])
        if found:
            where = ", ".join(f"{pk} on {owners.shown(owner)}" for pk, owner in found)
            raise RenameRefused(
                f'Step "{old}" of {self.task} cannot be renamed while a worker runs it: '
                f"{where}. Stop the workers, migrate, and start them "
                "with the new code."
            )

    def _check_free(self, concerned: QuerySet[Any], steps: QuerySet[Any], old: str, new: str) -> None:
        taken = concerned.filter(Exists(steps.filter(execution_id=OuterRef("execution_id"), name=new)))
        found = list(taken.order_by("pk").values_list("execution_id", flat=True)[:_SHOWN])
        if found:
            raise RenameRefused(
                f'Step "{old}" of {self.task} cannot become "{new}": {", ".join(map(str, found))} '
                f"{'has' if len(found) == 1 else 'have'} both. Choose another name, or wait until they have ended."
            )


def _rename_gathers(gathers: QuerySet[Any], old: str, new: str) -> None:
    """Rename what waits for a started child: a gather is called by the steps of its members."""
    for gather in gathers:
        before = loads(gather.result)
        if old in before:
            members = [new if name == old else name for name in before]
            let_pass = getattr(gather, "max_failures", None)
            need = None if let_pass is None else len(members) - let_pass
            gather.name = gather_name(members, return_exceptions=not gather.fails_fast, need=need)
            gather.result = dumps(members, "members")
            changed = ["name", "result"]
            if getattr(gather, "counted", None):
                gather.counted = _renamed(gather.counted, old, new)
                changed.append("counted")
            gather.save(update_fields=changed)


def _renamed(counted: str, old: str, new: str) -> str:
    return ",".join(new if name == old else name for name in counted.split(","))


#: What also waits for other steps, and has a name of its own.
_OTHERS = [StepKind.FIRST.value, StepKind.AS_COMPLETED.value]


def _rename_in_others(waits: QuerySet[Any], old: str, new: str) -> None:
    """Rename what waits for a step, and the later waits of an ``as_completed``, which are called by it."""
    for wait in waits:
        name = f"{new}#{wait.name.removeprefix(f'{old}#')}" if wait.name.startswith(f"{old}#") else wait.name
        members = [new if member == old else member for member in loads(wait.result)]
        wait.name, wait.result = name, dumps(members, "members")
        wait.counted = _renamed(wait.counted or "", old, new)
        wait.save(update_fields=["name", "result", "counted"])


def _models(apps: Apps) -> tuple[Any, Any, Any]:
    try:
        execution, failed_execution, step = (
            apps.get_model("conductor_app", name) for name in ("Execution", "FailedExecution", "Step")
        )
        step._meta.get_field("fails_fast")
        return execution, failed_execution, step
    except (LookupError, FieldDoesNotExist):
        raise ImproperlyConfigured(
            "RenameStep needs the tables of conductor_app: add "
            '("conductor_app", "0002_children_and_events") to the dependencies of its migration.'
        ) from None
