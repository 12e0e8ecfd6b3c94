"""How a durable task is called by whom ``.delay()`` does not serve: for many at once, and from an event loop."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack

from asgiref.sync import sync_to_async

from conductor_app import transitions
from conductor_app.body import headers
from conductor_app.body.children import child_arguments
from conductor_app.body.misuse import hint_at_repeated_call
from conductor_app.exceptions import InvalidArgument, ProgrammingError
from conductor_app.host import inline
from conductor_app.models import Execution
from conductor_app.store.event_loops import check_none_runs
from conductor_app.tasks import many
from conductor_app.tasks.identity import check_same
from conductor_app.tasks.refusals import RefusingTask
from conductor_app.tasks.result import DurableResult
from conductor_app.values.options import CallOptions

P = ParamSpec("P")
R = TypeVar("R")


class CallingTask(RefusingTask[P, R]):
    """A durable task's calls beside ``apply_async``."""

    abstract = True

    if TYPE_CHECKING:  # what ``DurableTask`` has

        def new_execution(self, *args: Any, **kwargs: Any) -> transitions.NewExecution: ...

        def _add_callers(self, options: dict[str, Any]) -> None: ...

        def _creating(self) -> AbstractContextManager[None]: ...

        def _result_of(self, execution: Execution, options: Mapping[str, Any], *, is_new: bool) -> DurableResult[R]: ...

    def start_many(
        self,
        payloads: Iterable[object],
        *,
        idempotency_keys: Sequence[str | None] | None = None,
        unique_keys: Sequence[str | None] | None = None,
        tags: Mapping[str, str] | None = None,
        countdown: float | dt.timedelta | None = None,
        deadline: float | dt.timedelta | dt.datetime | str | None = None,
    ) -> list[DurableResult[R]]:
        """Store one execution for each payload in the current transaction, all or none, in few statements.

        The messages of the first 1,000 follow the commit; the workers publish the others.

        Args:
            payloads: At most 10,000. A mapping is an execution's keyword arguments; anything else but ``None`` is its
                only argument.
            idempotency_keys: One for each payload, or ``None`` in its place; as for ``apply_async``. Of several
                payloads with one key, the first is stored.
            unique_keys: One for each payload, instead of the key that the decorator's ``unique`` makes of it; ``None``
                in its place leaves it that. What becomes of one whose key an open execution has, the decorator says:
                ``"return"`` (the default) returns that, ``"refuse"`` raises, ``"replace"`` is for single calls.
            tags: Those of each execution's tree; they win over the decorator's.
            countdown: Seconds, or a ``timedelta``, until they may start.
            deadline: When the tree of each is cancelled; as for ``apply_async``.

        Returns:
            For each payload the result of its execution, whose ``is_new`` tells whether this payload has been stored.

        Raises:
            NotSerializable, PayloadTooLarge, TooManyTags, InvalidArgument, InvalidArgumentType: Nothing is stored; the
                message names the payload, such as ``payloads[17]``.
            QueueNotFound: As for ``apply_async``.
            IdempotencyConflict: A key belongs to an execution with another payload, or to two different payloads.
            DuplicateExecution: With ``on_conflict="refuse"``, an open execution or two of the payloads have a unique
                key. Nothing is stored; the message names the payload.
            BlockingCallInEventLoop: An event loop runs here; use ``astart_many``.
        """
        call = f"{self.name}.start_many()"
        check_none_runs(call, f"`await {self.name}.astart_many(…)`")
        each = many.check_payloads(payloads, call)
        keys = many.check_keys(idempotency_keys, "idempotency_keys", len(each), call)
        uniques = many.check_keys(unique_keys, "unique_keys", len(each), call)
        many.check_common_tags(tags, call)
        if not each:
            return []
        if None in keys:
            hint_at_repeated_call(self.name)
        given: dict[str, Any] = {"tags": tags, "countdown": countdown, "deadline": deadline}
        self._add_callers(given)
        news = []
        for place, (payload, key) in enumerate(zip(each, keys, strict=True)):
            try:
                news.append(self._new_of_many(place, payload, key, {**given, "unique_key": uniques[place]}, call))
            except ProgrammingError as error:
                raise many.about(place, error) from None
        with self._creating():
            created = transitions.create_many(news, lambda place, known: check_same(known, news[place], place))
        results = []
        for execution, is_new in created:
            result: Any = self._result_of(execution, given, is_new=is_new)
            if self.app.conf.task_always_eager and is_new:
                result = inline.run_eagerly(execution, self.app)
                result.is_new = True
            results.append(result)
        return results

    def _new_of_many(
        self, place: int, payload: object, key: str | None, options: Mapping[str, Any], call: str
    ) -> transitions.NewExecution:
        what = f"payloads[{place}]"
        args, kwargs = child_arguments(payload, call, what)
        new = self.new_execution(args, kwargs, options, what=what, path=what, idempotency_key=key, is_root=True)
        if new.unique is not None and new.unique.takes_over:
            raise InvalidArgument(
                f'{what} has a unique key, and on_conflict="replace" would cancel who has it: {call} cancels nothing, '
                "since thousands of rows would stay locked until the caller's commit. Call apply_async for each."
            )
        return headers.collect(new)

    # ------------------------------------------------------------------------------------------------ from event loops

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> DurableResult[R]:
        """Do as ``delay``, and let the event loop go on meanwhile."""
        call: Any = sync_to_async(self.delay)
        result: DurableResult[R] = await call(*args, **kwargs)
        return result

    async def aapply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        *,
        idempotency_key: str | None = None,
        unique_key: str | None = None,
        on_conflict: Literal["return", "refuse", "replace"] | None = None,
        debounce: float | dt.timedelta | None = None,
        debounce_max: float | dt.timedelta | None = None,
        deadline: float | dt.timedelta | dt.datetime | str | None = None,
        **options: Unpack[CallOptions],
    ) -> DurableResult[R]:
        """Do as ``apply_async``, and let the event loop go on meanwhile.

        Args and errors: as for ``apply_async``.
        """
        call: Any = sync_to_async(self.apply_async)
        given = {"link": link, "link_error": link_error, "shadow": shadow, "idempotency_key": idempotency_key}
        given |= {
            "unique_key": unique_key,
            "on_conflict": on_conflict,
            "debounce": debounce,
            "debounce_max": debounce_max,
            "deadline": deadline,
        }
        result: DurableResult[R] = await call(args, kwargs, task_id, producer, **given, **options)
        return result

    async def astart_many(
        self,
        payloads: Iterable[object],
        *,
        idempotency_keys: Sequence[str | None] | None = None,
        unique_keys: Sequence[str | None] | None = None,
        tags: Mapping[str, str] | None = None,
        countdown: float | dt.timedelta | None = None,
        deadline: float | dt.timedelta | dt.datetime | str | None = None,
    ) -> list[DurableResult[R]]:
        """Do as ``start_many``, and let the event loop go on meanwhile.

        Args and errors: as for ``start_many``.
        """
        return await sync_to_async(self.start_many)(
            payloads,
            idempotency_keys=idempotency_keys,
            unique_keys=unique_keys,
            tags=tags,
            countdown=countdown,
            deadline=deadline,
        )
