"""The Redis store as it was when a record was a hash: its scripts (redis_hashes/), and how they were called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis import Redis

from retryproof.core.commands import Checkpoint, Claim, Complete, Release, Renew
from retryproof.core.record import MICROSECONDS, Record, State, microseconds

SCRIPTS = Path(__file__).parent / "redis_hashes"
OTHER_FIELDS = ("birth", "nonce", "fingerprint", "tenant", "result")


class HashStore:
    """Calls with one item each; the answers are the scripts' own."""

    def __init__(self, client: Redis, prefix: str) -> None:
        self.client = client
        self._prefix = prefix

    def key(self, id: bytes) -> str:
        return f"{self._prefix}:{id.hex()}"

    def claim(self, claim: Claim) -> Any:
        durations = map(microseconds, (claim.lease, claim.retention, claim.unsettled_retention))
        terms = (*durations, int(claim.on_abandoned == "refuse"), claim.max_attempts, claim.alone)
        item = (claim.fingerprint, claim.nonce, claim.tenant, claim.trace, 1)
        return self._call(("claim",), claim.id, 1, *terms, *item)[0]

    def complete(self, command: Complete) -> bytes:
        state, result = ("4", b"") if command.result is None else ("3", command.result)
        return self._fenced("settle", command, state, result)

    def release(self, command: Release) -> bytes:
        return self._fenced("settle", command, "2", "1" if command.settles else "")

    def renew(self, command: Renew) -> bytes:
        return self._fenced("renew", command, microseconds(command.lease), int(command.alone))

    def checkpoint(self, command: Checkpoint) -> bytes:
        return self._fenced("checkpoint", command, command.name, command.value)

    def read(self, id: bytes) -> Any:
        return self._call(("read",), id, "all")[1]

    def evict(self, id: bytes) -> Any:
        return self._call(("remove",), id, "any")

    def write(self, record: Record) -> None:
        """What these scripts would have written for the record."""
        fields: dict[str, Any] = {name: getattr(record, name) for name in OTHER_FIELDS}
        fields |= {f"step:{name}": value for name, value in record.checkpoints.items()}
        numbers = (record.state.value, record.token, record.lease_until, record.expires_at)
        flags = (microseconds(record.retention), int(bool(record.checkpoints)), int(record.counts))
        head = " ".join(map(str, (*numbers, *flags, record.first_seen, record.attempt, record.deaths)))
        fields |= {"head": head, "trace": record.trace}
        key = self.key(record.id)
        pipeline = self.client.pipeline()
        pipeline.delete(key)
        pipeline.hset(key, mapping={name: value for name, value in fields.items() if value is not None})
        if record.settled and record.state is not State.IN_PROGRESS:
            pipeline.pexpireat(key, -(-record.expires_at * 1_000 // MICROSECONDS))
        pipeline.execute()

    def _fenced(self, name: str, command: Complete | Release | Renew | Checkpoint, *arguments: Any) -> bytes:
        answer: bytes = self._call(("fence", name), command.id, command.nonce, command.token, *arguments)
        return answer

    def _call(self, names: Sequence[str], id: bytes, *arguments: Any) -> Any:
        source = "\n".join((SCRIPTS / f"{name}.lua").read_text("utf-8") for name in ("record", *names))
        return self.client.eval(source, 1, self.key(id), *arguments)
