"""What the tasks of ``scheduled_app`` are called; to import that one would register them."""

#: Which minute of each hour they start at, in the environment of a worker.
MINUTE = "CONDUCTOR_TEST_MINUTE"
#: How many schedules there are of each kind, and how their tasks are called.
NUMBER = 10
PREFIX = "tests.scheduled"
#: A task whose trees are kept for an hour.
KEPT = f"{PREFIX}.kept"
