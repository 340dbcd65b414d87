"""The ledger of the payments API: two tables in one SQLite file, which outlives the server."""

import sqlite3
import threading

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
ON CONFLICT (id) DO NOTHING
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
    """Books charges and refunds, each once under its id: an entry that is there stays as it is."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        # Every statement commits by itself.
        self._connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(SCHEMA)

    def add_charge(self, charge: Charge) -> Charge:
        """Book it, and return what is booked under its id."""
        with self._lock:
            self._connection.execute(
                "INSERT INTO charges VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (charge.id, charge.order, charge.customer, charge.amount),
            )
        (booked,) = self._charges(" WHERE id = ?", charge.id)
        return booked

    def add_refund(self, refund: Refund) -> Refund | None:
        """Book it, and return what is booked under its id; None when that is more than is left of the charge."""
        with self._lock:
            self._connection.execute(REFUND, refund.model_dump())
            row = self._connection.execute("SELECT amount FROM refunds WHERE id = ?", (refund.id,)).fetchone()
        return Refund(id=refund.id, charge=refund.charge, amount=row[0]) if row else None

    def charge(self, id: str) -> Charge | None:
        """One charge."""
        return next(iter(self._charges(" WHERE id = ?", id)), None)

    def charges(self) -> list[Charge]:
        """All charges, the oldest first."""
        return self._charges(" ORDER BY rowid")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _charges(self, condition: str, *values: str) -> list[Charge]:
        with self._lock:
            rows = self._connection.execute(CHARGES + condition, values).fetchall()
        return [
            Charge(id=id, order=order, customer=customer, amount=amount, refunded=refunded)
            for id, order, customer, amount, refunded in rows
        ]
