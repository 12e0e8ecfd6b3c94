"""Run a page's examples in this process, with a stand-in for a worker."""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io
import sys
import traceback
import unittest
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

from celery import _state, signals
from celery.utils.dispatch import Signal
from django.db import transaction

from conductor_app.host import inline
from conductor_app.store import clock
from conductor_app.tasks import decorator
from conductor_app.testing import Conductor
from conductor_app.values.limits import Limit
from project.celery import app
from tests.docs.pages import Block

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Session:
    """The modules that a page shows, and the one namespace of everything else on it."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        """Run one block and check what it shows.

        Raises:
            AssertionError: The output differs.
        """
        if block.language == "pycon":
            self._run_examples(block)
        elif block.path:
            self._run_module(block)
        else:
            self._run_statements(block)

    def _run_module(self, block: Block) -> None:
        module = _module(block.module)
        tree = ast.parse(block.text, str(block))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                # A later version of the file: Celery would keep the task of the earlier one.
                app.tasks.pop(f"{block.module}.{node.name}", None)
        exec(_compile(block, tree), module.__dict__)
        work()
        _run_test_cases(module, [node.name for node in tree.body if isinstance(node, ast.ClassDef)])
        _run_test_functions(module, [node.name for node in tree.body if isinstance(node, ast.FunctionDef)])

    def _run_statements(self, block: Block) -> None:
        for node in ast.parse(block.text, str(block)).body:
            exec(_compile(block, ast.Module([node], [])), self.namespace)
            work()

    def _run_examples(self, block: Block) -> None:
        for example in doctest.DocTestParser().get_examples(block.text, str(block)):
            where = f"{block.page}:{block.line + example.lineno}"
            flags = _FLAGS
            got = io.StringIO()
            error = ""
            try:
                code = compile("\n" * (block.line + example.lineno - 1) + example.source, block.page, "single")
                with contextlib.redirect_stdout(got):
                    exec(code, self.namespace)
            except Exception as raised:
                error = "".join(traceback.format_exception_only(raised))
                if example.exc_msg is None:
                    raise AssertionError(f"{where}: {example.source.strip()} raised {error}") from raised
            if example.exc_msg is not None:
                assert matches(example.exc_msg, error, flags), f"{where}: expected {example.exc_msg}, got {error}"
            else:
                assert matches(example.want, got.getvalue(), flags), (
                    f"{where}: {example.source.strip()}\nexpected:\n{example.want}\ngot:\n{got.getvalue()}"
                )
            work()


def _run_test_cases(module: ModuleType, names: list[str]) -> None:
    """Run the test cases that a page shows."""
    cases = [value for name in names if issubclass(value := getattr(module, name), unittest.TestCase)]
    for case in cases:
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        assert result.testsRun, f"{case.__name__} has no tests"
        assert result.wasSuccessful(), "\n".join(trace for _test, trace in (*result.errors, *result.failures))


def _run_test_functions(module: ModuleType, names: list[str]) -> None:
    """Run the tests for pytest that a page shows, with the fixtures that they name."""
    for name in names:
        if name.startswith("test_"):
            test = getattr(module, name)
            # As pytest-django's `db`, which undoes what a test has written.
            around: Any = transaction.atomic()
            around._from_testcase = True
            with around, Conductor() as conductor:
                fixtures = {"conductor": conductor, "db": None}
                test(**{parameter: fixtures[parameter] for parameter in inspect.signature(test).parameters})
                transaction.set_rollback(True)


def work() -> None:
    """Run all that is due, as a worker would."""
    inline.run_until_idle(app)


def matches(want: str, got: str, flags: int = _FLAGS) -> bool:
    """Compare as ``doctest`` does."""
    return doctest.OutputChecker().check_output(want, got, flags)


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """A session whose modules, tasks, limits and receivers of Celery's signals are gone afterwards."""
    limits = dict(Limit._known)
    # Pages and tests have limits of one name that differ.
    Limit._known.clear()
    tasks, modules = set(app.tasks), set(sys.modules)
    names = [(known, dict(known)) for known in (decorator._defined_at, decorator._scheduled_at)]
    finalizers = set(_state._on_app_finalizers)
    receivers = [(signal, list(signal.receivers)) for signal in vars(signals).values() if isinstance(signal, Signal)]
    try:
        yield Session()
    finally:
        for name in set(app.tasks) - tasks:
            del app.tasks[name]
        for name in set(sys.modules) - modules:
            if getattr(sys.modules[name], "__doc_page__", False):
                del sys.modules[name]
        for known, before in names:
            known.clear()
            known.update(before)
        Limit._known.clear()
        Limit._known.update(limits)
        _state._on_app_finalizers.intersection_update(finalizers)
        for signal, known in receivers:
            signal.receivers[:] = known
            signal.sender_receivers_cache.clear()
        clock.reset()


def _module(name: str) -> ModuleType:
    """The module of that name, made with its packages if it is not there."""
    parent, _, last = name.rpartition(".")
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = ModuleType(name)
        module.__dict__["__doc_page__"] = True
        module.__dict__["__path__"] = []
    if parent:
        setattr(_module(parent), last, module)
    return module


def _compile(block: Block, tree: ast.Module) -> CodeType:
    ast.increment_lineno(tree, block.line - 1)
    return compile(tree, block.page, "exec")
