"""Charges by WSGI alone: no framework, one SQLite file for the charges and for the records of what was done.

python app.py 8000
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from retryproof import current_operation
from retryproof.http import by_header
from retryproof.http.wsgi import IdempotencyMiddleware


def create_app(database: str | Path) -> IdempotencyMiddleware:
    """The charges of one database, behind the layer, which keeps its records in the same file."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS charges (id TEXT PRIMARY KEY, account TEXT, amount INTEGER)")
    return IdempotencyMiddleware(
        _charges(database), store=f"sqlite:///{database}", scope=by_header("x-account"), required=True
    )


def _charges(database: str | Path) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET":
            return _answer(start_response, "200 OK", _all(database, environ["HTTP_X_ACCOUNT"]))
        amount = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))["amount"]
        operation = current_operation()
        connection = sqlite3.connect(database, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        # What is written now commits together with the response below, or not at all.
        operation.transaction(closing(connection))
        charge = {"id": str(operation.derive("charge")), "amount": amount}
        connection.execute("INSERT INTO charges VALUES (?, ?, ?)", (charge["id"], environ["HTTP_X_ACCOUNT"], amount))
        return _answer(start_response, "201 Created", charge)

    return app


def _all(database: str | Path, account: str) -> list[dict[str, object]]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT id, amount FROM charges WHERE account = ?", (account,)).fetchall()
    return [{"id": id, "amount": amount} for id, amount in rows]


def _answer(start_response: StartResponse, status: str, document: object) -> list[bytes]:
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(document).encode()]


if __name__ == "__main__":
    with make_server("127.0.0.1", int(sys.argv[1]), create_app("charges.db")) as server:
        print(f"http://127.0.0.1:{server.server_port}/charges", flush=True)
        server.serve_forever()
