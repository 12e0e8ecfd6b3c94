"""Tasks of ``django.tasks``; imported where Django has them."""

from typing import Any

from django.tasks import task  # type: ignore[import-not-found, unused-ignore]


@task
def double(value: int) -> int:
    return value * 2


@task(takes_context=True)
def describe(context: Any, word: str) -> list[Any]:
    return [word, context.attempt]
