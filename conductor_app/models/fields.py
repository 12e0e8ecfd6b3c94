"""Columns and indexes that mean the same on every database."""

from __future__ import annotations

from typing import Any

from django.db.models import CharField, Index, Q


class ExactCharField(CharField):  # type: ignore[type-arg]
    """Text that is compared byte for byte.

    MySQL's default collation takes ``Charge`` and ``charge`` for the same step name; the other databases do not.
    """

    def db_type(self, connection: Any) -> str | None:
        base = super().db_type(connection)
        return f"{base} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" if connection.vendor == "mysql" else base


class PartialIndex(Index):
    """An index over the rows that ``where`` names, and over all rows where the database has no partial indexes.

    Django's own ``condition`` leaves the index out on MySQL. ``fields`` start with the column that ``where`` tests, so
    the full index serves the same queries.

    Args:
        expressions: As for ``Index``.
        where: Which rows.
        unique: Whether no two of these rows may have the same values. All of ``fields`` are null in the others, or
            the full index would forbid more than the partial one.
        kwargs: As for ``Index``.
    """

    def __init__(self, *expressions: Any, where: Q, unique: bool = False, **kwargs: Any) -> None:
        super().__init__(*expressions, **kwargs)
        self.where = where
        self.unique = unique

    def create_sql(self, model: Any, schema_editor: Any, using: str = "", **kwargs: Any) -> Any:
        is_partial = schema_editor.connection.features.supports_partial_indexes
        if self.unique:
            fields = [model._meta.get_field(name) for name, _ in self.fields_orders]
            partial: Any = Index(fields=self.fields, name=self.name, condition=self.where if is_partial else None)
            condition = partial._get_condition_sql(model, schema_editor)
            return schema_editor._create_unique_sql(model, fields, self.name, condition=condition)
        if not is_partial:
            return super().create_sql(model, schema_editor, using, **kwargs)
        partial = Index(fields=self.fields, name=self.name, condition=self.where)
        return partial.create_sql(model, schema_editor, using, **kwargs)

    def deconstruct(self) -> Any:
        path, expressions, kwargs = super().deconstruct()
        own = {"where": self.where, "unique": True} if self.unique else {"where": self.where}
        return path, expressions, {**kwargs, **own}


__all__ = ["ExactCharField", "PartialIndex"]
