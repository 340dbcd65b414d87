"""The payments example, started as its README says, and the commands that the demo prints."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from retryproof.demo.report import curl_commands, server_command

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "payments"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def serve(command: list[str], port: int, directory: Path) -> Iterator[str]:
    """Run it until the end of the test; its URL."""
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:
            wait_until_it_runs(server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_until_it_runs(server: subprocess.Popen[bytes]) -> None:
    said = []
    for line in server.stderr or ():
        said.append(line)
        if b"Uvicorn running" in line:
            return
    pytest.fail(f"the server did not start: {b''.join(said)!r}")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(EXAMPLE), "--port", str(port)]
    yield from serve(command, port, tmp_path_factory.mktemp("payments"))


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    yield from serve(shlex.split(server_command(port)), port, tmp_path)


def post(url: str, key: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(url, json=body, headers={"Idempotency-Key": key})


CHARGE: dict[str, object] = {"order": "1", "customer": "ada", "amount": 1200}


def test_a_charge_asked_for_twice_is_made_once(example: str) -> None:
    first, second = (post(f"{example}/charges", "k1", CHARGE) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.content == first.content
    assert second.headers["Idempotency-Replayed"] == "true"
    assert httpx.get(f"{example}/charges").json().count(first.json()) == 1
    assert httpx.get(f"{example}/charges/{first.json()['id']}").json() == first.json()


def test_a_refund_asked_for_twice_is_made_once_and_never_more_than_the_charge(example: str) -> None:
    charge = post(f"{example}/charges", "k2", CHARGE).json()
    url = f"{example}/charges/{charge['id']}/refund"
    first, second = (post(url, "r1", {"amount": 1000}) for _ in range(2))
    assert (first.status_code, second.content) == (201, first.content)
    assert httpx.get(f"{example}/charges/{charge['id']}").json()["refunded"] == 1000
    assert post(url, "r2", {"amount": 201}).status_code == 422
    assert post(url, "r3", {"amount": 200}).status_code == 201
    assert post(f"{example}/charges/nothing/refund", "r4", {}).status_code == 404


def run_by_shell(command: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


def test_the_commands_of_the_readme_do_what_it_says(example: str) -> None:
    lines = (EXAMPLE / "README.md").read_text().splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ curl")]
    charge, replay, ledger = (run_by_shell(each.replace("http://127.0.0.1:8000", example)) for each in commands)
    assert charge.startswith("HTTP/1.1 201")
    assert "idempotency-replayed: true" in replay.lower()
    charged = json.loads(charge.splitlines()[-1])
    assert json.loads(ledger).count(charged) == 1


def test_the_printed_commands_do_what_they_say(by_hand: str) -> None:
    charge, replay, mismatch, ledger = (run_by_shell(command) for command, _ in curl_commands(by_hand))
    assert charge.startswith("HTTP/1.1 201")
    assert "idempotency-replayed" not in charge.lower()
    assert replay.startswith("HTTP/1.1 201")
    assert "idempotency-replayed: true" in replay.lower()
    assert mismatch.startswith("HTTP/1.1 422")
    assert "key-reused" in mismatch
    assert [entry["amount"] for entry in json.loads(ledger)] == [1200]


def test_the_printed_command_to_start_is_relative_to_where_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(sys.executable).parent.parent)
    assert server_command(8000).startswith(f"bin/{Path(sys.executable).name} -m uvicorn --factory retryproof.demo.app:")
