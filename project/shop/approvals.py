"""The answer of a person to an order that waits for an approval."""

from __future__ import annotations

from conductor_app import api
from conductor_app.exceptions import ExecutionFinished, IdempotencyConflict
from project.shop.models import Order


class NotWaiting(Exception):
    """The order waits for no approval, or somebody else has answered."""


def answer(order: Order, *, yes: bool, by: str) -> None:
    """Approve or refuse an order: ``project.shop.tasks.fulfil`` goes on where it waits.

    Args:
        by: Who answers. The same answer again changes nothing.

    Raises:
        NotWaiting: It is too late, or too early.
    """
    if order.status != Order.Status.AWAITING_APPROVAL or order.execution_id is None:
        raise NotWaiting(f"{order} waits for no approval: it is {order.status}.")
    try:
        # One id for every answer to this order: of two people, the first one decides, and the second one is told so.
        api.send_event(order.execution_id, "approved", {"yes": yes, "by": by}, id="answer")
    except (ExecutionFinished, IdempotencyConflict) as error:
        raise NotWaiting(f"{order} has its answer already.") from error
