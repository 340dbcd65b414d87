"""Django: a database connection (`django.db.connection`, `connections[…]`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import connections  # type: ignore[import-untyped]  # Django has no types of its own
from django.db.backends.base.base import BaseDatabaseWrapper  # type: ignore[import-untyped]  # as above
from django.utils.connection import ConnectionProxy  # type: ignore[import-untyped]  # as above

from retryproof.core.errors import ConfigurationError
from retryproof.sql.callers import AUTOCOMMIT, FAILED, SAVEPOINT, Blocking, DialectName, innermost, percent
from retryproof.sql.plan import Row, Statement

DIALECTS: dict[str, DialectName] = {"postgresql": "postgresql", "sqlite": "sqlite", "mysql": "mysql"}


def adapter_of(kind: type) -> type[Django] | None:
    """The adapter of connections; None for anything else of the library's."""
    return Django if issubclass(kind, (BaseDatabaseWrapper, ConnectionProxy)) else None


@contextmanager
def transaction(using: str = "default") -> Iterator[Any]:
    """A connection whose transaction is committed by who asked for it: `operation.transaction(transaction())`.

    `atomic()` blocks inside are savepoints of it. What is not committed at the end is rolled back.
    """
    connection = connections[using]
    if not connection.get_autocommit():
        raise ConfigurationError("A transaction is open already; this one would not be its own.")
    # On SQLite it has to be begun, or the first savepoint would be a transaction of its own.
    connection.set_autocommit(False, force_begin_transaction_with_broken_autocommit=True)
    try:
        yield connection
    finally:
        try:
            if not connection.run_commit_hooks_on_set_autocommit_on:  # not committed; after it, hooks wait to be run
                connection.rollback()
        finally:
            connection.set_autocommit(True)


class Django(Blocking):
    """A Django connection."""

    ADVICE = (
        "Call this inside one `transaction.atomic()`; for an operation's own transaction pass "
        "`retryproof.transaction.django.transaction()`."
    )

    def __init__(self, connection: Any) -> None:
        if connection.vendor not in DIALECTS:
            raise ConfigurationError(f"Django's {connection.vendor} is not known here.")
        self._connection = connection
        self.dialect: DialectName = DIALECTS[connection.vendor]

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        connection = self._connection
        if connection.in_atomic_block:
            if connection.needs_rollback:
                return FAILED
            if any(connection.savepoint_ids):
                return SAVEPOINT
            return "an `atomic()` block is around, which commits by itself" if to_commit else None
        return AUTOCOMMIT if connection.get_autocommit() else None

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        sql, parameters = percent(statement)
        with self._connection.cursor() as cursor:
            if statement.many:
                if parameters:
                    cursor.executemany(sql, parameters)
                return ()
            cursor.execute(sql, tuple(parameters))
            if statement.counted:
                return [()] * cursor.rowcount
            return [tuple(map(_plain, row)) for row in cursor.fetchall()] if cursor.description else ()

    def driver(self) -> object:
        """See BlockingConnection."""
        self._connection.ensure_connection()
        return innermost(self._connection.connection)

    def begin(self) -> None:
        """See BlockingConnection; `transaction` has begun it."""

    def commit(self) -> None:
        """See BlockingConnection."""
        self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._connection.rollback()


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value
