"""Whether a process of Celery's prefork pool was told to end."""

from __future__ import annotations

from typing import Any, cast

from billiard import common as billiard_common


def is_told_to_end() -> bool:
    """Tell whether this process of a pool was sent the signal to end."""
    # billiard 4.2, which Celery 5.6 has, does not tell.
    fired = getattr(billiard_common, "terminate_handler_fired", None)
    return bool(cast(Any, billiard_common)._should_have_exited[0] if fired is None else fired())
