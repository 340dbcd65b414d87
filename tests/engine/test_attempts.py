"""What the attempts at one operation have in common, and what the dead one leaves to the next (C5, C7, C12 to C17)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.codec import JsonCodec
from retryproof.stores import MemoryStore
from retryproof.testing import ManualClock
from tests.engine.support import SECONDS, Events

LEASE = 10.0


class Bench:
    """An engine on a clock that stands still."""

    def __init__(self, **policy: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.engine = Idempotency(MemoryStore(self.clock), policy=Policy(lease=LEASE, **policy), events=[self.events])

    def run(self, fn: Callable[[], Any], *, key: str = "k") -> Any:
        return self.engine.run(key, fn, scope="s").value

    def die(self, fn: Callable[[], Any], *, key: str = "k") -> None:
        """Run `fn` and end as a process does that dies after it: nothing is settled, and the lease runs out."""

        def run() -> None:
            fn()
            raise errors.OutcomeUnknown("died")

        with pytest.raises(errors.OutcomeUnknown, match="died"):
            self.engine.run(key, run, scope="s")
        self.clock.advance(LEASE + 1)


def noting(seen: list[Any], value: Any) -> Callable[..., Any]:
    """A function that returns `value`, and notes that it ran."""

    def run(*_: object) -> Any:
        seen.append(1)
        return value

    return run


def identity() -> tuple[Any, ...]:
    operation = current_operation()
    return operation.derive("charge"), operation.first_seen, operation.key_digest


def test_c13_an_attempt_that_takes_over_has_the_same_ids_and_the_same_time() -> None:
    bench = Bench()
    seen: list[Any] = []
    bench.die(lambda: seen.append(identity()))
    bench.run(lambda: seen.append(identity()))
    assert seen[0] == seen[1]


def test_c13_names_and_operations_have_ids_of_their_own() -> None:
    bench = Bench()
    ids = bench.run(lambda: [str(current_operation().derive(name)) for name in ("charge", "refund", "charge")])
    other = bench.run(lambda: str(current_operation().derive("charge")), key="other")
    assert ids[0] == ids[2]
    assert len({*ids, other}) == 3


def test_c13_a_key_that_is_used_again_after_its_retention_has_new_ids() -> None:
    bench = Bench(retention=60.0)
    first = bench.run(lambda: str(current_operation().derive("charge")))
    bench.clock.advance(61)
    assert bench.run(lambda: str(current_operation().derive("charge"))) != first


def test_c2_an_attempt_that_takes_over_has_a_greater_token() -> None:
    bench = Bench()
    tokens: list[Any] = []
    bench.die(lambda: tokens.append(current_operation().token))
    bench.run(lambda: tokens.append(current_operation().token))
    assert tokens[0] < tokens[1]


@pytest.mark.parametrize("value", ["ch_1", None, 0, False, "", [], {}])
def test_c14_a_later_attempt_gets_the_result_of_a_step_and_does_not_run_it(value: Any) -> None:
    bench = Bench()
    calls: list[Any] = []

    def charge() -> Any:
        return current_operation().step("charge", noting(calls, value))

    bench.die(charge)
    assert bench.run(charge) == value
    assert len(calls) == 1


def test_c14_a_step_that_died_before_its_result_was_kept_runs_again_under_the_same_key() -> None:
    bench = Bench()
    keys: list[Any] = []

    def call_and_die(key: object) -> None:
        keys.append(key)
        raise errors.OutcomeUnknown("died")

    with pytest.raises(errors.OutcomeUnknown):
        bench.run(lambda: current_operation().step("charge", call_and_die))
    bench.clock.advance(LEASE + 1)
    bench.run(lambda: current_operation().step("charge", keys.append))
    assert keys[0] == keys[1]


def test_c14_a_step_is_kept_over_a_failure_that_says_so() -> None:
    bench = Bench()
    calls: list[Any] = []

    def charge_and_fail() -> None:
        current_operation().step("charge", calls.append)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        bench.run(charge_and_fail)
    bench.run(lambda: current_operation().step("charge", calls.append))
    assert len(calls) == 1


def test_c14_a_name_used_twice_in_an_attempt_is_an_error() -> None:
    def twice() -> None:
        operation = current_operation()
        operation.step("charge", lambda key: 1)
        operation.step("charge", lambda key: 2)

    with pytest.raises(errors.ConfigurationError, match="twice"):
        Bench().run(twice)


def test_c5_a_failure_gives_the_operation_back_at_once() -> None:
    bench = Bench()
    with pytest.raises(ZeroDivisionError):
        bench.run(lambda: 1 // 0)
    assert bench.run(lambda: "done") == "done"
    assert bench.events.kinds == ["failed", "fresh"]


def test_c7_rerun_runs_again_once_the_lease_is_over_and_not_before() -> None:
    bench = Bench()
    runs: list[Any] = []
    with pytest.raises(errors.OutcomeUnknown):
        bench.run(lambda: bench_dies(runs))
    with pytest.raises(errors.InProgress):
        bench.run(lambda: runs.append("too early"))
    bench.clock.advance(LEASE)
    bench.run(lambda: runs.append(current_operation().attempt))
    assert runs == [1, 2]


def bench_dies(runs: list[Any]) -> None:
    runs.append(current_operation().attempt)
    raise errors.OutcomeUnknown("died")


def test_c7_refuse_leaves_it_to_an_operator() -> None:
    bench = Bench(on_abandoned="refuse")
    runs: list[Any] = []
    bench.die(lambda: runs.append(1))
    with pytest.raises(errors.OutcomeUnknown, match="keys settle"):
        bench.run(lambda: runs.append(2))
    assert runs == [1]


def test_c15_after_so_many_deaths_it_is_refused() -> None:
    bench = Bench(max_attempts=3)
    runs: list[Any] = []
    for number in range(3):
        bench.die(lambda number=number: runs.append(number))  # type: ignore[misc]  # bound now
    with pytest.raises(errors.OutcomeUnknown, match="too many attempts died"):
        bench.run(lambda: runs.append(3))
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}])
def test_c12_an_empty_result_is_a_result(value: Any) -> None:
    bench = Bench()
    runs: list[Any] = []
    for _ in range(2):
        assert bench.run(noting(runs, value)) == value
    assert runs == [1]


def test_c12_retention_starts_when_the_result_is_stored() -> None:
    bench = Bench(retention=60.0)
    bench.run(lambda: bench.clock.advance(9))  # within the lease
    bench.clock.advance(59)
    assert bench.engine.run("k", lambda: None, scope="s").replayed
    bench.clock.advance(1)
    assert not bench.engine.run("k", lambda: None, scope="s").replayed


def test_c16_the_first_caller_sees_the_value_as_a_replay_gives_it() -> None:
    bench = Bench()
    assert [bench.run(lambda: ("a", 1)) for _ in range(2)] == [["a", 1], ["a", 1]]


@pytest.mark.parametrize("value", [object(), "x" * 200], ids=["not encodable", "too large"])
def test_c17_a_result_that_is_not_kept_is_its_callers_and_never_none_to_another(value: Any) -> None:
    bench = Bench(max_result=100)
    runs: list[Any] = []
    assert bench.run(noting(runs, value)) is value
    with pytest.raises(errors.ResultOmitted):
        bench.run(lambda: runs.append(2))
    assert runs == [1]


def named(name: str) -> JsonCodec:
    codec = JsonCodec()
    codec.name = name
    return codec


class Text(JsonCodec):
    """A codec that writes what cannot be stored."""

    def encode(self, value: Any, /) -> Any:
        return "text"


@pytest.mark.parametrize(
    "codec",
    [named(""), named("ü"), named("x" * 256), Text()],
    ids=["no name", "name not ASCII", "name too long", "no bytes"],
)
def test_c17_an_odd_codec_keeps_no_result_and_loses_no_effect(codec: JsonCodec) -> None:
    bench, ran = Bench(), list[Any]()
    assert bench.engine.run("k", noting(ran, 1), scope="s", codec=codec).value == 1
    with pytest.raises(errors.ResultOmitted):
        bench.run(noting(ran, 2))
    assert ran == [1]


class Secret(JsonCodec):
    """A codec of somebody's own that builds on ours."""

    def encode(self, value: Any, /) -> bytes:
        return super().encode(value)[::-1]

    def decode(self, data: bytes, /) -> Any:
        return super().decode(data[::-1])


def test_c16_what_a_codec_makes_of_ours_is_what_is_stored() -> None:
    bench = Bench()
    assert bench.engine.run("k", lambda: [1, 2], scope="s", codec=Secret()).value == [1, 2]
    [record] = bench.engine.opened().store.get([bench.engine.id_of("s", "k")])
    assert record is not None
    assert record.result is not None
    assert record.result.endswith(b"]2,1[")
    assert bench.engine.run("k", lambda: list[int](), scope="s", codec=Secret()).value == [1, 2]


class Exits(JsonCodec):
    """A codec whose process is told to end."""

    def encode(self, value: Any, /) -> bytes:
        raise SystemExit


async def test_c6_no_lease_is_renewed_of_an_attempt_that_is_over_however_it_ended() -> None:
    """What is renewed for ever could be taken over by nobody."""
    async with AsyncIdempotency(MemoryStore(), policy=Policy(lease=0.3, wait=SECONDS, poll=0.02)) as engine:
        with pytest.raises(SystemExit):
            await engine.run("k", lambda: 1, scope="s", codec=Exits())
        outcome = await engine.run("k", lambda: 2, scope="s")
    assert (outcome.value, outcome.attempt) == (2, 2)


def test_outside_an_operation_there_is_none() -> None:
    assert current_operation(default=None) is None
    with pytest.raises(errors.NoOperation, match="default="):
        current_operation()
