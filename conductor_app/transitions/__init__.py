"""Every move of an execution from one status to the next. The only writer of ``Execution`` and ``FailedExecution``.

Each move is a guarded compare-and-set: it names the status (and, for a run, the fence) that it expects, and the loser
of a race changes nothing. What belongs together is one transaction: a final status and the parent's wake-up, a failure
and its ``FailedExecution``, a suspension and the child that is waited for. Messages and signals follow the commit.

The moves that every run makes are declared (``store.moves``): one statement on PostgreSQL, and a transaction of several
elsewhere.

Locks are taken child before parent, everywhere, so two moves cannot wait for each other.
"""

from __future__ import annotations

from conductor_app.transitions.announcing import announce_now, announced, take_for_announcement
from conductor_app.transitions.auditing import wake_stranded
from conductor_app.transitions.cancelling import (
    EXPIRED,
    cancel_flagged,
    cancel_running,
    end_late,
    expire,
    flag_many_children,
    request_cancel,
)
from conductor_app.transitions.claiming import HandOff, claim, claim_again
from conductor_app.transitions.creating import NewExecution, create
from conductor_app.transitions.creating_many import create_many
from conductor_app.transitions.failing import fail
from conductor_app.transitions.guards import patiently
from conductor_app.transitions.hastening import hasten, publish_again
from conductor_app.transitions.holding import hold
from conductor_app.transitions.holding import release as release_held
from conductor_app.transitions.pausing import pause, unpark_lost, unpause
from conductor_app.transitions.postponing import put_off, put_off_unknown
from conductor_app.transitions.recording import Together, record_step, record_together
from conductor_app.transitions.recovering import (
    decide_overdue,
    decide_overdue_together,
    dispatch_now,
    give_back,
    lose,
    note_refusal,
    put_back,
    take_for_dispatch,
    wait_for_row,
    worker_lost,
)
from conductor_app.transitions.reopening import reopen
from conductor_app.transitions.running import check_held, lock_held, note_astray, release, retry_later
from conductor_app.transitions.succeeding import succeed
from conductor_app.transitions.suspending import suspend
from conductor_app.transitions.tagging import tag, tags_of
from conductor_app.transitions.waits.as_completed import AsCompleted
from conductor_app.transitions.waits.event import AwaitEvent, send
from conductor_app.transitions.waits.first import First, cancel_losers
from conductor_app.transitions.waits.gather import Gather
from conductor_app.transitions.waits.invoke import Invocation
from conductor_app.transitions.waits.map import Map
from conductor_app.transitions.waits.members import MembersWait
from conductor_app.transitions.waits.message import take_if_there
from conductor_app.transitions.waits.sleep import Sleep
from conductor_app.transitions.waits.start import start_child
from conductor_app.transitions.waits.timer import start_timer
from conductor_app.transitions.waits.wait import Pending, Wait

__all__ = [
    "EXPIRED",
    "AsCompleted",
    "AwaitEvent",
    "First",
    "Gather",
    "HandOff",
    "Invocation",
    "Map",
    "MembersWait",
    "NewExecution",
    "Pending",
    "Sleep",
    "Together",
    "Wait",
    "announce_now",
    "announced",
    "cancel_flagged",
    "cancel_losers",
    "cancel_running",
    "check_held",
    "claim",
    "claim_again",
    "create",
    "create_many",
    "decide_overdue",
    "decide_overdue_together",
    "dispatch_now",
    "end_late",
    "expire",
    "fail",
    "flag_many_children",
    "give_back",
    "hasten",
    "hold",
    "lock_held",
    "lose",
    "note_astray",
    "note_refusal",
    "patiently",
    "pause",
    "publish_again",
    "put_back",
    "put_off",
    "put_off_unknown",
    "record_step",
    "record_together",
    "release",
    "release_held",
    "reopen",
    "request_cancel",
    "retry_later",
    "send",
    "start_child",
    "start_timer",
    "succeed",
    "suspend",
    "tag",
    "tags_of",
    "take_for_announcement",
    "take_for_dispatch",
    "take_if_there",
    "unpark_lost",
    "unpause",
    "wait_for_row",
    "wake_stranded",
    "worker_lost",
]
