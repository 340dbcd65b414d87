"""SQL is a plan, not a driver: what a store does is a generator of statements that is sent their rows.

An adapter says only how to execute a statement on its driver, so the same plan runs on the store's own connection or
on the caller's, inside the caller's own transaction.

What is committed together on a connection of our own is said by the engine. On PostgreSQL each statement commits by
itself: what has to happen together is one statement (WITH … changes several tables), and a plan of several may end
between any two of them. On SQLite a plan is one transaction, as it would be on MySQL, whose statements change one table
each: whoever runs it begins before its first statement and commits after its last.
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
