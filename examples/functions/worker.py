"""Pays out jobs from a file, one JSON document a line; each takes effect once, however often it comes."""

import json
import sqlite3
import sys
from contextlib import closing
from typing import Any

from retryproof import Idempotency, current_operation, errors


def pay_out(job: dict[str, Any]) -> dict[str, Any]:
    """Book one payout, under an id that is the same on every attempt."""
    id = str(current_operation().derive("payout"))
    with closing(sqlite3.connect("payouts.db")) as books, books:
        books.execute("CREATE TABLE IF NOT EXISTS payouts (id TEXT PRIMARY KEY, receiver TEXT, amount INTEGER)")
        books.execute("INSERT INTO payouts VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (id, job["to"], job["amount"]))
    return {"to": job["to"], "paid": job["amount"]}


def work(engine: Idempotency, line: str) -> str:
    """Do one job, and say what became of it."""
    job = json.loads(line)
    try:
        outcome = engine.run(job["id"], lambda: pay_out(job), scope="payouts", fingerprint=line.strip().encode())
    except errors.Mismatch:
        return f"{job['id']}  refused   this id was used for another job"
    except errors.InProgress:
        return f"{job['id']}  running   another worker has it"
    return f"{job['id']}  {'replayed' if outcome.replayed else 'paid    '}  {outcome.value}"


def main(path: str) -> None:
    """Do all jobs of a file."""
    with Idempotency("sqlite:///jobs-keys.db") as engine, open(path) as jobs:
        for line in jobs:
            print(work(engine, line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
