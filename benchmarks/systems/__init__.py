"""What is measured: one module for each system, each a program that runs in a virtual environment of its own.

    python -m benchmarks.systems.NAME prepare | client | worker

``prepare`` makes the tables, ``worker`` runs one worker process until it is killed, and ``client`` starts work as it is
told on standard input, one JSON object a line (see ``System.serve``).
"""
