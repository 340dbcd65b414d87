"""SQL plans: a call of a store is a generator that yields statements and receives their rows.

An adapter only knows how to execute a statement on its driver. So the same plan runs on the store's own connection, or
on the caller's, inside the caller's own transaction.

On our own connections, the engine decides what is committed together. On PostgreSQL, each statement commits by itself:
changes that belong together are one statement (WITH … changes several tables), and a plan of several statements may end
between any two of them. On SQLite, a plan is one transaction: its runner begins before the first statement, and commits
after the last. MySQL would need that too, since each of its statements changes one table.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Row = Sequence[Any]


@dataclass(slots=True)  # not frozen, which makes it four times as slow to make
class Statement:
    """One statement with its parameters in the dialect's own style.

    many: it runs once for each row of parameters. counted: it gives no rows, and is answered by an empty one for each
    that it wrote; on PostgreSQL.
    """

    sql: str
    parameters: Sequence[Any] = ()
    many: bool = False
    counted: bool = False


class Straight(Statement):
    """A plan that is one statement as a rule: its result is its rows, so that no generator is made and pumped for it.

    otherwise: the plan that goes on where it gave no rows.
    """

    __slots__ = ("otherwise",)

    def __init__(
        self,
        sql: str,
        parameters: Sequence[Any],
        otherwise: Callable[[Statement], Plan[Any]],
        *,
        counted: bool = False,
    ) -> None:
        self.sql, self.parameters, self.many, self.counted = sql, parameters, False, counted
        self.otherwise = otherwise


@dataclass(slots=True)
class Joining:
    """What joining a caller's transaction came to.

    held: nobody else can write the record before its end. committed: a marker of an attempt is there already, whose
    work was committed without its result; nothing was written then. nested: it is inside of a savepoint.
    """

    held: bool
    committed: bool = False
    nested: bool = False


Plan = Generator[Statement, Sequence[Row], T]
