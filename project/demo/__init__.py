"""``python -m project.demo``: a hundred orders, one worker, one ``kill -9``, and what the database then says."""
