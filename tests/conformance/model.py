"""Every store against the memory store, in random sequences of batches: the same replies, the same records.

Time. What the model is told to keep for a moment (SHORT) is over after every step: the model's clock is moved, and the
store's own is watched until it agrees. All else is kept for LONG, which no run lives to see. So nothing depends on how
fast a store or a machine is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from secrets import token_bytes
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from retryproof.core.commands import Acquired, Claim, Finished, Running
from retryproof.core.record import Record, State
from retryproof.stores.base import Reaped
from retryproof.stores.memory import MemoryStore
from retryproof.testing import ManualClock
from retryproof.testing.bench import checkpoint, complete, release, renew

Call = Callable[..., Any]
Held = tuple[Claim, Acquired, Acquired]

SHORT, LONG = 0.002, 3_600.0
KEYS = 4
PATIENCE = 3.0

keys = st.integers(0, KEYS - 1)
spans = st.sampled_from([LONG, LONG, SHORT])
fingerprints = st.sampled_from([b"", b"\1one", b"\1one", b"\1two"])
claims = st.builds(
    Claim,
    id=keys.map(lambda key: bytes([key])),
    fingerprint=fingerprints,
    nonce=st.just(b""),  # given by the machine, so that no two are the same
    lease=spans,
    retention=spans,
    unsettled_retention=spans,
    on_abandoned=st.sampled_from(["rerun", "rerun", "refuse"]),
    max_attempts=st.integers(1, 3),
    tenant=st.sampled_from([b"", b"t" * 16]),
    trace=st.sampled_from(["", "00-trace"]),
    alone=st.integers(0, 2),
)
results = st.one_of(st.none(), st.binary(max_size=30))
steps = st.tuples(st.sampled_from(["", "one", "zwei – 二"]), st.binary(max_size=30))
holders = st.lists(st.integers(0, 9), min_size=1, max_size=3)
damages = st.sampled_from(["", "", "", "token", "nonce"])


class AgainstTheModel(RuleBasedStateMachine):
    """One run: a few operations, known to the store under random ids."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call
        self._clock = ManualClock()
        self._model = MemoryStore(self._clock)
        self._prefix = token_bytes(8)
        self._ids = [self._prefix + bytes([key]) * 24 for key in range(KEYS)]
        self._nonces = 0
        self._claimed: list[Claim] = []
        self._held: list[Held] = []

    @rule(batch=st.lists(claims, min_size=1, max_size=KEYS, unique_by=lambda claim: claim.id))
    def claim(self, batch: Sequence[Claim]) -> None:
        """New attempts at several operations."""
        self._claim([replace(claim, id=self._ids[claim.id[0]], nonce=self._nonce()) for claim in batch])

    @rule(number=st.integers(0, 9))
    def repeat_a_claim(self, number: int) -> None:
        """An earlier claim arrives again."""
        if self._claimed:
            self._claim([self._claimed[-1 - number % len(self._claimed)]])

    @rule(chosen=holders, result=results, damage=damages)
    def complete(self, chosen: Sequence[int], result: bytes | None, damage: str) -> None:
        """Holders, stale ones among them, settle."""
        self._fenced("complete", chosen, damage, lambda claim, acquired: complete(claim, acquired, result))

    @rule(chosen=holders, damage=damages)
    def release(self, chosen: Sequence[int], damage: str) -> None:
        """Holders, stale ones among them, give back."""
        self._fenced("release", chosen, damage, release)

    @rule(chosen=holders, damage=damages, alone=st.booleans())
    def renew(self, chosen: Sequence[int], damage: str, alone: bool) -> None:
        """Holders, stale ones among them, renew."""
        self._fenced("renew", chosen, damage, lambda claim, acquired: renew(claim, acquired, LONG, alone=alone))

    @rule(chosen=holders, damage=damages, step=steps)
    def checkpoint(self, chosen: Sequence[int], damage: str, step: tuple[str, bytes]) -> None:
        """Holders, stale ones among them, keep a step's result."""
        self._fenced("checkpoint", chosen, damage, lambda claim, acquired: checkpoint(claim, acquired, *step))

    @rule(key=keys)
    def evict(self, key: int) -> None:
        """An operator evicts."""
        real, model = self._both("evict", [self._ids[key]])
        assert list(real) == list(model)
        self._let_time_pass()

    @rule()
    def reap(self) -> None:
        """A reaper passes."""
        real, model = self._reap(self._call), self._reap(self._call_model)
        assert list(map(_seen, real)) == list(map(_seen, model))

    @rule(state=st.sampled_from([None, *State]), tenant=st.sampled_from([None, b"", b"t" * 16]))
    def scan(self, state: State | None, tenant: bytes | None) -> None:
        """An operator looks."""
        real, model = self._both("scan", prefix=self._prefix, state=state, tenant=tenant)
        assert [record.id for record in real] == [record.id for record in model]

    @invariant()
    def records_are_alike(self) -> None:
        """Both remember the same."""
        real, model = self._both("get", self._ids)
        assert list(map(_seen, real)) == list(map(_seen, model))

    def _nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(16, "big")

    def _claim(self, batch: Sequence[Claim]) -> None:
        self._claimed += batch
        real, model = self._both("claim", batch)
        assert list(map(_told, real)) == list(map(_told, model))
        for claim, mine, theirs in zip(batch, real, model, strict=True):
            if isinstance(mine, Acquired):
                self._held.append((claim, mine, theirs))
        self._let_time_pass()

    def _fenced(self, method: str, chosen: Sequence[int], damage: str, make: Callable[[Claim, Acquired], Any]) -> None:
        # What is past its retention may still be there, or be gone by the store's own means: no rule about it.
        kept = [held for held in self._held if self._model.get([held[0].id])[0] is not None]
        if not kept:
            return
        picked = {held[0].id: held for held in (kept[-1 - number % len(kept)] for number in chosen)}
        real = [_damaged(make(claim, mine), damage) for claim, mine, _ in picked.values()]
        model = [_damaged(make(claim, theirs), damage) for claim, _, theirs in picked.values()]
        assert list(self._call(method, real)) == list(self._call_model(method, model))
        self._let_time_pass()

    def _both(self, method: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        return self._call(method, *arguments, **options), self._call_model(method, *arguments, **options)

    def _call_model(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self._model, method)(*arguments, **options)

    def _reap(self, call: Call) -> list[Record]:
        ended: dict[bytes, Record] = {}
        while True:
            reaped: Reaped = call("reap")
            ended |= {record.id: record for record in reaped.unsettled if record.id in self._ids}
            call("reap", 0, reaped.unsettled)
            if not reaped.more:
                return [replace(ended[id], read_at=ended[id].lease_until) for id in sorted(ended)]

    def _let_time_pass(self) -> None:
        """Whatever was to last for SHORT is over, for both."""
        self._clock.advance(1.0)
        end = time.monotonic() + PATIENCE
        for id, model in zip(self._ids, self._model.get(self._ids), strict=True):
            while not _agrees(self._call("get", [id])[0], model):
                assert time.monotonic() < end, "the store's clock never agrees with the model's"
                time.sleep(0.001)


def _agrees(real: Record | None, model: Record | None) -> bool:
    """Whether what is over for the model is over for the store as well; a difference of another kind is no matter."""
    if model is None or real is None:
        return real is None
    lease_over = model.lease_until > model.read_at or real.lease_until <= real.read_at
    kept_over = model.expires_at > model.read_at or real.expires_at <= real.read_at
    return lease_over and kept_over


def _damaged(command: Any, damage: str) -> Any:
    match damage:
        case "token":
            return replace(command, token=command.token - 1)
        case "nonce":
            return replace(command, nonce=bytes(16))
        case _:
            return command


def _told(reply: object) -> object:
    """A reply without tokens and times."""
    match reply:
        case Acquired():
            return ("Acquired", reply.attempt, reply.birth, dict(reply.checkpoints), reply.trace)
        case Running(left):
            return ("Running", left > 0)
        case Finished():
            return ("Finished", reply.result, reply.attempt, reply.trace)
        case _:
            return reply


def _seen(record: Record | None) -> object:
    """A record without token and times."""
    if record is None:
        return None
    live = record.lease_until > record.read_at
    who = (record.state, record.fingerprint, record.birth, record.nonce, record.tenant, record.trace)
    counted = (record.attempt, record.deaths, record.counts, record.retention)
    return (*who, *counted, record.state is State.IN_PROGRESS and live, record.result, dict(record.checkpoints))


def check(call: Call, examples: int = 100) -> None:
    """Random sequences of batches; `call` calls the store by a method's name."""

    class Machine(AgainstTheModel):
        def __init__(self) -> None:
            super().__init__(call)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
        ),
    )
