"""The WSGI example: charges that can be retried, without a framework."""

import http.client
import json
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT

APP = ROOT / "examples" / "wsgi" / "app.py"


def test_a_charge_that_is_asked_for_twice_is_made_once_as_its_readme_shows(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, str(APP), "0"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2].partition("/")[0])

        def ask(method: str, key: str | None = None, amount: int = 1200) -> tuple[int, object, bool]:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            headers = {"X-Account": "ada", "Content-Type": "application/json"}
            headers.update({} if key is None else {"Idempotency-Key": key})
            client.request(method, "/charges", json.dumps({"amount": amount}) if method == "POST" else None, headers)
            answer = client.getresponse()
            document = json.loads(answer.read())
            client.close()
            return answer.status, document, answer.headers["idempotency-replayed"] == "true"

        status, charge, replayed = ask("POST", "order-1")
        assert (status, replayed) == (201, False)
        assert ask("POST", "order-1") == (201, charge, True)
        assert ask("POST", "order-1", amount=99)[0] == 422
        assert ask("POST")[0] == 400
        assert ask("GET") == (200, [charge], False)
    finally:
        server.kill()
        server.communicate()
