"""A process that adds a message, or sends it, and dies at a given point.

python -m tests.transaction.outgoing add|relay DATABASE RECEIVER POINT
"""

import asyncio
import sys
from collections.abc import Sequence
from email.message import EmailMessage

from retryproof.publishers.base import Batch, Outcome
from retryproof.publishers.httpx import HttpPublisher
from retryproof.testing.crash import CrashPoints
from retryproof.transaction import Relay, RelayPolicy
from tests.transaction.outboxes import Database

LEASE = 0.5


class Deadly(HttpPublisher):
    """A publisher with a point on either side of the wire."""

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        points.reach("before it is sent")
        outcomes = await super().publish(batch)
        points.reach("after it is sent")
        return outcomes


def add(url: str) -> None:
    database = Database(url)
    with database.transaction() as connection:
        connection.execute("INSERT INTO effects VALUES (1)")
        database.outbox.add(connection, topic="t", payload=b"done", key="k")
        points.reach("before the commit")
    points.reach("after the commit")


async def relay(url: str, receiver: str) -> None:
    sending = Relay(url, Deadly(receiver), policy=RelayPolicy(lease=LEASE))
    try:
        points.reach("before it is taken")
        await sending.run_until_idle()
        points.reach("after it is noted")
    finally:
        await sending.aclose()


if __name__ == "__main__":
    kind, url, receiver, point = sys.argv[1:]
    points = CrashPoints(point)
    if kind == "add":
        add(url)
    else:
        asyncio.run(relay(url, receiver))


def mail(to: str = "ada@example.com", **headers: str) -> bytes:
    made = EmailMessage()
    made["From"] = "Shop <shop@example.com>"
    made["To"] = to
    made["Subject"] = "Your receipt"
    for name, value in headers.items():
        made[name] = value
    made.set_content("Thank you.\n.\n")
    return made.as_bytes()
