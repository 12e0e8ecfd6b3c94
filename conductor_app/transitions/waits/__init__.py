"""Each kind of wait in one module: how it is opened, settled, overdue, reopened, repaired, shown and worded.

A module is named as its ``StepKind`` is stored, and has what it does as ``KIND``. What is asked of that is in
``transitions.kinds``. Beside them stand ``wait``, on which all build, and ``children``, for those that have some.
"""

from __future__ import annotations

from importlib import import_module

from conductor_app.states import StepKind
from conductor_app.transitions import kinds

for _kind in StepKind:
    kinds.register(_kind, import_module(f"{__name__}.{_kind.value}").KIND)
