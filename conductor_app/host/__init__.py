"""What we know of Celery's, kombu's and billiard's insides, and everything that leans on it."""
