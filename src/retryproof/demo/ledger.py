"""The ledger of the payments API: two tables in one SQLite file, which outlives the server."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from pydantic import BaseModel

SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (
    id TEXT PRIMARY KEY, order_number TEXT NOT NULL, customer TEXT NOT NULL, amount INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS refunds (
    id TEXT PRIMARY KEY, charge TEXT NOT NULL REFERENCES charges, amount INTEGER NOT NULL
);
"""
CHARGES = """
SELECT id, order_number, customer, amount,
       (SELECT COALESCE(SUM(amount), 0) FROM refunds WHERE charge = charges.id) AS refunded
FROM charges
"""
REFUND = """
INSERT INTO refunds
SELECT :id, id, :amount FROM charges
WHERE id = :charge AND amount - (SELECT COALESCE(SUM(amount), 0) FROM refunds WHERE charge = :charge) >= :amount
"""


class Charge(BaseModel):
    """Money taken; amounts in cents."""

    id: str
    order: str
    customer: str
    amount: int
    refunded: int = 0


class Refund(BaseModel):
    """Money given back, in cents."""

    id: str
    charge: str
    amount: int


class Ledger:
    """Charges and refunds, on a connection whose transaction the caller begins and ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def add_charge(self, charge: Charge) -> Charge:
        """Book it."""
        row = (charge.id, charge.order, charge.customer, charge.amount)
        self.connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?)", row)
        return charge

    def add_refund(self, refund: Refund) -> bool:
        """Book a refund, unless it is more than is left of the charge; return whether it was booked."""
        return self.connection.execute(REFUND, refund.model_dump()).rowcount == 1

    def charge(self, id: str) -> Charge | None:
        """One charge."""
        return next(iter(self._charges(" WHERE id = ?", id)), None)

    def charges(self) -> list[Charge]:
        """All charges, the oldest first."""
        return self._charges(" ORDER BY rowid")

    def _charges(self, condition: str, *values: str) -> list[Charge]:
        rows = self.connection.execute(CHARGES + condition, values).fetchall()
        return [
            Charge(id=id, order=order, customer=customer, amount=amount, refunded=refunded)
            for id, order, customer, amount, refunded in rows
        ]


class Database:
    """The file that contains the ledger."""

    factory = sqlite3.Connection

    def __init__(self, path: str) -> None:
        self._path = path
        with self.connect() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(SCHEMA)

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """A new connection for the block; web frameworks may pass it from thread to thread.

        A transaction that is still open at the end of the block is rolled back.
        """
        connection = sqlite3.connect(
            self._path, timeout=10, isolation_level=None, check_same_thread=False, factory=self.factory
        )
        with closing(connection):
            yield connection

    @contextmanager
    def begin(self) -> Iterator[sqlite3.Connection]:
        """The same, with an open write transaction."""
        with self.connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def ledger(self, connection: sqlite3.Connection) -> Ledger:
        """The ledger on this connection."""
        return Ledger(connection)
