"""``python -m project.demo``: a few hundred orders, one worker, one ``kill -9``, and what the database then says."""
