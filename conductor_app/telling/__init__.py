"""All that is stored about one execution, and what it means in plain words: for the commands and the admin.

``story`` reads the rows. Sentences are worked out from rows that the caller has read: nothing is queried for them, so a
list costs no query per row; ``queues.with_queue`` alone asks. Sentences are in the active language; commands,
``labels.document`` and the words of ``labels.label`` never are.
"""
