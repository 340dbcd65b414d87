"""The rules of the core, by both engines over every store."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from retryproof import Outcome, current_operation, errors
from retryproof.core.codec import JsonCodec
from retryproof.core.commands import Acquired, Claim
from retryproof.stores import open_store
from retryproof.stores.memory import MemoryStore
from tests.engine.conftest import Caller, MakeCaller
from tests.engine.support import SECONDS, in_thread

LEASE = 0.15


def die() -> None:
    """An attempt that ends without saying whether it had its effect, as one whose process died."""
    raise errors.OutcomeUnknown("the bank hung up")


def fail() -> None:
    raise OSError("no money")


def run_until_acquired(caller: Caller, key: str, fn: Any, **options: Any) -> Outcome[Any]:
    """Try again while an earlier attempt's lease is live."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return caller.run(key, fn, **options)
        except errors.InProgress:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # the caller's back-off


def test_c1_one_of_many_callers_runs(store_url: str, make_caller: MakeCaller) -> None:
    caller, effects, leave = make_caller(store_url), list[int](), threading.Event()

    def charge() -> int:
        effects.append(1)
        leave.wait(SECONDS)
        return 7

    calls = [caller.start("k", charge) for _ in range(12)]
    losers = 0
    deadline = time.monotonic() + SECONDS
    while losers < 11 and time.monotonic() < deadline:
        losers = sum(call.done() for call in calls)
    leave.set()
    values = [call.result(SECONDS).value for call in calls if call.exception(SECONDS) is None]
    refused = [call.exception(SECONDS) for call in calls if call.exception(SECONDS) is not None]
    assert (effects, values) == ([1], [7])
    assert [type(error) for error in refused] == [errors.InProgress] * 11
    assert caller.run("k", charge).replayed


def test_c2_the_token_can_be_read_and_grows(store_url: str, make_caller: MakeCaller) -> None:
    caller, tokens = make_caller(store_url, lease=LEASE), list[int]()

    def read_then(end: Any) -> Any:
        tokens.append(current_operation().token)
        return end()

    with pytest.raises(OSError, match="no money"):
        caller.run("k", lambda: read_then(fail))
    with pytest.raises(errors.OutcomeUnknown):
        caller.run("k", lambda: read_then(die))
    run_until_acquired(caller, "k", lambda: read_then(lambda: 0))
    assert len(tokens) == 3
    assert tokens == sorted(set(tokens))


def test_c2_c8_a_holder_past_its_lease_gets_the_winners_result(store_url: str, make_caller: MakeCaller) -> None:
    """It is not renewed past `max_run`; another attempt takes over, and both callers see what that one stored."""
    caller, inside, leave = make_caller(store_url, lease=LEASE, max_run=LEASE), threading.Event(), threading.Event()

    def slow() -> str:
        inside.set()
        leave.wait(SECONDS)
        return "late"

    stale = caller.start("k", slow)
    assert inside.wait(SECONDS)
    winner = run_until_acquired(caller, "k", lambda: "winner")
    leave.set()
    overtaken = stale.result(SECONDS)
    assert (winner.value, winner.replayed, winner.attempt) == ("winner", False, 2)
    assert (overtaken.value, overtaken.replayed) == ("winner", True)
    assert caller.run("k", lambda: "again").value == "winner"
    assert caller.events.kinds.count("lease_lost") == 1
    assert "overrun" in caller.events.kinds


def test_c8_a_holder_that_lost_to_one_that_still_runs_is_told_so(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url, lease=LEASE, max_run=LEASE)
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def run(number: int) -> int:
        inside[number].set()
        leave[number].wait(SECONDS)
        return number

    stale = caller.start("k", lambda: run(0))
    assert inside[0].wait(SECONDS)
    renewed = make_caller(store_url, lease=LEASE)
    winner = in_thread(lambda: run_until_acquired(renewed, "k", lambda: run(1)))
    assert inside[1].wait(SECONDS)
    leave[0].set()
    with pytest.raises(errors.LeaseLost, match="took this operation over"):
        stale.result(SECONDS)
    leave[1].set()
    assert winner.result(SECONDS).value == 1


def test_c5_an_exception_releases(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url)
    with pytest.raises(OSError, match="no money"):
        caller.run("k", fail)
    outcome = caller.run("k", lambda: 1)
    assert (outcome.value, outcome.replayed, outcome.attempt) == (1, False, 1)
    assert caller.events.kinds == ["failed", "fresh"]


def test_c5_c7_an_unknown_outcome_stays_for_the_policy_to_decide(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url, lease=LEASE)
    refusing = make_caller(store_url, lease=LEASE, on_abandoned="refuse")
    with pytest.raises(errors.OutcomeUnknown, match="the bank hung up"):
        caller.run("k", die)
    with pytest.raises(errors.InProgress) as in_progress:
        caller.run("k", lambda: 1)
    assert in_progress.value.retry_after is not None
    assert 0 <= in_progress.value.retry_after <= LEASE
    with pytest.raises(errors.OutcomeUnknown, match="keys settle"):
        run_until_acquired(refusing, "k", lambda: 1)
    outcome = caller.run("k", lambda: 2)
    assert (outcome.value, outcome.attempt) == (2, 2)


def test_a_mismatch_never_runs(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url)
    caller.run("k", lambda: 1, fingerprint=b"one")
    with pytest.raises(errors.Mismatch):
        caller.run("k", lambda: pytest.fail("it ran"), fingerprint=b"other")
    assert caller.run("k", lambda: 2, fingerprint=b"one").value == 1


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_c12_what_is_falsy_is_a_result(store_url: str, make_caller: MakeCaller, value: Any) -> None:
    caller = make_caller(store_url)
    fresh, replay = caller.run("k", lambda: value), caller.run("k", lambda: "again")
    assert (fresh.value, fresh.replayed) == (value, False)
    assert (replay.value, replay.replayed) == (value, True)
    assert type(replay.value) is type(value)


def test_c13_c14_attempts_share_their_birth_and_their_steps(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url, lease=LEASE)
    born: list[tuple[UUID, Any, str]] = []
    paid: list[UUID] = []

    def work(end: Any) -> Any:
        operation = current_operation()
        born.append((operation.derive("charge"), operation.first_seen, operation.key_digest))

        def pay(key: UUID) -> dict[str, int]:
            paid.append(key)
            return {"receipt": len(paid)}

        receipt = operation.step("pay", pay)
        assert receipt == {"receipt": 1}
        with pytest.raises(errors.ConfigurationError, match="twice"):
            operation.step("pay", pay)
        return end()

    with pytest.raises(OSError, match="no money"):
        caller.run("k", lambda: work(fail))
    with pytest.raises(errors.OutcomeUnknown):
        caller.run("k", lambda: work(die))
    outcome = run_until_acquired(caller, "k", lambda: work(lambda: "done"))
    assert (outcome.value, outcome.attempt) == ("done", 2)
    assert len(set(born)) == 1
    assert len(paid) == 1
    assert paid[0] != born[0][0]
    assert outcome.first_seen == born[0][1]
    with pytest.raises(errors.NoOperation):
        current_operation()


def test_c15_an_operation_that_dies_alone_is_poison(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url, lease=0.05, max_attempts=2)
    with pytest.raises(errors.OutcomeUnknown, match="the bank"):
        caller.run("k", die)
    with pytest.raises(errors.OutcomeUnknown, match="the bank"):
        run_until_acquired(caller, "k", die)
    with pytest.raises(errors.OutcomeUnknown, match="too many attempts died"):
        run_until_acquired(caller, "k", lambda: pytest.fail("it ran"))


def test_c15_operations_that_die_side_by_side_are_not_poison(store_url: str, make_caller: MakeCaller) -> None:
    """Which of them killed the process is not known; a death counts once an attempt was retried alone."""
    caller, store = make_caller(store_url, lease=0.2, max_attempts=2), open_store(store_url)
    engine = caller.sync or caller.task
    assert engine is not None
    ids = [engine.id_of(caller.scope, key) for key in ("a", "b")]
    for attempt in range(1, 5):
        together, parting = threading.Barrier(3), threading.Event()

        def work(together: threading.Barrier = together, parting: threading.Event = parting) -> None:
            together.wait(SECONDS)
            parting.wait(SECONDS)
            die()

        calls = [in_thread(lambda key=key, work=work: run_until_acquired(caller, key, work)) for key in ("a", "b")]  # type: ignore[misc]  # mypy#12557
        together.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while any(record is None or record.counts for record in store.get(ids)):
            assert time.monotonic() < deadline
            time.sleep(0.005)  # they learn of each other at a renewal
        assert [record.attempt for record in store.get(ids) if record is not None] == [attempt] * 2
        parting.set()
        for call in calls:
            assert "the bank" in str(call.exception(SECONDS))
    store.close()


@dataclasses.dataclass
class Receipt:
    number: int
    lines: tuple[str, ...]


def test_c16_the_first_caller_sees_what_a_replay_gives(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url)
    plain: list[Any] = [caller.run("plain", lambda: {"pair": (1, 2)}).value for _ in range(2)]
    assert plain == [{"pair": [1, 2]}] * 2
    codec = JsonCodec(Receipt)
    typed = [caller.run("typed", lambda: Receipt(7, ("a", "b")), codec=codec).value for _ in range(2)]
    assert typed == [Receipt(7, ("a", "b"))] * 2


@pytest.mark.parametrize("value", [object(), "x" * 5000], ids=["unencodable", "too large"])
def test_c17_a_result_that_is_not_kept_is_done_all_the_same(
    store_url: str, make_caller: MakeCaller, value: Any
) -> None:
    caller = make_caller(store_url, max_result=1000)
    assert caller.run("k", lambda: value).value is value
    with pytest.raises(errors.ResultOmitted):
        caller.run("k", lambda: pytest.fail("it ran"))


def test_c18_a_duplicate_waits_and_replays(store_url: str, make_caller: MakeCaller) -> None:
    caller, inside, leave = make_caller(store_url, wait=SECONDS, poll=0.02), threading.Event(), threading.Event()

    def slow() -> int:
        inside.set()
        leave.wait(SECONDS)
        return 7

    first = caller.start("k", slow)
    assert inside.wait(SECONDS)
    waiting = [caller.start("k", lambda: 8) for _ in range(5)]
    leave.set()
    assert first.result(SECONDS).value == 7
    assert [(call.result(SECONDS).value, call.result(SECONDS).replayed) for call in waiting] == [(7, True)] * 5


def test_c18_a_waiter_takes_what_is_released(store_url: str, make_caller: MakeCaller) -> None:
    caller, inside, leave = make_caller(store_url, wait=SECONDS, poll=0.05), threading.Event(), threading.Event()

    def fails() -> None:
        inside.set()
        leave.wait(SECONDS)
        fail()

    first = caller.start("k", fails)
    assert inside.wait(SECONDS)
    ran = threading.Event()

    def runs() -> str:
        ran.set()
        return "mine"

    waiting = caller.start("k", runs)
    leave.set()
    assert isinstance(first.exception(SECONDS), OSError)
    assert ran.wait(1.0)
    assert waiting.result(SECONDS).value == "mine"


def test_c18_waiters_are_bounded(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url, wait=SECONDS, poll=SECONDS, max_waiters=2)
    inside, leave = threading.Event(), threading.Event()

    def slow() -> bool:
        inside.set()
        return leave.wait(SECONDS)

    first = caller.start("k", slow)
    assert inside.wait(SECONDS)
    waiting = [caller.start("k", lambda: 0) for _ in range(6)]
    deadline = time.monotonic() + SECONDS
    while sum(call.done() for call in waiting) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = [call.exception() for call in waiting if call.done()]
    assert [type(error) for error in refused] == [errors.InProgress] * 4
    leave.set()
    assert first.result(SECONDS).value is True


def test_c20_engines_that_share_a_store_do_not_mix(store_url: str, make_caller: MakeCaller, unique: str) -> None:
    one, other = make_caller(store_url), make_caller(store_url, max_result=1000)
    scopes = {f"{unique}one": one, f"{unique}other": other}
    names = [(scope, f"{number}") for number in range(40) for scope in scopes]
    calls = [scopes[scope].start(key, partial("{}/{}".format, scope, key), scope=scope) for scope, key in names]
    assert [call.result(SECONDS).value for call in calls] == [f"{scope}/{key}" for scope, key in names]
    for scope, caller in scopes.items():
        replay = caller.run("7", lambda: "again", scope=scope)
        assert (replay.value, replay.replayed) == (f"{scope}/7", True)


class Reversed:
    """A codec of somebody's own."""

    name = "reversed"

    def encode(self, value: Any, /) -> bytes:
        return str(value)[::-1].encode()

    def decode(self, data: bytes, /) -> Any:
        return data.decode()[::-1]


def test_c21_a_result_by_another_codec_is_an_error_and_no_run(store_url: str, make_caller: MakeCaller) -> None:
    caller = make_caller(store_url)
    assert caller.run("k", lambda: "abc", codec=Reversed()).value == "abc"
    with pytest.raises(errors.Unreadable, match="'reversed'"):
        caller.run("k", lambda: pytest.fail("it ran"))
    assert caller.run("k", lambda: "again", codec=Reversed()).value == "abc"


def test_c21_a_fingerprint_by_an_unknown_algorithm_is_an_error_and_no_run(make_caller: MakeCaller) -> None:
    store = MemoryStore()
    caller = make_caller(store)
    engine = caller.sync or caller.task
    assert engine is not None
    foreign = Claim(
        id=engine.id_of(caller.scope, "k"),
        fingerprint=b"\xff\xfefrom the future",
        nonce=os.urandom(16),
        lease=10.0,
        retention=60.0,
        unsettled_retention=60.0,
    )
    assert isinstance(store.claim([foreign])[0], Acquired)
    with pytest.raises(errors.Unreadable, match="fffe"):
        caller.run("k", lambda: pytest.fail("it ran"))
    assert caller.events.kinds == ["unreadable"]


def test_a_key_that_is_none_is_refused(make_caller: MakeCaller) -> None:
    caller = make_caller("memory://")
    for key in ("", "x" * 256, "über", "a\nb"):
        with pytest.raises(errors.InvalidKey):
            caller.run(key, lambda: pytest.fail("it ran"))
