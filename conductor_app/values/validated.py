"""Models and dataclasses as arguments: stored as mappings, and made again for a parameter that is annotated so.

Nothing here imports pydantic: where nobody has, there are no models of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class _Models(NamedTuple):
    """The model classes of a function's parameters, the first one left out."""

    #: Of the parameters that take positional arguments, models or not.
    names: tuple[str, ...]
    classes: dict[str, Any]


def is_model(value: object) -> bool:
    """Tell whether ``value`` is a pydantic model."""
    base = _base()
    return base is not None and isinstance(value, base)


def dump_models(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Return the arguments of a body with mappings in the place of its models, where the parameter is annotated so."""
    if not any(is_model(value) or _is_dataclass(type(value)) for value in (*args, *kwargs.values())):
        return args, kwargs
    return _converted(fn, args, kwargs, _dump)


def load_models(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Return stored arguments with the models that the body's parameters are annotated with.

    Raises:
        ValueError: pydantic's ``ValidationError``; or what is stored does not fit a dataclass.
    """
    if not _models_of(fn).classes:
        return args, kwargs
    return _converted(fn, args, kwargs, _load)


def misfit(fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]) -> str:
    """Return how mappings do not fit the dataclasses that are to be made of them; an empty text if they do."""
    models = _models_of(fn)
    if not models.classes:
        return ""
    given = {**dict(zip(models.names, args, strict=False)), **kwargs}
    found = (_misfit(name, cls, given.get(name)) for name, cls in models.classes.items())
    return next(filter(None, found), "")


def _base() -> Any:
    return getattr(sys.modules.get("pydantic"), "BaseModel", None)


def _converted(
    fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], convert: Callable[[Any, Any], Any]
) -> tuple[list[Any], dict[str, Any]]:
    models = _models_of(fn)
    names = (*models.names, *[""] * len(args))  # those of ``*args`` have none
    return (
        [convert(models.classes.get(name), value) for name, value in zip(names, args, strict=False)],
        {name: convert(models.classes.get(name), value) for name, value in kwargs.items()},
    )


def _dump(cls: Any, value: Any) -> Any:
    if cls is None or not isinstance(value, cls):
        return value
    if not _is_dataclass(cls):
        return value.model_dump(mode="json")
    if value.__class__ is not cls:
        return value  # what a subclass adds would be lost
    return {name: _dump(kind, getattr(value, name)) for name, kind in _fields_of(cls).items()}


def _load(cls: Any, value: Any) -> Any:
    if cls is None or value is None:
        return value
    if not _is_dataclass(cls):
        return cls.model_validate(value)
    if isinstance(value, cls):
        return value  # its type is registered with kombu
    if not isinstance(value, Mapping):
        raise ValueError(f"{cls.__name__} is made of a mapping, and {type(value).__name__} is stored")
    fields = _fields_of(cls)
    values = {name: _load(fields.get(name), each) for name, each in value.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _misfit(path: str, cls: Any, value: Any) -> str:
    if not isinstance(value, Mapping) or not _is_dataclass(cls):
        return ""
    classes = _fields_of(cls)
    if unknown := [name for name in value if name not in classes]:
        return f"{path}: {cls.__name__} has no field {unknown[0]!r}"
    without = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [field.name for field in dataclasses.fields(cls) if (field.default, field.default_factory) == without]
    if missing := [name for name in needed if name not in value]:
        return f"{path}: {cls.__name__} misses its field {missing[0]!r}"
    found = (_misfit(f"{path}.{name}", kind, value.get(name)) for name, kind in classes.items() if kind is not None)
    return next(filter(None, found), "")


def _is_dataclass(cls: Any) -> bool:
    """Tell whether a class is a dataclass that can be made again of its fields."""
    # Those of pydantic are dataclasses, too, and check what they get.
    is_one: bool = dataclasses.is_dataclass(cls)
    return is_one and _is_made_of_its_fields(cls)


@functools.lru_cache(maxsize=4_096)
def _is_made_of_its_fields(cls: Any) -> bool:
    # ``InitVar``, ``field(init=False)`` and an ``__init__`` of its own are otherwise.
    return set(inspect.signature(cls).parameters) == {field.name for field in dataclasses.fields(cls)}


@functools.lru_cache(maxsize=4_096)
def _fields_of(cls: Any) -> dict[str, Any]:
    """Return the names of a dataclass's fields, with the models that they are annotated with."""
    scope = vars(sys.modules.get(cls.__module__, types.ModuleType("")))
    return {field.name: _model(scope, field.name, field.type) for field in dataclasses.fields(cls)}


@functools.lru_cache(maxsize=4_096)
def _models_of(fn: Callable[..., Any]) -> _Models:
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    scope = getattr(fn, "__globals__", {})
    found = {
        parameter.name: _model(scope, parameter.name, parameter.annotation)
        for parameter in parameters
        if parameter.kind not in many
    }
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
    return _Models(names, {name: model for name, model in found.items() if model is not None})


def _model(scope: dict[str, Any], name: str, annotation: Any) -> Any:
    """Return the model class that something, or ``None``, is annotated with; ``None`` if it is another class."""
    # Alone: another annotation may name what is imported for type checkers only.
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        hint = typing.get_type_hints(holder, scope)
    except Exception:  # noqa: BLE001 - an annotation may be anything
        return None
    found = hint[name]
    if typing.get_origin(found) in (typing.Union, types.UnionType):
        others = [each for each in typing.get_args(found) if each is not type(None)]
        found = others[0] if len(others) == 1 else None
    if not isinstance(found, type):
        return None
    base = _base()
    return found if (base is not None and issubclass(found, base)) or _is_dataclass(found) else None
