"""What Celery, kombu, billiard and Django do that ``conductor_app`` relies on, and does not control.

No test here is about ``conductor_app``. When one fails with a new release of theirs, the module that it names has to be
looked at again.
"""
