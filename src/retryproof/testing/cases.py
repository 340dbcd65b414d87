"""The cases that every store passes, written once for blocking and async stores (see `conformance`).

The numbers in brackets are the project's rules (docs/reference/rules.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from retryproof.core.commands import (
    DONE,
    LOST,
    Abandoned,
    Acquired,
    Claim,
    ClaimReply,
    Complete,
    Done,
    Finished,
    Mismatch,
    Running,
    StoreCommand,
)
from retryproof.core.record import Record, State
from retryproof.stores.base import Capabilities, Reaped
from retryproof.testing.bench import (
    LONG,
    SHORT,
    Bench,
    BenchCall,
    again,
    checkpoint,
    complete,
    new_claim,
    other_input,
    release,
    renew,
)

CROWD = 100
"""How many threads or tasks want one operation."""


def _always(capabilities: Capabilities) -> bool:
    return True


@dataclass(frozen=True)
class Case:
    """One behaviour of a store. offered: whether a store with these capabilities has it."""

    name: str
    run: Callable[[Bench], Awaitable[None]]
    offered: Callable[[Capabilities], bool] = _always


CASES: list[Case] = []


def case(function: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
    """Add a case under its function's name."""
    CASES.append(Case(function.__name__, function))
    return function


def case_where(offered: Callable[[Capabilities], bool]) -> Callable[[Any], Callable[[Bench], Awaitable[None]]]:
    """Add a case for stores whose capabilities say so."""

    def add(function: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
        CASES.append(Case(function.__name__, function, offered))
        return function

    return add


# The claim's table: no record


@case
async def a_new_operation_is_acquired(bench: Bench) -> None:
    claim = new_claim(tenant=secrets.token_bytes(16), trace="00-trace-01")
    acquired = await bench.held(claim)
    assert (acquired.attempt, acquired.birth, acquired.trace) == (1, claim.nonce, "00-trace-01")
    assert dict(acquired.checkpoints) == {}
    record = await bench.record(claim.id)
    assert (record.id, record.state, record.fingerprint) == (claim.id, State.IN_PROGRESS, claim.fingerprint)
    assert (record.birth, record.nonce, record.token) == (claim.nonce, claim.nonce, acquired.token)
    assert (record.attempt, record.deaths, record.counts, record.result) == (1, 0, True, None)
    assert (record.tenant, record.trace, dict(record.checkpoints)) == (claim.tenant, claim.trace, {})
    assert record.retention == claim.retention


@case
async def c9_times_are_the_stores_own(bench: Bench) -> None:
    claim = new_claim(lease=LONG, unsettled_retention=2 * LONG)
    acquired = await bench.held(claim)
    record = await bench.record(claim.id)
    assert acquired.first_seen == record.first_seen <= record.read_at
    # A store may keep times in milliseconds.
    assert abs(record.lease_until - record.first_seen - LONG * 1_000_000) <= 2_000
    assert abs(record.expires_at - record.first_seen - 2 * LONG * 1_000_000) <= 2_000


@case
async def c2_a_token_is_the_stores_time_at_least(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    assert acquired.token >= acquired.first_seen - 2_000


@case
async def a_fingerprint_may_be_empty_or_64_bytes(bench: Bench) -> None:
    for fingerprint in (b"", b"\0", bytes(64), b"\xff" * 64):
        claim = new_claim(fingerprint=fingerprint)
        await bench.held(claim)
        assert (await bench.record(claim.id)).fingerprint == fingerprint
        assert isinstance(await bench.claim(again(claim)), Running)
        assert await bench.claim(again(claim, fingerprint=b"\1other")) == Mismatch(fingerprint)


@case
async def nothing_is_known_of_what_was_never_claimed(bench: Bench) -> None:
    assert await bench.get(new_claim().id) is None


# The claim's table: in progress


@case
async def c1_a_live_lease_is_running(bench: Bench) -> None:
    claim = new_claim()
    await bench.held(claim)
    before = await bench.frozen(claim.id)
    reply = await bench.claim(again(claim, lease=SHORT))
    assert isinstance(reply, Running)
    assert 0 < reply.left <= LONG
    assert await bench.frozen(claim.id) == before


@case
async def a_live_lease_is_running_to_a_policy_that_refuses(bench: Bench) -> None:
    claim = new_claim()
    await bench.held(claim)
    assert isinstance(await bench.claim(again(claim, on_abandoned="refuse", max_attempts=1)), Running)


@case
async def c3_a_repeated_claim_gets_the_same_answer(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    before = await bench.frozen(claim.id)
    assert await bench.claim(claim) == acquired
    assert await bench.frozen(claim.id) == before


@case
async def c3_a_claim_repeated_after_its_lease_gets_the_same_answer(bench: Bench) -> None:
    claim = new_claim(lease=SHORT)
    acquired = await bench.dead(claim)
    assert await bench.claim(claim) == acquired
    assert await bench.claim(replace(claim, on_abandoned="refuse", max_attempts=1)) == acquired
    assert (await bench.record(claim.id)).attempt == 1


@case
async def c3_a_repeated_take_over_gets_the_same_answer(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    await bench.dead(dead)
    later = again(dead)
    taken = await bench.held(later)
    assert await bench.claim(later) == taken


@case
async def c3_a_late_duplicate_of_a_claim_that_lost_its_lease_is_running(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    await bench.dead(dead)
    await bench.held(again(dead))
    assert isinstance(await bench.claim(dead), Running)


@case
async def c3_a_late_duplicate_of_a_claim_that_was_released_is_not_acquired(bench: Bench) -> None:
    claim = new_claim()
    await bench.fenced(release(claim, await bench.held(claim)))
    before = await bench.frozen(claim.id)
    assert await bench.claim(claim) == Running(0.0)
    assert await bench.frozen(claim.id) == before


@case
async def a_lease_that_is_over_is_taken_over(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, trace="first")
    first = await bench.held(dead)
    assert await bench.fenced(checkpoint(dead, first, "charge", b"\0kept")) == DONE
    await bench.outlive(dead.id)
    second = await bench.held(again(dead, trace="second"))
    assert (second.attempt, second.birth, second.first_seen) == (2, first.birth, first.first_seen)
    assert (dict(second.checkpoints), second.trace) == ({"charge": b"\0kept"}, "first")
    assert second.token > first.token


@case
async def c7_a_lease_that_is_over_is_abandoned_to_a_policy_that_refuses(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    await bench.dead(dead)
    before = await bench.frozen(dead.id)
    assert await bench.claim(again(dead, on_abandoned="refuse")) == Abandoned("refused", 1)
    assert await bench.frozen(dead.id) == before


@case
async def c12_an_unsettled_record_is_never_fresh(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, retention=SHORT, unsettled_retention=SHORT)
    first = await bench.held(dead)
    await bench.wait_past(dead.id, lambda record: max(record.lease_until, record.expires_at))
    assert await bench.claim(again(dead, on_abandoned="refuse")) == Abandoned("refused", 1)
    assert await bench.claim(other_input(dead)) == Mismatch(dead.fingerprint)
    second = await bench.held(again(dead))
    assert (second.attempt, second.birth) == (2, first.birth)


@case
async def c12_what_was_released_with_something_kept_is_never_fresh(bench: Bench) -> None:
    claim = new_claim(retention=SHORT, unsettled_retention=SHORT, tenant=bytes(16), trace="first")
    first = await bench.held(claim)
    await bench.fenced(checkpoint(claim, first))
    assert await bench.fenced(release(claim, first)) == DONE
    await bench.wait_past(claim.id, lambda record: record.expires_at)
    assert claim.id in {record.id for record in await _scan_all(bench, prefix=claim.id[:8])}
    assert await bench.claim(other_input(claim)) == Mismatch(claim.fingerprint)
    second = await bench.held(again(claim))
    assert (second.attempt, second.birth, second.first_seen) == (1, first.birth, first.first_seen)
    assert dict(second.checkpoints) == {"step": b"value"}


@case
async def c12_what_was_released_with_something_kept_is_kept_as_long_as_what_died(bench: Bench) -> None:
    claim = new_claim(retention=SHORT, unsettled_retention=2 * LONG)
    first = await bench.held(claim)
    before = await bench.record(claim.id)
    await bench.fenced(checkpoint(claim, first))
    assert await bench.fenced(release(claim, first)) == DONE
    assert (await bench.record(claim.id)).expires_at == before.expires_at
    await bench.reap()
    assert dict((await bench.record(claim.id)).checkpoints) == {"step": b"value"}


async def _failed_after_a_death(bench: Bench, **changes: Any) -> tuple[Claim, Acquired]:
    """An attempt ended unknown, and the next one failed cleanly: the first claim, and the hold of the second."""
    dead = new_claim(lease=SHORT, **changes)
    await bench.dead(dead)
    later = again(dead, **changes)
    second = await bench.held(later)
    assert await bench.fenced(release(later, second)) == DONE
    return dead, second


@case
async def c12_a_clean_failure_does_not_settle_what_ended_unknown_before(bench: Bench) -> None:
    dead, second = await _failed_after_a_death(bench, retention=SHORT, unsettled_retention=2 * LONG)
    record = await bench.record(dead.id)
    assert (record.state, record.attempt, record.settled) == (State.RELEASED, 2, False)
    assert record.expires_at - record.read_at > LONG * 1_000_000
    await bench.reap()
    assert (await bench.frozen(dead.id)) == replace(record, read_at=0)
    third = await bench.held(again(dead))
    assert (third.attempt, third.birth, third.first_seen) == (2, second.birth, second.first_seen)


@case
async def c12_what_ended_unknown_and_then_failed_is_never_fresh(bench: Bench) -> None:
    dead, second = await _failed_after_a_death(bench, retention=SHORT, unsettled_retention=SHORT)
    await bench.wait_past(dead.id, lambda record: record.expires_at)
    assert dead.id in {record.id for record in await _scan_all(bench, prefix=dead.id[:8])}
    assert await bench.claim(other_input(dead)) == Mismatch(dead.fingerprint)
    third = await bench.held(again(dead))
    assert (third.attempt, third.birth, third.first_seen) == (2, second.birth, second.first_seen)


@case
async def c7_what_ended_unknown_and_then_failed_is_abandoned_to_a_policy_that_refuses(bench: Bench) -> None:
    dead, _ = await _failed_after_a_death(bench)
    before = await bench.frozen(dead.id)
    assert await bench.claim(again(dead, on_abandoned="refuse")) == Abandoned("refused", 2)
    assert await bench.frozen(dead.id) == before


@case
async def c12_a_disowned_claim_leaves_what_was_known_before_it(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, retention=SHORT, unsettled_retention=2 * LONG)
    first = await bench.held(dead)
    assert await bench.fenced(checkpoint(dead, first)) == DONE
    await bench.outlive(dead.id)
    for _ in range(3):  # each is applied, its caller has gone, and the keeper releases it
        unwanted = again(dead, retention=SHORT, unsettled_retention=2 * LONG)
        assert await bench.fenced(release(unwanted, await bench.held(unwanted))) == DONE
        await bench.reap()
    assert await bench.claim(again(dead, on_abandoned="refuse")) == Abandoned("refused", 2)
    taken = await bench.held(again(dead, max_attempts=2, lease=SHORT))
    assert (taken.attempt, taken.birth, dict(taken.checkpoints)) == (2, first.birth, {"step": b"value"})
    await bench.outlive(dead.id)
    assert await bench.claim(again(dead, max_attempts=2)) == Abandoned("poisoned", 2)


@case
async def o1_an_operator_who_says_that_it_never_happened_settles_what_ended_unknown(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, retention=2 * LONG, unsettled_retention=4 * LONG)
    first = await bench.dead(dead)
    operator = again(dead, retention=2 * LONG, unsettled_retention=4 * LONG)
    assert await bench.fenced(replace(release(operator, await bench.held(operator)), settles=True)) == DONE
    record = await bench.record(dead.id)
    assert (record.state, record.attempt, record.deaths, record.settled) == (State.RELEASED, 1, 0, True)
    assert record.expires_at - record.read_at <= 2 * LONG * 1_000_000 + 2_000
    taken = await bench.held(again(dead, on_abandoned="refuse", max_attempts=1))
    assert (taken.attempt, taken.birth) == (1, first.birth)


@case
async def o1_what_an_operator_settled_is_fresh_after_its_retention(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, retention=SHORT, unsettled_retention=2 * LONG)
    await bench.dead(dead)
    operator = again(dead, retention=SHORT)
    assert await bench.fenced(replace(release(operator, await bench.held(operator)), settles=True)) == DONE
    await bench.wait_gone(dead.id)
    later = again(dead)
    assert (await bench.held(later)).birth == later.nonce


# The claim's table: settled


@case
async def a_released_operation_is_acquired_and_its_attempt_not_counted(bench: Bench) -> None:
    claim = new_claim(trace="first")
    first = await bench.held(claim)
    await bench.fenced(checkpoint(claim, first))
    assert await bench.fenced(release(claim, first)) == DONE
    assert (await bench.record(claim.id)).state is State.RELEASED
    second = await bench.held(again(claim, on_abandoned="refuse", max_attempts=1))
    assert (second.attempt, second.birth, second.first_seen) == (1, first.birth, first.first_seen)
    assert (dict(second.checkpoints), second.trace) == ({"step": b"value"}, "first")
    assert second.token > first.token


@case
async def results_of_every_kind_are_finished_as_they_were_stored(bench: Bench) -> None:
    most = bench.capabilities.max_result
    large = secrets.token_bytes(1_048_576 if most is None else min(most, 1_048_576))
    for result in (b"", b"\0", b"null", b"0", b"false", b"[]", b"a\0b\xff\xfe", bytes(range(256)), large):
        claim = new_claim(trace="first")
        acquired = await bench.held(claim)
        assert await bench.fenced(complete(claim, acquired, result)) == DONE
        finished = await bench.claim(again(claim, trace="second"))
        assert finished == Finished(result, 1, acquired.first_seen, "first")
        record = await bench.record(claim.id)
        assert (record.state, record.result) == (State.COMPLETED, result)


@case
async def c17_a_tombstone_is_finished_without_a_result(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    assert await bench.fenced(complete(claim, acquired, None)) == DONE
    assert await bench.claim(again(claim)) == Finished(None, 1, acquired.first_seen, "")
    record = await bench.record(claim.id)
    assert (record.state, record.result) == (State.TOMBSTONE, None)


@case
async def a_taken_over_attempt_finishes_as_the_second(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    first = await bench.dead(dead)
    later = again(dead)
    await bench.fenced(complete(later, await bench.held(later)))
    assert await bench.claim(again(dead)) == Finished(b"result", 2, first.first_seen, "")


@case
async def c12_retention_starts_when_an_operation_is_settled(bench: Bench) -> None:
    for settle in (complete, release):
        claim = new_claim(unsettled_retention=3 * LONG)
        await bench.fenced(settle(claim, await bench.held(claim)))
        record = await bench.record(claim.id)
        assert 0 < record.expires_at - record.read_at <= LONG * 1_000_000 + 2_000


@case
async def the_retention_of_the_claim_that_settles_counts(bench: Bench) -> None:
    claim = new_claim(retention=SHORT)
    await bench.fenced(release(claim, await bench.held(again(claim, nonce=claim.nonce))))
    later = again(claim, retention=SHORT)
    await bench.fenced(complete(later, await bench.held(later)))
    await bench.wait_gone(claim.id)


# A mismatch never runs


async def _each_state(bench: Bench, **changes: Any) -> dict[str, Claim]:
    """An operation in every recorded state."""
    live, over, released, completed, tombstone = (new_claim(**changes) for _ in range(5))
    over = replace(over, lease=SHORT)
    await bench.held(live)
    await bench.dead(over)
    await bench.fenced(release(released, await bench.held(released)))
    await bench.fenced(complete(completed, await bench.held(completed)))
    await bench.fenced(complete(tombstone, await bench.held(tombstone), None))
    return {"live": live, "over": over, "released": released, "completed": completed, "tombstone": tombstone}


@case
async def other_input_is_a_mismatch_in_every_state_and_changes_nothing(bench: Bench) -> None:
    for claim in (await _each_state(bench)).values():
        before = await bench.frozen(claim.id)
        assert await bench.claim(other_input(claim)) == Mismatch(claim.fingerprint)
        assert await bench.claim(other_input(claim, on_abandoned="refuse")) == Mismatch(claim.fingerprint)
        assert await bench.frozen(claim.id) == before


@case
async def the_nonce_of_the_holder_does_not_excuse_other_input(bench: Bench) -> None:
    claim = new_claim()
    await bench.held(claim)
    assert await bench.claim(replace(claim, fingerprint=b"\1other")) == Mismatch(claim.fingerprint)


# After the retention


@case
async def settled_and_past_retention_is_fresh_even_for_other_input(bench: Bench) -> None:
    settlers: Sequence[Callable[[Claim, Acquired], StoreCommand]] = (
        complete,
        release,
        lambda claim, acquired: complete(claim, acquired, None),
    )
    for settle in settlers:
        for next_claim in (again, other_input):
            claim = new_claim(retention=SHORT, tenant=bytes(16), trace="first")
            first = await bench.held(claim)
            if settle is not release:  # a released record with checkpoints is not settled
                await bench.fenced(checkpoint(claim, first))
            assert await bench.one(settle(claim, first)) == DONE
            await bench.wait_gone(claim.id)
            later = next_claim(claim, tenant=b"\1" * 16, trace="second")
            fresh = await bench.held(later)
            assert (fresh.attempt, fresh.birth, fresh.trace) == (1, later.nonce, "second")
            assert dict(fresh.checkpoints) == {}
            assert fresh.first_seen > first.first_seen
            assert fresh.token > first.token
            record = await bench.record(claim.id)
            assert (record.fingerprint, record.tenant) == (later.fingerprint, later.tenant)
            assert (record.result, record.deaths) == (None, 0)


# Fenced commands


def _fenced_commands(claim: Claim, acquired: Acquired) -> Sequence[Any]:
    return [
        complete(claim, acquired),
        complete(claim, acquired, None),
        release(claim, acquired),
        renew(claim, acquired),
        checkpoint(claim, acquired),
    ]


@case
async def c2_a_wrong_token_or_nonce_changes_nothing(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    before = await bench.frozen(claim.id)
    for command in _fenced_commands(claim, acquired):
        for token in (0, acquired.token - 1, acquired.token + 1):
            assert await bench.one(replace(command, token=token)) == LOST
        assert await bench.one(replace(command, nonce=secrets.token_bytes(16))) == LOST
    assert await bench.frozen(claim.id) == before


@case
async def c2_what_was_never_claimed_cannot_be_settled(bench: Bench) -> None:
    claim = new_claim()
    for command in _fenced_commands(claim, Acquired(1, 1, 1, claim.nonce)):
        assert await bench.one(command) == LOST
    assert await bench.get(claim.id) is None


@case
async def c2_a_holder_that_was_overtaken_changes_nothing(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    first = await bench.dead(dead)
    later = again(dead)
    second = await bench.held(later)
    before = await bench.frozen(dead.id)
    for command in _fenced_commands(dead, first):
        assert await bench.one(command) == LOST
    assert await bench.frozen(dead.id) == before
    assert await bench.fenced(complete(later, second, b"winner")) == DONE
    for command in _fenced_commands(dead, first):
        assert await bench.one(command) == LOST
    assert (await bench.record(dead.id)).result == b"winner"


@case
async def c2_a_holder_that_was_overtaken_after_its_release_changes_nothing(bench: Bench) -> None:
    claim = new_claim()
    first = await bench.held(claim)
    await bench.fenced(release(claim, first))
    later = again(claim)
    await bench.held(later)
    before = await bench.frozen(claim.id)
    for command in _fenced_commands(claim, first):
        assert await bench.one(command) == LOST
    assert await bench.frozen(claim.id) == before


@case
async def c3_a_repeated_complete_is_done_and_changes_nothing(bench: Bench) -> None:
    for result in (b"result", b"", None):
        claim = new_claim()
        acquired = await bench.held(claim)
        assert await bench.fenced(complete(claim, acquired, result)) == DONE
        before = await bench.frozen(claim.id)
        assert await bench.fenced(complete(claim, acquired, result)) == DONE
        assert await bench.frozen(claim.id) == before
        assert await bench.fenced(release(claim, acquired)) == LOST
        assert await bench.fenced(renew(claim, acquired)) == LOST
        assert await bench.fenced(checkpoint(claim, acquired)) == LOST
        assert await bench.frozen(claim.id) == before


@case
async def c3_a_repeated_release_is_done_and_changes_nothing(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    assert await bench.fenced(release(claim, acquired)) == DONE
    before = await bench.frozen(claim.id)
    assert await bench.fenced(release(claim, acquired)) == DONE
    assert await bench.fenced(complete(claim, acquired)) == LOST
    assert await bench.fenced(renew(claim, acquired)) == LOST
    assert await bench.fenced(checkpoint(claim, acquired)) == LOST
    assert await bench.frozen(claim.id) == before


@case
async def a_lease_that_is_over_but_not_taken_is_still_current(bench: Bench) -> None:
    settlers: Sequence[tuple[Callable[[Claim, Acquired], StoreCommand], State]] = (
        (complete, State.COMPLETED),
        (release, State.RELEASED),
        (checkpoint, State.IN_PROGRESS),
    )
    for settle, state in settlers:
        claim = new_claim(lease=SHORT)
        acquired = await bench.dead(claim)
        assert await bench.one(settle(claim, acquired)) == DONE
        assert (await bench.record(claim.id)).state is state


@case
async def c6_a_renewal_extends_a_lease_even_one_that_is_over(bench: Bench) -> None:
    claim = new_claim(lease=SHORT)
    acquired = await bench.dead(claim)
    assert await bench.fenced(renew(claim, acquired)) == DONE
    record = await bench.record(claim.id)
    assert record.lease_until - record.read_at > LONG * 1_000_000 / 2
    assert isinstance(await bench.claim(again(claim)), Running)


@case
async def c6_a_renewal_never_shortens_a_lease(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    before = await bench.frozen(claim.id)
    assert await bench.fenced(renew(claim, acquired, SHORT)) == DONE
    assert await bench.frozen(claim.id) == before


@case
async def c14_checkpoints_are_kept_under_their_names(bench: Bench) -> None:
    kept = {"": b"", "charge": b"\0\xff", "naïve – ключ": b"1", "a" * 255: bytes(10_000), "nul": b"x\0y"}
    claim = new_claim(lease=SHORT)
    acquired = await bench.held(claim)
    for name, value in kept.items():
        assert await bench.fenced(checkpoint(claim, acquired, name, b"overwritten")) == DONE
        assert await bench.fenced(checkpoint(claim, acquired, name, value)) == DONE
    assert dict((await bench.record(claim.id)).checkpoints) == kept
    assert dict((await bench.held_again(claim)).checkpoints) == kept


@case
async def a_release_keeps_checkpoints_and_a_completion_ends_them(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    await bench.fenced(checkpoint(claim, acquired))
    await bench.fenced(release(claim, acquired))
    later = again(claim)
    second = await bench.held(later)
    assert await bench.fenced(checkpoint(later, second, "next", b"2")) == DONE
    assert dict((await bench.record(claim.id)).checkpoints) == {"step": b"value", "next": b"2"}
    await bench.fenced(complete(later, second))
    assert dict((await bench.record(claim.id)).checkpoints) == {}


# Tokens


@case
async def c2_tokens_only_grow(bench: Bench) -> None:
    claim = new_claim(lease=SHORT)
    tokens = [(await bench.dead(claim)).token]
    for _ in range(3):
        claim = again(claim)
        acquired = await bench.held(claim)
        tokens.append(acquired.token)
        await bench.fenced(release(claim, acquired))
    assert tokens == sorted(set(tokens))


# Poison (C15)


async def _die(bench: Bench, claim: Claim, times: int, alone: int = 2) -> Claim:
    """The last one of a number of attempts that died."""
    claim = replace(claim, lease=SHORT)
    for _ in range(times):
        claim = again(claim, lease=SHORT, alone=alone)
        await bench.dead(claim)
    return claim


@case
async def c15_after_so_many_attempts_that_died_alone_it_is_poisoned(bench: Bench) -> None:
    claim = await _die(bench, new_claim(), times=3)
    before = await bench.frozen(claim.id)
    assert (before.attempt, before.deaths, before.counts) == (3, 2, True)
    assert await bench.claim(again(claim, max_attempts=3)) == Abandoned("poisoned", 3)
    assert await bench.claim(again(claim, max_attempts=1)) == Abandoned("poisoned", 3)
    assert await bench.frozen(claim.id) == before
    assert (await bench.held(again(claim, max_attempts=4))).attempt == 4
    assert (await bench.record(claim.id)).deaths == 3


@case
async def c15_an_attempt_that_died_beside_others_does_not_count(bench: Bench) -> None:
    claim = await _die(bench, new_claim(), times=3, alone=0)
    record = await bench.record(claim.id)
    assert (record.attempt, record.deaths, record.counts) == (3, 0, False)
    assert (await bench.held(again(claim, max_attempts=1))).attempt == 4


@case
async def c15_a_retry_beside_fresh_operations_counts_and_a_first_attempt_does_not(bench: Bench) -> None:
    claim = await _die(bench, new_claim(), times=2, alone=1)
    record = await bench.record(claim.id)
    assert (record.deaths, record.counts) == (0, True)
    assert await bench.claim(again(claim, max_attempts=1)) == Abandoned("poisoned", 2)


@case
async def c15_a_released_attempt_does_not_count_and_takes_no_death_away(bench: Bench) -> None:
    claim = again(await _die(bench, new_claim(), times=1))
    await bench.fenced(release(claim, await bench.held(claim)))
    record = await bench.record(claim.id)
    assert (record.attempt, record.deaths) == (2, 1)
    later = again(claim, alone=1, lease=SHORT)
    assert (await bench.dead(later)).attempt == 2
    record = await bench.record(claim.id)
    assert (record.deaths, record.counts) == (1, False)
    assert (await bench.held(again(claim, max_attempts=2))).attempt == 3


@case
async def c15_a_renewal_beside_others_takes_the_count_away_for_good(bench: Bench) -> None:
    claim = new_claim()
    acquired = await bench.held(claim)
    assert await bench.fenced(renew(claim, acquired)) == DONE
    assert (await bench.record(claim.id)).counts is True
    assert await bench.fenced(renew(claim, acquired, alone=False)) == DONE
    assert (await bench.record(claim.id)).counts is False
    assert await bench.fenced(renew(claim, acquired)) == DONE
    assert (await bench.record(claim.id)).counts is False


# Batches


@case
async def a_batch_of_claims_is_answered_in_order(bench: Bench) -> None:
    states = await _each_state(bench)
    fresh = new_claim()
    batch = [
        again(states["completed"]),
        fresh,
        again(states["live"]),
        again(states["over"]),
        other_input(states["tombstone"]),
        again(states["released"]),
    ]
    for claims in (batch, [again(claim) for claim in reversed(batch)]):
        kinds = [type(reply).__name__ for reply in await bench.batch(claims)]
        if claims is batch:
            assert kinds == ["Finished", "Acquired", "Running", "Acquired", "Mismatch", "Acquired"]
        else:
            assert kinds == ["Running", "Mismatch", "Running", "Running", "Running", "Finished"]


@case
async def each_item_of_a_batch_is_fenced_by_itself(bench: Bench) -> None:
    for make in (complete, release, renew, checkpoint):
        claims = [new_claim() for _ in range(6)]
        held: list[Acquired] = await bench.batch(claims)
        commands = [make(claim, acquired) for claim, acquired in zip(claims, held, strict=True)]
        stale = [
            replace(command, token=command.token - 1) if number % 2 else command
            for number, command in enumerate(commands)
        ]
        assert await bench.batch(stale) == [DONE, LOST] * 3


@case
async def a_full_batch_is_answered_in_order(bench: Bench) -> None:
    claims = [new_claim() for _ in range(bench.capabilities.max_batch)]
    held: list[Acquired] = await bench.batch(claims)
    assert [acquired.birth for acquired in held] == [claim.nonce for claim in claims]
    results = [str(number).encode() for number in range(len(claims))]
    commands = [complete(*item) for item in zip(claims, held, results, strict=True)]
    assert await bench.batch(commands) == [DONE] * len(claims)
    finished: list[Finished] = await bench.batch([again(claim) for claim in claims])
    assert [reply.result for reply in finished] == results


@case
async def records_and_evictions_are_answered_in_order(bench: Bench) -> None:
    states = await _each_state(bench)
    ids = [states["live"].id, new_claim().id, states["completed"].id, states["over"].id]
    found: Sequence[Record | None] = await bench.call("get", ids)
    assert [record and record.id for record in found] == [ids[0], None, ids[2], ids[3]]
    assert list(await bench.call("evict", ids)) == [False, True, True, True]
    assert [await bench.get(id) is None for id in ids] == [False, True, True, True]


def _has_a_limit(capabilities: Capabilities) -> bool:
    return capabilities.max_result is not None


@case_where(_has_a_limit)
async def a_result_past_the_stores_limit_fails_alone(bench: Bench) -> None:
    assert bench.capabilities.max_result is not None
    large = bytes(bench.capabilities.max_result + 1)
    claims = [new_claim() for _ in range(3)]
    held: list[Acquired] = await bench.batch(claims)
    commands = [complete(*item) for item in zip(claims, held, (b"a", large, b"c"), strict=True)]
    replies = await bench.batch(commands)
    assert (replies[0], isinstance(replies[1], Exception), replies[2]) == (DONE, True, DONE)
    assert (await bench.record(claims[1].id)).state is State.IN_PROGRESS


# What operators see


@case
async def a_live_lease_is_never_evicted_and_all_else_is(bench: Bench) -> None:
    for state, claim in (await _each_state(bench)).items():
        assert await bench.evict(claim.id) is (state != "live")
        assert (await bench.get(claim.id) is None) is (state != "live")
        if state != "live":
            fresh = await bench.held(other_input(claim))
            assert fresh.attempt == 1
    assert await bench.evict(new_claim().id) is True


async def _scan_all(bench: Bench, **options: Any) -> list[Record]:
    """All pages until an empty one; each must be in order."""
    found: list[Record] = []
    while True:
        page: Sequence[Record] = await bench.call("scan", after=found[-1].id if found else b"", **options)
        if not page:
            assert [record.id for record in found] == sorted({record.id for record in found})
            return found
        assert len(page) <= options.get("limit", 100)
        found += page


@case
async def o1_a_scan_pages_through_a_prefix_by_state_and_tenant(bench: Bench) -> None:
    prefix, tenant = secrets.token_bytes(8), secrets.token_bytes(16)
    claims = [new_claim(id=prefix + secrets.token_bytes(24), tenant=tenant if n % 2 else b"") for n in range(10)]
    held: list[Acquired] = await bench.batch(claims)
    await bench.batch([complete(*item) for item in list(zip(claims, held, strict=True))[:4]])
    for limit in (1, 3, 100):
        found = await _scan_all(bench, prefix=prefix, limit=limit)
        assert [record.id for record in found] == sorted(claim.id for claim in claims)
        assert {record.id: record.tenant for record in found} == {claim.id: claim.tenant for claim in claims}
        done = await _scan_all(bench, prefix=prefix, state=State.COMPLETED, limit=limit)
        assert [record.id for record in done] == sorted(claim.id for claim in claims[:4])
        of_tenant = await _scan_all(bench, tenant=tenant, limit=limit)
        assert [record.id for record in of_tenant] == sorted(claim.id for claim in claims[1::2])
        both = await _scan_all(bench, prefix=prefix, state=State.IN_PROGRESS, tenant=tenant, limit=limit)
        assert [record.id for record in both] == sorted(claim.id for claim in claims[5::2])
    whole = await _scan_all(bench, prefix=claims[0].id)
    assert [record.id for record in whole] == [claims[0].id]
    assert whole[0].read_at >= whole[0].first_seen


@case
async def a_prefix_may_end_in_any_byte(bench: Bench) -> None:
    start = secrets.token_bytes(4)
    for tail in (b"\0", b"\xff", b"\xff\xff", b"%", b"_", b"*", b"?", b"[", b"\\"):
        inside = new_claim(id=(start + tail + bytes(32))[:32])
        highest = new_claim(id=(start + tail + b"\xff" * 32)[:32])
        await bench.batch([inside, highest])
        found = await _scan_all(bench, prefix=start + tail)
        assert {inside.id, highest.id} <= {record.id for record in found}
        assert all(record.id.startswith(start + tail) for record in found)


@case
async def a_scan_leaves_out_what_is_past_its_retention(bench: Bench) -> None:
    prefix = secrets.token_bytes(8)
    claim = new_claim(id=prefix + secrets.token_bytes(24), retention=SHORT)
    await bench.fenced(complete(claim, await bench.held(claim)))
    await bench.wait_gone(claim.id)
    assert await _scan_all(bench, prefix=prefix) == []


# Reaping


@case
async def c19_reaping_takes_what_is_over_and_nothing_else(bench: Bench) -> None:
    kept = await _each_state(bench)
    claim = new_claim(retention=SHORT)
    await bench.fenced(complete(claim, await bench.held(claim)))
    await bench.wait_gone(claim.id)
    reaped = await bench.reap()
    assert bench.capabilities.native_ttl or reaped.settled >= 1
    assert {record.id for record in reaped.unsettled}.isdisjoint(claim.id for claim in kept.values())
    for claim in kept.values():
        assert await bench.get(claim.id) is not None


@case
async def c12_the_end_of_an_unsettled_record_is_reported(bench: Bench) -> None:
    dead = new_claim(lease=SHORT, unsettled_retention=SHORT, tenant=secrets.token_bytes(16), trace="first")
    await bench.held(dead)
    await bench.wait_past(dead.id, lambda record: max(record.lease_until, record.expires_at))
    ended = {record.id: record for record in (await bench.reap()).unsettled}
    assert dead.id in ended
    record = ended[dead.id]
    assert (record.state, record.fingerprint, record.nonce) == (State.IN_PROGRESS, dead.fingerprint, dead.nonce)
    assert (record.tenant, record.trace) == (dead.tenant, "first")
    assert await bench.get(dead.id) is None


@case
async def c12_the_end_of_what_was_released_with_something_kept_is_reported(bench: Bench) -> None:
    claim = new_claim(unsettled_retention=SHORT)
    acquired = await bench.held(claim)
    await bench.fenced(checkpoint(claim, acquired))
    await bench.fenced(release(claim, acquired))
    await bench.wait_past(claim.id, lambda record: record.expires_at)
    ended = {record.id: record for record in (await bench.reap()).unsettled}
    assert claim.id in ended
    assert (ended[claim.id].state, dict(ended[claim.id].checkpoints)) == (State.RELEASED, {"step": b"value"})
    assert await bench.get(claim.id) is None


@case
async def c12_the_end_of_what_ended_unknown_and_then_failed_is_reported(bench: Bench) -> None:
    dead, _ = await _failed_after_a_death(bench, retention=SHORT, unsettled_retention=SHORT)
    await bench.wait_past(dead.id, lambda record: record.expires_at)
    ended = {record.id: record for record in (await bench.reap()).unsettled}
    assert dead.id in ended
    assert (ended[dead.id].state, ended[dead.id].attempt) == (State.RELEASED, 2)
    assert await bench.get(dead.id) is None


async def _over(bench: Bench, **changes: Any) -> tuple[Claim, Record]:
    """An operation whose attempt died and whose unsettled retention is over, as a pass of reaping returns it."""
    dead = new_claim(lease=SHORT, unsettled_retention=SHORT, **changes)
    await bench.held(dead)
    await bench.wait_past(dead.id, lambda record: max(record.lease_until, record.expires_at))
    found: dict[bytes, Record] = {}
    while dead.id not in found:
        reaped: Reaped = await bench.call("reap", 100_000)
        found = {record.id: record for record in reaped.unsettled}
    return dead, found[dead.id]


@case
async def i7_an_unsettled_record_stays_until_its_end_was_told(bench: Bench) -> None:
    dead, over = await _over(bench)
    for _ in range(3):  # a reaper dies before it has reported, any number of times
        await bench.call("reap", 100_000)
    assert await bench.claim(again(dead, on_abandoned="refuse")) == Abandoned("refused", 1)
    assert list((await bench.end([over])).ended) == [dead.id]
    assert list((await bench.end([over])).ended) == []
    assert await bench.get(dead.id) is None


@case
async def i7_what_went_on_after_its_end_was_told_is_not_removed(bench: Bench) -> None:
    for settle in (None, complete, release):
        dead, over = await _over(bench)
        later = again(dead)
        acquired = await bench.held(later)
        if settle is not None:
            assert await bench.one(settle(later, acquired)) == DONE
        assert list((await bench.end([over])).ended) == []
        assert (await bench.record(dead.id)).token == acquired.token


@case
async def i7_what_died_again_after_its_end_was_told_is_told_again(bench: Bench) -> None:
    dead, over = await _over(bench)
    later = again(dead, lease=SHORT, unsettled_retention=SHORT)
    await bench.held(later)
    await bench.wait_past(dead.id, lambda record: max(record.lease_until, record.expires_at))
    assert list((await bench.end([over])).ended) == []
    ended = {record.id: record.attempt for record in (await bench.reap()).unsettled}
    assert ended[dead.id] == 2
    assert await bench.get(dead.id) is None


@case
async def reaping_leaves_a_live_lease_alone(bench: Bench) -> None:
    claim = new_claim(unsettled_retention=SHORT)
    acquired = await bench.held(claim)
    await bench.wait_past(claim.id, lambda record: record.expires_at)
    await bench.reap()
    assert await bench.fenced(complete(claim, acquired)) == DONE


@case
async def c19_a_pass_of_reaping_is_bounded(bench: Bench) -> None:
    claims = [new_claim(lease=SHORT, unsettled_retention=SHORT) for _ in range(5)]
    await bench.batch(claims)
    for claim in claims:
        await bench.wait_past(claim.id, lambda record: max(record.lease_until, record.expires_at))
    reaped = await bench.call("reap", 2)
    assert reaped.settled + len(reaped.unsettled) <= 2
    assert reaped.more


# Races


def _claims(claim: Claim) -> BenchCall[ClaimReply]:
    return lambda bench: bench.claim(claim)


@case
async def c1_of_a_crowd_at_a_new_operation_one_is_acquired(bench: Bench) -> None:
    claim = new_claim()
    replies = await bench.together([_claims(again(claim)) for _ in range(CROWD)])
    kinds = [type(reply) for reply in replies]
    assert (kinds.count(Acquired), kinds.count(Running)) == (1, CROWD - 1)


@case
async def c1_of_a_crowd_at_a_dead_attempt_one_is_acquired(bench: Bench) -> None:
    dead = new_claim(lease=SHORT)
    await bench.dead(dead)
    replies = await bench.together([_claims(again(dead)) for _ in range(CROWD)])
    acquired = [reply for reply in replies if isinstance(reply, Acquired)]
    assert [reply.attempt for reply in acquired] == [2]
    assert sum(isinstance(reply, Running) for reply in replies) == CROWD - 1


@case
async def c1_of_a_crowd_at_a_released_operation_one_is_acquired(bench: Bench) -> None:
    claim = new_claim()
    await bench.fenced(release(claim, await bench.held(claim)))
    replies = await bench.together([_claims(again(claim)) for _ in range(CROWD)])
    assert sum(isinstance(reply, Acquired) for reply in replies) == 1


@case
async def c1_one_input_wins_of_a_crowd_with_two(bench: Bench) -> None:
    claim = new_claim()
    other = other_input(claim)
    replies = await bench.together([_claims(again(other if n % 2 else claim)) for n in range(CROWD)])
    kinds = [type(reply) for reply in replies]
    # A rival that finds a lock gets Running, whatever its input (T2).
    assert kinds.count(Acquired) == 1
    assert set(kinds) <= {Acquired, Running, Mismatch}
    winner = (await bench.record(claim.id)).fingerprint
    assert all(reply.fingerprint == winner for reply in replies if isinstance(reply, Mismatch))


@case
async def c3_a_crowd_of_one_nonce_gets_one_token(bench: Bench) -> None:
    claim = new_claim()
    replies = await bench.together([_claims(claim) for _ in range(20)])
    tokens = {reply.token for reply in replies if isinstance(reply, Acquired)}
    assert len(tokens) == 1
    assert all(isinstance(reply, Acquired | Running) for reply in replies)


@case
async def a_crowd_at_operations_of_its_own_is_acquired(bench: Bench) -> None:
    size = min(10, bench.capabilities.max_batch)
    batches = [[new_claim() for _ in range(size)] for _ in range(CROWD)]
    answers = await bench.together([_batch(claims) for claims in batches])
    assert all(isinstance(reply, Acquired) for replies in answers for reply in replies)
    settling = [
        [complete(claim, acquired) for claim, acquired in zip(claims, replies, strict=True)]
        for claims, replies in zip(batches, answers, strict=True)
    ]
    done = await bench.together([_batch(commands) for commands in settling])
    assert all(reply == DONE for replies in done for reply in replies)


def _batch(commands: Sequence[StoreCommand]) -> BenchCall[list[Any]]:
    return lambda bench: bench.batch(commands)


@case
async def batches_in_opposite_order_do_not_block_each_other(bench: Bench) -> None:
    size = min(50, bench.capabilities.max_batch)
    for _ in range(5):
        claims = [new_claim() for _ in range(size)]
        rivals = [again(claim) for claim in claims]
        one, other = await bench.together([_batch(claims), _batch(rivals[::-1])])
        holders: list[tuple[Claim, Acquired]] = []
        for first, mine, second, theirs in zip(claims, one, rivals, other[::-1], strict=True):
            held = [pair for pair in ((first, mine), (second, theirs)) if isinstance(pair[1], Acquired)]
            assert len(held) == 1, (mine, theirs)
            holders += held
        await _renew_and_complete_in_opposite_order(bench, holders)


async def _renew_and_complete_in_opposite_order(bench: Bench, holders: Sequence[tuple[Claim, Acquired]]) -> None:
    renewals = [renew(*held) for held in holders]
    steps = [checkpoint(*held) for held in reversed(holders)]
    for replies in await bench.together([_batch(renewals), _batch(renewals[::-1]), _batch(steps)]):
        assert replies == [DONE] * len(holders)
    settling = [complete(*held) for held in holders]
    for replies in await bench.together([_batch(settling), _batch(settling[::-1])]):
        assert replies == [DONE] * len(holders)


@case
async def of_a_late_complete_and_a_take_over_one_wins(bench: Bench) -> None:
    for _ in range(10):
        dead = new_claim(lease=SHORT)
        first = await bench.dead(dead)
        later = again(dead)
        late: Complete = complete(dead, first, b"late")
        settled, claimed = await bench.together([_one(late), _one(later)])
        if isinstance(claimed, Running):  # it found the lock of the other
            claimed = await bench.claim(later)
        match settled, claimed:
            case Done(), Finished(result):
                assert result == b"late"
            case _, Acquired():
                assert settled == LOST
                assert await bench.fenced(complete(later, claimed, b"winner")) == DONE
                assert (await bench.record(dead.id)).result == b"winner"
            case _:
                raise AssertionError(f"{settled} and {claimed} cannot both be")


def _one(command: StoreCommand) -> BenchCall[Any]:
    return lambda bench: bench.one(command)


@case
async def of_a_crowd_that_reaps_each_record_ends_once(bench: Bench) -> None:
    claims = [new_claim(lease=SHORT, unsettled_retention=SHORT) for _ in range(10)]
    await bench.batch(claims)
    for claim in claims:
        await bench.wait_past(claim.id, lambda record: max(record.lease_until, record.expires_at))
    passes = await bench.together([lambda rival: rival.reap() for _ in range(4)])
    ended = [id for reaped in passes for id in reaped.ended]
    told = {record.id for reaped in passes for record in reaped.unsettled}
    assert {claim.id for claim in claims} <= told
    ours = [id for id in ended if id in {claim.id for claim in claims}]
    assert sorted(ours) == sorted(claim.id for claim in claims)


OnAbandoned = Literal["rerun", "refuse"]


@case
async def a_worker_may_start_from_every_recorded_state(bench: Bench) -> None:
    expected: dict[tuple[str, OnAbandoned], type[ClaimReply]] = {
        ("live", "rerun"): Running,
        ("live", "refuse"): Running,
        ("over", "rerun"): Acquired,
        ("over", "refuse"): Abandoned,
        ("released", "rerun"): Acquired,
        ("released", "refuse"): Acquired,
        ("completed", "rerun"): Finished,
        ("completed", "refuse"): Finished,
        ("tombstone", "rerun"): Finished,
        ("tombstone", "refuse"): Finished,
    }
    policies: tuple[OnAbandoned, ...] = ("rerun", "refuse")
    for policy in policies:
        for state, claim in (await _each_state(bench)).items():
            later = again(claim, on_abandoned=policy)
            reply = await bench.claim(later)
            assert type(reply) is expected[state, policy], (state, policy, reply)
            if isinstance(reply, Acquired):
                assert await bench.fenced(complete(later, reply, b"end")) == DONE
                assert (await bench.record(claim.id)).result == b"end"
