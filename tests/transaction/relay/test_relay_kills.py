"""Relays that are killed and stopped at any moment, against a real receiver (T7).

Nothing is lost, what comes twice has the same id, and of each key the first arrivals are in order.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from retryproof.core.message import Message
from tests.transaction.outboxes import Database, sqlite_url
from tests.transaction.outgoing import mail
from tests.transaction.receivers import Request, http_receiver, smtp_receiver

LEASE = 1.0


class Relays:
    """Relay processes; those that die are replaced."""

    def __init__(self, url: str, to: str, count: int, *options: str) -> None:
        self._command = [sys.executable, "-m", "retryproof.cli", "relay", url, "--to", to, *options]
        self._command += ["--lease", str(LEASE), "--batch", "10", "--backoff", "0.05", "--max-attempts", "50"]
        self.running = [self._start() for _ in range(count)]
        self.deaths = 0
        self.sleeps = 0

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_one(self) -> None:
        victim = random.choice(self.running)
        victim.kill()
        victim.wait()
        self.running.remove(victim)
        self.running.append(self._start())
        self.deaths += 1

    def stop_one(self, seconds: float) -> None:
        """Let one sleep past its lease, then go on."""
        victim = random.choice(self.running)
        os.kill(victim.pid, signal.SIGSTOP)
        threading.Timer(seconds, self._go_on, [victim]).start()
        self.sleeps += 1

    def _go_on(self, victim: subprocess.Popen[bytes]) -> None:
        if victim.poll() is None:
            os.kill(victim.pid, signal.SIGCONT)

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


def until_all_are_gone(database: Database, disturb: Any, disturbances: int, limit: float) -> None:
    """Disturb the relays at random moments, so many times, then wait until nothing is pending."""
    deadline = time.monotonic() + limit
    for _ in range(disturbances):
        time.sleep(random.uniform(0.05, 0.6))  # a random moment is the point of it
        disturb()
    while database.pending:
        assert time.monotonic() < deadline, f"{database.pending} still pending"
        time.sleep(0.05)


@pytest.mark.crash
@pytest.mark.timeout(90)
@pytest.mark.parametrize("hanging", [False, True], ids=["quick", "hanging"])
def test_t7_killed_and_stopped_relays_lose_nothing_and_keep_the_order_of_each_key(
    database: Database, hanging: bool
) -> None:
    """hanging: for two keys the receiver often takes longer than the relays' patience, or than their time-out."""
    keys = [f"k{number}" for number in range(12)]
    slow = {b"k0", b"k1"} if hanging else set()
    sent: list[Message] = []
    with http_receiver() as receiver:
        accepted: list[Request] = []

        def answer(request: Request) -> tuple[int, dict[str, str]]:
            time.sleep(0.02)  # so that there is something to be killed in
            if request.body.partition(b":")[0] in slow and random.random() < 0.3:
                time.sleep(random.uniform(0.1, 1.2))
            if random.random() < 0.02:
                return 503, {}
            accepted.append(request)
            return 204, {}

        receiver.answer = answer
        relays = Relays(database.url, receiver.url, 4, "--patience", "0.1", "--timeout", "0.8")
        try:

            def disturb() -> None:
                sent.extend(database.send(*random.choices(keys, k=40)))
                sent.extend(database.send(*random.choices(keys, k=20)))
                if random.random() < 0.6:
                    relays.kill_one()
                else:
                    relays.stop_one(1.5 * LEASE)

            until_all_are_gone(database, disturb, 12, 70.0)
        finally:
            relays.end()
    bodies = {str(message.id): message.payload for message in sent}
    assert all(bodies[request.headers["webhook-id"]] == request.body for request in accepted)
    arrived = list(dict.fromkeys(request.headers["webhook-id"] for request in accepted))
    assert sorted(arrived) == sorted(bodies)
    assert database.rows("SELECT count(*) FROM retryproof_outbox_dead") == [(0,)]
    key_of = {str(message.id): message.key for message in sent}
    for key in keys:
        in_order = [str(message.id) for message in sent if message.key == key]
        assert [id for id in arrived if key_of[id] == key] == in_order


@pytest.mark.crash
@pytest.mark.timeout(60)
def test_t7_a_relay_that_is_killed_while_it_sends_mail_sends_it_again_under_the_same_message_id(
    tmp_path: Path,
) -> None:
    database = Database(sqlite_url(tmp_path))
    messages = [database.outbox.message("mail", mail(f"u{number}@example.com")) for number in range(30)]
    with database.transaction() as connection:
        database.outbox.add_many(connection, messages)
    with smtp_receiver() as mailbox:
        relays = Relays(database.url, f"smtp://127.0.0.1:{mailbox.port}?tls=off&domain=example.com", 2)
        try:
            until_all_are_gone(database, relays.kill_one, 3, 40.0)
        finally:
            relays.end()
    ids: dict[str, set[str]] = {}
    for _, recipients, content in mailbox.mails:
        (line,) = [line for line in content.split(b"\r\n") if line.startswith(b"Message-ID: ")]
        ids.setdefault(recipients[0], set()).add(line.decode().removeprefix("Message-ID: "))
    assert ids == {f"u{number}@example.com": {f"<{it.id}@example.com>"} for number, it in enumerate(messages)}
