"""The drivers are there where the servers are: they come with ``make test-services``."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("psycopg") else ["test_command.py", "test_growth.py", "test_profiling.py"]
