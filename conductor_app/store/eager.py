"""Whose eager run this context is in: ``.apply()``, or Celery's eager mode.

Such a run skips the due times of one tree, in a process beside which workers live on the same database. So what it
skips hangs on the context, which no other thread sees, and ends where its body calls what acts on executions from
``outside`` of a body: the rows of other trees get the database's own time, and their messages are published.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_NOTHING = dt.timedelta()


@dataclass
class Tree:
    """One tree that runs eagerly."""

    root_id: uuid.UUID
    #: How far its clock is ahead of the database's.
    skipped: dt.timedelta = _NOTHING


_tree: ContextVar[Tree | None] = ContextVar("conductor_app_eager_tree", default=None)
_is_outside: ContextVar[bool] = ContextVar("conductor_app_eager_outside", default=False)


@contextmanager
def running(root_id: uuid.UUID) -> Iterator[Tree]:
    """Run one tree eagerly; its clock starts as the database's, also inside of another tree's run."""
    tree = Tree(root_id)
    tree_token, outside_token = _tree.set(tree), _is_outside.set(False)
    try:
        yield tree
    finally:
        _is_outside.reset(outside_token)
        _tree.reset(tree_token)


@contextmanager
def outside() -> Iterator[None]:
    """Act as somebody outside of the tree that runs here, if one does."""
    token = _is_outside.set(True)
    try:
        yield
    finally:
        _is_outside.reset(token)


def skipped() -> dt.timedelta:
    """Return how far the clock is ahead of the database's for what is done now."""
    tree = _tree.get()
    return _NOTHING if tree is None or _is_outside.get() else tree.skipped


def runs(root_id: uuid.UUID | None) -> bool:
    """Tell whether the eager run of this context sees to an execution that is being queued.

    Args:
        root_id: The root of its tree; ``None`` if that is not known, which counts as the own one but ``outside``.
    """
    tree = _tree.get()
    return tree is not None and (not _is_outside.get() or root_id == tree.root_id)
