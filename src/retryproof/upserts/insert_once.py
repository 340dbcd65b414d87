"""Upserts where the client knows the id: created, or already there, with the row (T8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retryproof.core.errors import ConfigurationError
from retryproof.sql.callers.performing import InTransaction
from retryproof.sql.plan import Plan, Statement

TRIES = 3
"""A row that was in the way may be gone before it is read."""
DUPLICATE = 1062
"""MySQL's and MariaDB's error for a duplicate key."""


@dataclass(frozen=True, slots=True)
class Inserted:
    """created: whether this call made the row. row: its columns by name, as they are in the database."""

    created: bool
    row: Mapping[str, Any]


def insert_once(
    connection: Any, table: str, values: Mapping[str, Any], *, key: Sequence[str], returning: Sequence[str] = ()
) -> Inserted:
    """Insert a row in the open transaction, unless one with this key exists; return the row that exists then.

    table: a name, or a schema and a name with a dot between. key: the columns of a primary key or unique constraint.
    returning: the columns of the returned row; by default those of `values`.
    Two rows with the same key and different values count as the same: compare the returned row with yours.
    Raises ConfigurationError, before anything is written, for no open transaction, a failed one, autocommit, a
    savepoint, or a key without a value. A conflict with another unique key raises the database's own error.
    """
    _check_key(key, values)
    return _IN_TRANSACTION.perform(connection, lambda dialect: _plan(dialect, table, values, key, returning))


async def ainsert_once(
    connection: Any, table: str, values: Mapping[str, Any], *, key: Sequence[str], returning: Sequence[str] = ()
) -> Inserted:
    """`insert_once` on a connection of the event loop."""
    _check_key(key, values)
    return await _IN_TRANSACTION.aperform(connection, lambda dialect: _plan(dialect, table, values, key, returning))


_IN_TRANSACTION = InTransaction(
    awaited="This connection is awaited: use ainsert_once.", blocking="This connection blocks: use insert_once."
)


def _check_key(key: Sequence[str], values: Mapping[str, Any]) -> None:
    missing = [name for name in key if values.get(name) is None]  # for a unique key, NULLs always differ
    if not key or missing or isinstance(key, str):
        raise ConfigurationError(f"key={key!r} must name columns that have a value: a tuple such as ('id',).")


def _plan(
    dialect: str, table: str, values: Mapping[str, Any], key: Sequence[str], returning: Sequence[str]
) -> Plan[Inserted]:
    names = list(returning) or list(values)
    match dialect:
        case "mysql":
            return _mysql(table, values, key, names)
        case "postgresql":
            return _standard(table, values, key, names, dollars=True)
        case _:
            return _standard(table, values, key, names, dollars=False)


def _standard(
    table: str, values: Mapping[str, Any], key: Sequence[str], names: Sequence[str], *, dollars: bool
) -> Plan[Inserted]:
    place = [f"${number}" if dollars else "?" for number in range(1, len(values) + 1)]
    insert = (  # names are quoted, values are parameters
        f"INSERT INTO {quoted(table, dots=True)} ({_list(values)}) VALUES ({', '.join(place)}) "  # noqa: S608  # above
        f"ON CONFLICT ({_list(key)}) DO NOTHING RETURNING {_list(names)}"
    )
    where = " AND ".join(f"{quoted(name)} = {place[number]}" for number, name in enumerate(key))
    select = f"SELECT {_list(names)} FROM {quoted(table, dots=True)} WHERE {where}"  # noqa: S608  # as above
    for _ in range(TRIES):
        for created, sql, given in ((True, insert, values.values()), (False, select, (values[name] for name in key))):
            rows = yield Statement(sql, tuple(given))
            if rows:
                return Inserted(created, dict(zip(names, rows[0], strict=True)))
    raise _vanished()


def _mysql(table: str, values: Mapping[str, Any], key: Sequence[str], names: Sequence[str]) -> Plan[Inserted]:
    """A plain INSERT: IGNORE would hide other errors, and ON DUPLICATE KEY does not distinguish unique keys."""
    into, places = quoted(table, "`", dots=True), ", ".join("?" * len(values))
    insert = f"INSERT INTO {into} ({_list(values, '`')}) VALUES ({places})"  # noqa: S608  # names are quoted
    where = " AND ".join(f"{quoted(name, '`')} = ?" for name in key)
    # A locking read sees committed rows, whatever snapshot the transaction has.
    select = f"SELECT {_list(names, '`')} FROM {into} WHERE {where} LOCK IN SHARE MODE"  # noqa: S608  # as above
    for attempt in range(TRIES):
        in_the_way: Exception | None = None
        try:
            yield Statement(insert, tuple(values.values()))
        except Exception as error:
            if _code(error) != DUPLICATE:
                raise
            in_the_way = error
        rows = yield Statement(select, tuple(values[name] for name in key))
        if len(rows) > 1:
            raise ConfigurationError(
                f"Several rows have this {', '.join(key)}: key= must name a unique key. Roll back."
            )
        if rows:
            return Inserted(in_the_way is None, dict(zip(names, rows[0], strict=True)))
        if in_the_way is None:
            raise _vanished()  # the server stored a different key than the given one
        if attempt == TRIES - 1:
            raise in_the_way  # another unique key than this one
    raise _vanished()


def _code(error: BaseException) -> object:
    found = getattr(error, "orig", None) or error
    return getattr(found, "errno", None) or (found.args[0] if found.args else None)


def _vanished() -> ConfigurationError:
    return ConfigurationError(
        "The row is neither inserted nor found by its key: it is hidden from this transaction, goes away, or the "
        "database stored another key than it was given. Roll back."
    )


def quoted(name: str, mark: str = '"', *, dots: bool = False) -> str:
    """A quoted identifier, safe in SQL; with `dots`, each part is quoted."""
    parts = name.split(".") if dots else [name]
    for part in parts:
        if not part or any(sign in part for sign in "\0?$%"):
            raise ConfigurationError(f"{name!r} is no name that is taken here.")
    return ".".join(f"{mark}{part.replace(mark, mark * 2)}{mark}" for part in parts)


def _list(names: Sequence[str] | Mapping[str, Any], mark: str = '"') -> str:
    return ", ".join(quoted(name, mark) for name in names)
