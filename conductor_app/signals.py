"""One Django signal for each thing that happens to an execution, sent after it is committed.

Receivers get ``sender`` (the task's name) and ``execution``, an ``Execution`` as it was written: only the fields that
the transition touched are certain to be loaded. A receiver's exception is logged and changes nothing
(``Signal.send_robust``). Signals are sent by the process that made the transition, and not by a process that died
before it could.
"""

from __future__ import annotations

from django.dispatch import Signal

#: Stored as ``queued``, by a caller or as a child.
execution_created = Signal()
#: A worker begins a run; ``execution.attempt`` tells which attempt.
execution_started = Signal()
#: The run ended to wait; also ``step``, the name of the awaited step.
execution_suspended = Signal()
#: The process that ran it is dead, or its lease has lapsed. What follows has a signal of its own.
execution_lost = Signal()
#: An attempt failed or its worker died, and another one is due; also ``failure``, ``delay`` in seconds.
execution_retrying = Signal()
#: A run is over, however; also ``outcome``, a ``states.RunOutcome``. What it leads to has a signal of its own, but for
#: ``released``.
run_ended = Signal()
#: Queued, and its message is published again: no worker has answered the last one.
execution_redispatched = Signal()
#: Final: also ``status``, and ``failure`` if it failed.
execution_finished = Signal()
#: A sweep is over. The sender is the sweeper's module and there is no ``execution``, but ``found``, how often each kind
#: of finding was acted on, and ``seconds``.
sweep_finished = Signal()
