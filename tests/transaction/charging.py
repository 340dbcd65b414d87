"""A process that charges in transactional mode and dies, or waits, at a given point: `charging.py URL POINT`."""

import os
import signal
import sys

import psycopg

from retryproof import Idempotency, Policy, current_operation
from retryproof.sql.callers.psycopg import Psycopg

URL, POINT = sys.argv[1:]


def reach(name: str) -> None:
    if name == POINT:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"stop {name}" == POINT:
        print("stopped", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)


execute, commit = Psycopg.execute, Psycopg.commit


def executed(self: Psycopg, statement: object) -> object:
    rows = execute(self, statement)  # type: ignore[arg-type]  # handed through
    if "SET state" in statement.sql:  # type: ignore[attr-defined]  # as above
        reach("after complete")
    return rows


def committed(self: Psycopg) -> None:
    commit(self)
    reach("after commit")


Psycopg.execute = executed  # type: ignore[assignment, method-assign]  # a point inside
Psycopg.commit = committed  # type: ignore[method-assign]  # as above


def charge(connection: "psycopg.Connection") -> str:
    reach("before join")
    current_operation().transaction(connection)
    reach("before work")
    connection.execute("INSERT INTO charges VALUES (1)")
    reach("after work")
    return f"charged by attempt {current_operation().attempt}"


with (
    Idempotency(URL, policy=Policy(lease=1.0)) as engine,
    psycopg.connect(URL) as connection,
):
    outcome = engine.run("k", lambda: charge(connection), scope="s")
    reach("before answer")
    print(outcome.value, outcome.replayed, flush=True)
