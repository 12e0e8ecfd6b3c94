"""One run, from its claim to its end; who tells Celery of it; and what goes on by itself: sweeper and pruner."""
