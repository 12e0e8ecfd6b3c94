"""``ctx.logger``, and the ids in lines about an execution."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from conductor_app import logs
from conductor_app.models import Execution

#: Where ``ctx.logger`` writes: apart from the engine's own lines, so that a worker can show ids on the body's.
body_logger = logging.getLogger("conductor_app.execution.body")


class ReplayAwareLogger(logging.LoggerAdapter[logging.Logger]):
    """``ctx.logger``: adds the execution's ids, and drops lines that an earlier run has already written."""

    def __init__(self, execution: Execution, is_replaying: Callable[[], bool]) -> None:
        super().__init__(body_logger, {})
        self._execution = execution
        self._is_replaying = is_replaying

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name is logging's
        """Whether a line of this level would be written now."""
        return not self._is_replaying() and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the ids to the record."""
        # By its own names for them Celery's formatter finds them in a thread that a step's function has started, too.
        celery_names = {"task_id": str(self._execution.pk), "task_name": self._execution.task}
        kwargs["extra"] = {**log_extra(self._execution), **celery_names, **(kwargs.get("extra") or {})}
        return msg, kwargs


def log_extra(execution: Execution) -> dict[str, Any]:
    """Return what is added to the record of each line about an execution."""
    # Its step, if one is being called, is the filter's to tell.
    return {name: value for name, value in logs.fields_of(execution).items() if name != "step"}
