"""Programs that measure. Each runs real workers on the servers that ``DATABASE_URL`` and ``CELERY_BROKER_URL`` name."""
