"""The subcommands of ``manage.py conductor``, one module each (``retry`` and ``cancel`` share one)."""
