"""What this process knows of the worker that it is."""

from __future__ import annotations

#: Set by the bootstep: whether this worker's event loop is slow to send acknowledgements.
acknowledge_directly = False
#: Set by the bootstep: whether bodies run in greenlets. Celery then gives a greenlet's number for that of its process.
runs_greenlets = False
