"""What an execution keeps of the options that it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import current_app
from celery.backends.base import DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.utils.functional import maybe_list

from conductor_app.store.ids import new_root_id
from conductor_app.values.arguments import message_options

#: Options of ``apply_async`` that outlive a suspension, as they are stored.
_KEPT_OPTIONS = ("caller", "celery_id", "chain", "group_id", "group_index", "root_id", "parent_id")


def kept_options(task: Any, options: Mapping[str, Any], *, is_root: bool) -> dict[str, Any]:
    """Return what the row of an execution is to say of its call.

    Args:
        task: The ``DurableTask``.
        options: Options of ``apply_async``, and the task's own.
        is_root: Whether its result is Celery's business too.
    """
    kept = {name: options[name] for name in _KEPT_OPTIONS if name in options} | message_options(task.name, options)
    for name in ("link", "link_error"):
        if name in options:
            kept[name] = _with_ids(options[name])
    if "chord" in options:
        kept["chord"] = _with_callback_ids(options["chord"])
    if is_root and not isinstance(task.app.backend, DisabledBackend):
        ignores = options.get("ignore_result", task.ignore_result)
        if not ignores:
            kept["ignore_result"] = False
        elif task.stores_ignored_errors or task.app.conf.task_store_errors_even_if_ignored:
            kept["store_error"] = True
    if any(kept.get(name) for name in ("store_error", "link", "link_error", "chain", "chord")) or (
        kept.get("ignore_result") is False
    ):
        kept["announce"] = True
    return kept


def _with_ids(signatures: Any) -> list[Any]:
    """Fix the ids of callbacks when they are stored, so that calling one twice is the same execution."""
    return [_with_id(maybe_signature(signature, app=current_app)) for signature in maybe_list(signatures) or ()]


def _with_id(signature: Any) -> Any:
    if not isinstance(signature, Signature):
        return signature
    fixed = signature.clone()
    if fixed.get("subtask_type"):
        fixed.freeze()
    else:
        fixed.options.setdefault("task_id", str(new_root_id()))
    return dict(fixed)


def _with_callback_ids(body: Any) -> Any:
    """Fix the ids of the callbacks of a chord's body; the body itself has one."""
    found: Any = maybe_signature(body, app=current_app)
    fixed = found.clone()
    for name in ("link", "link_error"):
        if fixed.options.get(name):
            fixed.options[name] = _with_ids(fixed.options[name])
    return dict(fixed)
