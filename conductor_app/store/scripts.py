"""The writes of a move (``store.moves``) as several statements, for databases that have none of several writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conductor_app.store.texts import EACH, Text
from conductor_app.store.writes import Insert, Lock, Part, Update, select, told_by

#: Rows that one INSERT of a script stores.
_INSERT_BATCH = 500
#: Where a script's text gets the keys of rows, and the rows to be stored.
_KEYS, _ROWS = "{keys}", "{rows}"


class Write:
    """A write as a part of a script: at most three statements, where the database does not tell what it has written."""

    def __init__(self, part: Part, using: str, *, is_shifted: bool) -> None:
        self.part = part
        text = self._text = Text(using, is_shifted=is_shifted, is_script=True)
        told, table = told_by(part), text.table(part.model)
        can_return = text.connection.vendor in ("postgresql", "sqlite")
        self._convert = text.converter(part.model, told)
        self._found = text.names(told)
        #: Find and lock what is to be changed; make the change; read what has come of it.
        self._lock = self._read = ""
        self._tells = isinstance(part, Lock) or (bool(told) and can_return)
        #: Whether it is a transaction by itself.
        self.is_single = self._tells or not told
        columns = text.columns(part.model, told)
        returning = f" RETURNING {columns}" if self._tells else ""
        #: Where a lock has the key of what it finds.
        self._key = self._found.index(part.model._meta.pk.attname) if part.model._meta.pk.attname in self._found else -1
        key = text.quote(str(part.model._meta.pk.column))
        by_key = f"{key} IN ({_KEYS})"
        if not self.is_single:
            self._read = f"SELECT {columns} FROM {table} WHERE {by_key}"
        if isinstance(part, Lock):
            self._write = select(text, part)
        elif isinstance(part, Insert):
            names, values = text.row(part.model, part.values)
            self._row = f"({values})"
            self._given_key = getattr(part.values.get(str(part.model._meta.pk.attname)), "name", "")
            self._write = f"INSERT INTO {table} ({names}) VALUES {_ROWS}{returning}"
            self.is_single = self.is_single and not part.rows
        else:
            where = text.condition(part.model, part.where)
            if part.of:
                where = f"{by_key} AND {where}" if where else by_key
            elif self._read:
                self._lock = f"SELECT {key} FROM {table} WHERE {where}{text.lock()}"
                where = by_key
            self._write = f"UPDATE {table} SET {text.assigned(part.model, part.values)} WHERE {where}{returning}"
        self._parameters = text.parameters()

    def make(self, connection: Any, given: dict[str, Any]) -> list[Sequence[Any]]:
        """Make it, and return the rows that it tells of; note what later writes may refer to among what is given."""
        with connection.cursor() as cursor:
            part = self.part
            if isinstance(part, Insert) and part.rows:
                return self._insert_many(cursor, given, given[part.rows])
            parameters = self._parameters(given)
            sql, keys = self._write, []
            if isinstance(part, Insert):
                sql = sql.replace(_ROWS, self._row)
                keys = [parameters[self._given_key]] if self._read else []
            elif self._lock:
                cursor.execute(self._lock, parameters)
                keys = [row[0] for row in cursor.fetchall()]
            elif isinstance(part, Update) and part.of:
                keys = given[_keys_of(part.of)]
            if self._lock and not keys:
                return []
            cursor.execute(*_among(keys, sql, parameters))
            if not self._tells and (not self._read or not cursor.rowcount):
                return [()] * cursor.rowcount
            if self._read:
                cursor.execute(*_among(keys, self._read, parameters))
            rows = cursor.fetchall()
        if rows:
            # As the database has them: so they go back to it.
            given.update(zip((f"{part.name}_{name}" for name in self._found), rows[0], strict=False))
        if isinstance(part, Lock):
            given[_keys_of(part.name)] = [row[self._key] for row in rows]
        return [self._convert(row) for row in rows]

    def _insert_many(
        self, cursor: Any, given: dict[str, Any], rows: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[Any]]:
        for first in range(0, len(rows), _INSERT_BATCH):
            batch = rows[first : first + _INSERT_BATCH]
            parameters = self._parameters(given)
            texts = []
            for number, row in enumerate(batch):
                texts.append(self._row.replace(EACH, f"%({number}_"))
                parameters.update(self._text.row_parameters(row, f"{number}_"))
            cursor.execute(self._write.replace(_ROWS, ", ".join(texts)), parameters)
        return [()] * len(rows)


def _keys_of(lock: str) -> str:
    return f"{lock}_keys"


def _among(keys: Sequence[Any], sql: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a statement about rows with these keys, and its parameters."""
    if _KEYS not in sql:
        return sql, parameters
    named = {f"key_{number}": key for number, key in enumerate(keys)}
    return sql.replace(_KEYS, ", ".join(f"%({name})s" for name in named)), {**parameters, **named}
