"""Canvas of every shape, of durable tasks and of plain ones, each an object that can be called again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import ANY

from celery import chain, chord, group, shared_task
from celery.canvas import Signature

from conductor_app import ExecutionContext, durable_task
from tests.app.ledger import note


def _run(value: Any, shape: str, label: str) -> str:
    """Note that a body has run, and return what has led to it."""
    note(None, shape, label)
    came = "+".join(sorted(value)) if isinstance(value, list) else value or ""
    return f"({came}){label}"


@durable_task
def durable(ctx: ExecutionContext, value: Any = None, *, shape: str, label: str) -> str:
    return _run(value, shape, label)


@durable_task
def suspended(ctx: ExecutionContext, value: Any = None, *, shape: str, label: str) -> str:
    """As ``durable``, in several runs."""
    ctx.invoke("child", "tests.app.scenarios.echo")
    return str(ctx.step("run", _run, value, shape, label))


@durable_task(max_retries=0)
def fails(ctx: ExecutionContext, *, shape: str, label: str) -> None:
    _run(None, shape, label)
    raise ValueError("no")


@shared_task
def plain(value: Any = None, *, shape: str, label: str) -> str:
    return _run(value, shape, label)


@shared_task
def plain_fails(*, shape: str, label: str) -> None:
    _run(None, shape, label)
    raise ValueError("no")


@shared_task(ignore_result=True)
def calls_thrice(shape: str, *, is_durable: bool) -> None:
    """Call one object three times from inside of one plain body."""
    canvas = SHAPES["chain"].build(Family(shape, durable if is_durable else plain, plain))
    for _ in range(3):
        canvas.delay()


@dataclass(frozen=True)
class Family:
    """What a shape is made of."""

    shape: str
    task: Any
    plain: Any
    failing: Any = None

    def __call__(self, label: str, task: Any = None, **options: Any) -> Any:
        """A signature of the family's task."""
        return (task or self.task).s(shape=self.shape, label=label).set(**options)


@dataclass(frozen=True)
class Shape:
    """One shape, and what becomes of calling it three times.

    Attributes:
        build: Makes the object.
        runs: How often each body runs, by its label.
        result: What each call returns; ``None`` if it fails, ``ANY`` if Celery itself does not always get it: some
            backends wait in vain for two results of one id.
        has_plain: Whether it has a plain part in the durable family, too, that this process sends.
        one_by_one: Whether Celery itself takes the next call only when the last one is done.
        since: The first Celery with which it can be called again. Before, a chord's header was frozen in place, and the
            later calls of the object counted for the first one's body.
    """

    build: Callable[[Family], Any]
    runs: Mapping[str, int]
    result: Any
    has_plain: bool = False
    one_by_one: bool = False
    since: tuple[int, int] = (5, 6)


def frozen(signature: Any) -> Any:
    """Fix its ids, as whoever wants to know them before it is called does."""
    signature.freeze()
    return signature


def _was_called(canvas: Any) -> Any:
    """An object that has been called before it becomes a part of another one."""
    canvas.apply_async()
    return canvas


def _linked(f: Family, option: str, callback: Any, first: Any = None) -> Signature:
    return f("a", first).set(**{option: [callback]})


A, AB, ABC, ABCD = (dict.fromkeys(labels, 3) for labels in ("a", "ab", "abc", "abcd"))

SHAPES: dict[str, Shape] = {
    "chain": Shape(lambda f: chain(f("a"), f("b"), f("c")), ABC, "((()a)b)c"),
    "of two": Shape(lambda f: chain(f("a"), f("b")), AB, "(()a)b"),
    "pipe": Shape(lambda f: f("a") | f("b") | f("c"), ABC, "((()a)b)c"),
    "chain of chains": Shape(lambda f: chain(chain(f("a"), f("b")), chain(f("c"), f("d"))), ABCD, "(((()a)b)c)d"),
    "to a group": Shape(lambda f: f("a") | group(f("b"), f("c")), ABC, ["(()a)b", "(()a)c"]),
    "through a group": Shape(lambda f: f("a") | group(f("b"), f("c")) | f("d"), ABCD, "((()a)b+(()a)c)d"),
    "from a group": Shape(lambda f: group(f("a"), f("b")) | f("c"), ABC, "(()a+()b)c"),
    "chord": Shape(lambda f: chord([f("a"), f("b")], f("c")), ABC, "(()a+()b)c", since=(5, 7)),
    "chord to a chain": Shape(lambda f: chord([f("a"), f("b")], f("c") | f("d")), ABCD, "((()a+()b)c)d", since=(5, 7)),
    "chord of chains": Shape(lambda f: chord([f("a") | f("b"), f("c")], f("d")), ABCD, "((()a)b+()c)d", since=(5, 7)),
    "chord in a chain": Shape(lambda f: f("a") | chord([f("b"), f("c")], f("d")), ABCD, "((()a)b+(()a)c)d"),
    "group": Shape(lambda f: group(f("a"), f("b")), AB, ["()a", "()b"]),
    "group of chains": Shape(lambda f: group(f("a") | f("b"), f("c") | f("d")), ABCD, ["(()a)b", "(()c)d"]),
    "plain first": Shape(lambda f: f("a", f.plain) | f("b"), AB, "(()a)b", has_plain=True),
    "plain in the middle": Shape(lambda f: f("a") | f("b", f.plain) | f("c"), ABC, "((()a)b)c"),
    "plain last": Shape(lambda f: f("a") | f("b", f.plain), AB, "(()a)b"),
    "plain header": Shape(
        lambda f: chord([f("a", f.plain), f("b", f.plain)], f("c")), ABC, "(()a+()b)c", has_plain=True, since=(5, 7)
    ),
    "plain body": Shape(lambda f: chord([f("a"), f("b")], f("c", f.plain)), ABC, "(()a+()b)c", since=(5, 7)),
    "frozen": Shape(lambda f: frozen(f("a")), A, "()a"),
    "frozen chain": Shape(lambda f: frozen(chain(f("a"), f("b"))), AB, "(()a)b"),
    "frozen group": Shape(lambda f: frozen(group(f("a"), f("b"))), AB, ANY),
    "frozen chord": Shape(
        lambda f: frozen(chord([f("a"), f("b")], f("c"))), ABC, "(()a+()b)c", one_by_one=True, since=(5, 7)
    ),
    "frozen last": Shape(lambda f: f("a") | frozen(f("b")), AB, "(()a)b"),
    "link": Shape(lambda f: _linked(f, "link", f("b")), AB, "()a"),
    "frozen link": Shape(lambda f: _linked(f, "link", frozen(f("b"))), AB, "()a"),
    "chain as a link": Shape(lambda f: _linked(f, "link", f("b") | f("c")), ABC, "()a"),
    "link_error": Shape(lambda f: _linked(f, "link_error", f("b").set(immutable=True), f.failing), AB, None),
    "frozen link_error": Shape(
        lambda f: _linked(f, "link_error", frozen(f("b").set(immutable=True)), f.failing), AB, None
    ),
    "called before": Shape(lambda f: _was_called(f("a") | f("b")) | f("c"), {"a": 4, "b": 4, "c": 3}, "((()a)b)c"),
}
