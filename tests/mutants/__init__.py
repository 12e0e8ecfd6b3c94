"""Mutants: each takes one guard out of a copy of the product, and the tests that are to notice run against the copy.

``python -m tests.mutants`` runs them; ``docs/contributing/proofs.md`` tells how to read what it says.
"""
