"""Real servers and workers, and everything that can happen to them: ``python -m tests.chaos`` (``make chaos``).

A round has five parts, one module each: the servers and workers (``stack``), the executions and what has to come of
them (``workload``, ``tasks``), what happens to the stack (``nemesis``), and what has to hold when it is over
(``checker``). ``__main__`` plays it and reports.
"""
