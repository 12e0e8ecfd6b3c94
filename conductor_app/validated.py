"""Pydantic models as arguments: stored as what they dump, and made again for a parameter that is annotated so.

Nothing here imports pydantic: where nobody has, there are no models.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class _Models(NamedTuple):
    """The model classes of a function's parameters, the first one left out."""

    by_position: tuple[Any, ...]
    by_name: dict[str, Any]


def is_model(value: object) -> bool:
    """Tell whether ``value`` is a pydantic model."""
    base = _base()
    return base is not None and isinstance(value, base)


def dump_models(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Return the arguments of a body with what its models dump in their place, where the parameter is annotated so."""
    if _base() is None or not any(map(is_model, (*args, *kwargs.values()))):
        return args, kwargs
    return _converted(fn, args, kwargs, _dump)


def load_models(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Return stored arguments with the models that the body's parameters are annotated with.

    Raises:
        ValueError: pydantic's ``ValidationError``.
    """
    if _base() is None or not any(_models_of(fn)):
        return args, kwargs
    return _converted(fn, args, kwargs, _load)


def _base() -> Any:
    return getattr(sys.modules.get("pydantic"), "BaseModel", None)


def _converted(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], convert: Callable[[Any, Any], Any]
) -> tuple[list[Any], dict[str, Any]]:
    models = _models_of(fn)
    positions = (*models.by_position, *[None] * len(args))
    return (
        [convert(cls, value) for cls, value in zip(positions, args, strict=False)],
        {name: convert(models.by_name.get(name), value) for name, value in kwargs.items()},
    )


def _dump(cls: Any, value: Any) -> Any:
    return value.model_dump(mode="json") if cls is not None and isinstance(value, cls) else value


def _load(cls: Any, value: Any) -> Any:
    return value if cls is None or value is None else cls.model_validate(value)


@functools.lru_cache(maxsize=4_096)
def _models_of(fn: Callable[..., Any]) -> _Models:
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    found = {parameter.name: _model(fn, parameter) for parameter in parameters}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positions = tuple(found[parameter.name] for parameter in parameters if parameter.kind in kinds)
    by_name = {parameter.name: found[parameter.name] for parameter in parameters if found[parameter.name] is not None}
    return _Models(positions if any(positions) else (), by_name)


def _model(fn: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the model class that a parameter, or ``None``, is annotated with; ``None`` if it is another class."""
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return None
    # Alone: another one may name what is imported for type checkers only.
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hint = typing.get_type_hints(holder, fn.__globals__)
    except Exception:  # noqa: BLE001 - an annotation may be anything
        return None
    annotation = hint[parameter.name]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [each for each in typing.get_args(annotation) if each is not type(None)]
        annotation = others[0] if len(others) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, _base()) else None
