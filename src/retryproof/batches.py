"""Many attempts at once, for consumers: one round trip to claim a batch, and one to settle it.

Each item has its own answer, as if it were alone: an attempt that may run, or a conclusion. If an operation is twice in
a batch, it runs once. Its twin gets Busy if the first one runs, or the same conclusion if the first one is done. A
batch does not wait for duplicates that run elsewhere, whatever `Policy.wait` says, since its other items hold leases
meanwhile. The items run at the same time, so the death of the process counts against none of them (C15). To find an
item that kills its process, run items that were taken over (`hold.attempt` above 1) alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from retryproof.attempt import (
    Attempts,
    BlockingAttempt,
    BlockingStore,
    LoopAttempt,
    LoopStore,
    Refingerprint,
    unknown_algorithm,
)
from retryproof.core.commands import Claim, Complete, Release, Reply, WorkOutcome
from retryproof.core.flow import Conclusion, to_settle
from retryproof.core.policy import Policy
from retryproof.core.value import value
from retryproof.drive import clock, may_stand
from retryproof.operation import ENDED

T = TypeVar("T")


@value
class Item:
    """One operation of a batch: what `Attempts.begin` is given for it."""

    id: bytes
    fingerprint: bytes
    where: str = ""
    tenant: bytes = b""
    trace: str = ""
    refingerprint: Refingerprint = unknown_algorithm


class BatchStore(BlockingStore, Protocol):
    """An opened store that takes many commands of a thread at once."""

    def perform_many(self, commands: Sequence[Any], timeout: float) -> Sequence[Reply]:
        """Each command's reply, in order; Unreachable where there was none in time."""


def begin_many(
    attempts: Attempts, opened: BatchStore, policy: Policy, items: Sequence[Item]
) -> list[BlockingAttempt | Conclusion]:
    """`Attempts.begin` for each item, in order; all claims share a batch.

    If it is interrupted, it releases its claims.
    """
    policy, background = _without_waiting(policy), opened.background
    began = clock()
    claims: list[Claim] = []
    begun: list[BlockingAttempt | Conclusion] = []
    replies: Sequence[Reply] = ()
    try:
        for one in items:
            claims.append(
                attempts.claim(background, policy, one.id, one.fingerprint, one.tenant, one.trace, len(items) > 1)
            )
        replies = opened.perform_many(claims, policy.store_timeout)
        for one, claim, reply in zip(items, claims, replies, strict=True):
            begun.append(attempts.begun(opened, policy, claim, began, reply, one.where, one.refingerprint))
    except BaseException:
        for claim in claims[len(begun) :]:
            background.leave(claim.nonce)
        for claim, reply in list(zip(claims, replies, strict=False))[len(begun) :]:
            if may_stand(reply):
                background.disown(claim, reply)
        _give_back(begun)
        raise
    return begun


def finish_many(pairs: Sequence[tuple[BlockingAttempt, WorkOutcome]], opened: BatchStore) -> list[Conclusion]:
    """`BlockingAttempt.finish` for each attempt and what came of it, in order; what is stored travels together.

    Interrupted, it leaves to the keeper what is not settled. Each attempt is to be left afterwards, as after `finish`.
    """
    conclusions = list[Conclusion]()
    try:
        steps = [to_settle(attempt.hold, outcome, attempt.policy) for attempt, outcome in pairs]
        commands = [step for step in steps if isinstance(step, Complete | Release)]
        sent = clock()
        timeout = max((attempt.policy.store_timeout for attempt, _ in pairs), default=0.0)
        replies = iter(opened.perform_many(commands, timeout) if commands else ())
        for (attempt, outcome), step in zip(pairs, steps, strict=True):
            reply = next(replies) if isinstance(step, Complete | Release) else None
            attempt.hold.refuses = ENDED
            conclusions.append(attempt.finished(outcome, step, sent, reply))
    except BaseException:
        for attempt, outcome in pairs[len(conclusions) :]:
            attempt.interrupt(outcome)
        raise
    return conclusions


async def abegin_many(
    attempts: Attempts, opened: LoopStore, policy: Policy, items: Sequence[Item]
) -> list[LoopAttempt | Conclusion]:
    """`begin_many`, awaited; a cancellation is an interruption."""
    policy = _without_waiting(policy)

    async def begin(one: Item) -> LoopAttempt | Conclusion:
        return await attempts.abegin(
            opened,
            policy,
            one.id,
            one.fingerprint,
            one.where,
            one.tenant,
            one.trace,
            one.refingerprint,
            beside=len(items) > 1,
        )

    tasks = [asyncio.ensure_future(begin(one)) for one in items]
    try:
        return await _all(tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # for each to see to its claim, which takes no answer of the store
        _give_back(task.result() for task in tasks if not task.cancelled() and task.exception() is None)
        raise


async def afinish_many(pairs: Sequence[tuple[LoopAttempt, WorkOutcome]]) -> list[Conclusion]:
    """`finish_many`, awaited.

    A cancellation loses nothing: where it interrupts an attempt, its `rest` goes on.
    """
    return await _all([asyncio.ensure_future(attempt.finish(outcome)) for attempt, outcome in pairs])


async def _all(tasks: Sequence[asyncio.Future[T]]) -> list[T]:
    """What all have come to, in order; cancelled, it cancels them and waits until each has seen to its own."""
    try:
        if tasks:
            await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise
    return [task.result() for task in tasks]


def _without_waiting(policy: Policy) -> Policy:
    return replace(policy, wait=0.0) if policy.wait else policy


def _give_back(begun: Iterable[BlockingAttempt | LoopAttempt | Conclusion]) -> None:
    """Release what was claimed and not begun, in the background."""
    for one in begun:
        if isinstance(one, BlockingAttempt | LoopAttempt):
            one.give_back()
