"""What a thread asks of Celery's event loop is done at once."""

from __future__ import annotations

import threading
import time

from kombu.asynchronous import Hub

from conductor_app.host import loops


def test_another_thread_wakes_a_loop_that_waits() -> None:
    """kombu 5.7 does that itself. The second time round is after a lost connection."""
    hub = Hub()
    hub.timer.call_repeatedly(60, lambda: None)
    for _ in range(2):
        loops.install(hub)
        done: list[float] = []
        asked = threading.Timer(0.3, lambda done=done: hub.call_soon(lambda: done.append(time.monotonic())))
        began = time.monotonic()
        asked.start()
        loop = hub.create_loop()
        while not done and time.monotonic() < began + 20:
            next(loop)
        assert done
        assert done[0] < began + 5, "the loop waits for a minute"
        loop.close()
        hub.reset()
        hub.timer.call_repeatedly(60, lambda: None)
    hub.close()
