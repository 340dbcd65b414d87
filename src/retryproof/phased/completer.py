"""The completer resumes phased operations that were abandoned, without their clients (T3).

    completer = Completer(phased)
    await completer.run()           # until `completer.stop()`; or `await completer.run_once()`

A completer reads only the worklist, never the operations. An operation is in the worklist from its first recovery point
to its completion, and is due when its lease should be over. Any number of completers may run: they take rows with SKIP
LOCKED, and the claim prevents that an operation runs twice, as for any other attempt.

An operation that raises is tried again, with growing pauses up to an hour. After `give_up_after` it is left to an
operator, and stays in the list with its reason until its record is settled, evicted or reaped. An operation that runs
longer than `Policy.max_run` is cancelled, so that a call that hangs does not delay the others for longer. If a
completer died while it ran an operation, that operation later runs alone: if it kills its process again, only its own
death counts (C15).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from retryproof.core.errors import (
    ConfigurationError,
    IdempotencyError,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    ResultOmitted,
    StoreUnavailable,
)
from retryproof.core.keys import short_digest
from retryproof.core.record import MICROSECONDS
from retryproof.engine import Outcome
from retryproof.phased.functions import BlockingPhased, BlockingPhasedFunction, Phased, PhasedFunction, RecordGone
from retryproof.sql.dialects import dialect_of
from retryproof.sql.plan import Plan
from retryproof.sql.postgres.statements import TABLE
from retryproof.sql.worklist import Taken, WorklistEntry, WorklistPlans

T = TypeVar("T")
Function = PhasedFunction[Any, Any] | BlockingPhasedFunction[Any, Any]
logger = logging.getLogger("retryproof")

FIRST_DELAY = 2.0
"""Seconds before an operation that raised is tried again; doubled each time."""
LAST_DELAY = 3600.0
NEVER = 10 * 365 * 86400.0
"""The delay, in seconds, of an operation that was given up; longer than any record lives."""
SETTLED_BY_HAND = 60.0
"""Seconds between checks of operations that only an operator, or a completer of a later release, can handle."""
UNWANTED = 60.0
"""After this many seconds past its due time, a completer takes an operation whose function it does not know, to say so
in the list. By then, every completer that knows the function has had its turn. Applications may share a database."""


@dataclass(frozen=True, slots=True)
class Round:
    """The result of one round over the worklist.

    taken: rows that were due. completed: operations that have their result now.
    failed: operations that raised, or whose function is not known here. running: operations that another attempt runs.
    dropped: rows whose record is settled or gone.
    """

    taken: int = 0
    completed: int = 0
    failed: int = 0
    running: int = 0
    dropped: int = 0


class TooLong(Exception):
    """A function ran past its policy's max_run, and was cancelled."""


class Completer:
    """Finishes the operations of one Phased, on the event loop, or of one BlockingPhased, in threads.

    batch: how many operations run at a time. poll: seconds between rounds if nothing was due.
    give_up_after: seconds after an operation was listed; then its failures are left to an operator.
    """

    def __init__(
        self, phased: Phased | BlockingPhased, *, batch: int = 16, poll: float = 1.0, give_up_after: float = 7 * 86400.0
    ) -> None:
        if batch < 1 or poll <= 0 or give_up_after <= 0:
            raise ConfigurationError("batch must be 1 or more, poll and give_up_after positive.")
        self._phased = phased
        self._batch = batch
        self._poll = poll
        self._give_up_after = give_up_after
        self._stopping: asyncio.Event | None = None
        self._unknown: set[str] = set()
        self._threads = ThreadPoolExecutor(batch, "retryproof-completer")  # starts none before one is needed

    async def run(self, on_round: Callable[[Round], None] = lambda found: None) -> None:
        """Run the due operations, round after round, until `stop`; then finish the running ones.

        A database that is out of reach is tried again. on_round: called with the result of each round.
        """
        self._stopping = asyncio.Event()
        while not self._stopping.is_set():
            taken = 0
            try:
                found = await self.run_once()
            except StoreUnavailable as error:
                logger.warning("The completer's worklist cannot be read, and is tried again: %s", error)
            else:
                taken = found.taken
                on_round(found)
            if taken < self._batch:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._poll * random.uniform(0.75, 1.25))

    def stop(self) -> None:
        """End `run` when the running operations have ended. Call it in the event loop's thread."""
        if self._stopping is not None:
            self._stopping.set()

    async def run_once(self) -> Round:
        """One round: take the due operations and run them side by side, suspects alone. Raises StoreUnavailable."""
        worklist, lease = self._worklist(), self._phased.engine.policy.lease
        functions = sorted(self._phased.functions)
        taken = await self._perform(lambda: worklist.take(self._batch, lease, functions, UNWANTED))
        together = [each for each in taken if not each.suspect]
        ends = await _all(self._end(worklist, each, beside=len(together) > 1) for each in together)
        ends += [await self._end(worklist, each, beside=False) for each in taken if each.suspect]
        return Round(len(taken), *(ends.count(end) for end in ("completed", "failed", "running", "dropped")))

    async def _end(self, worklist: WorklistPlans, taken: Taken, *, beside: bool) -> str:
        entry = taken.entry
        try:
            end, seconds, reason = await self._run(taken, beside)
            if end == "dropped":
                await self._perform(lambda: worklist.drop(entry))
            elif end != "completed":
                if end == "failed":
                    seconds = self._before_giving_up(entry, seconds, reason)
                await self._perform(lambda: worklist.postpone(entry, seconds, reason))
        except StoreUnavailable as error:
            logger.warning("An operation could not be completed now: %s", error)
            return "failed"  # and due again after its lease
        return end

    async def _run(self, taken: Taken, beside: bool) -> tuple[str, float, str]:
        """How it ended, in how many seconds to look again if so, and why."""
        entry, digest = taken.entry, short_digest(taken.entry.id)
        if not taken.open:
            return "dropped", 0.0, ""
        function = self._phased.functions.get(entry.function)
        if function is None:
            self._say_unknown(entry.function)
            return "failed", SETTLED_BY_HAND, f"no function {entry.function!r} is registered"
        try:
            outcome = await self._complete(function, entry, beside)
        except (RecordGone, ResultOmitted) as error:
            if error.digest != digest:  # of another operation, inside of the function
                return self._raised(entry, error)
            return "dropped", 0.0, ""
        except InProgress as error:
            return "running", max(error.retry_after or 0.0, 0.1), entry.reason or ""
        except LeaseLost as error:
            return "running", self._phased.engine.policy.lease, str(error.message)
        except OutcomeUnknown as error:
            logger.error("An operation is left to an operator: %s", error)
            return "failed", SETTLED_BY_HAND, error.message
        except StoreUnavailable:
            raise
        except IdempotencyError as error:
            logger.error("An operation cannot be completed: %s", error)
            return "failed", SETTLED_BY_HAND, error.message
        except (Exception, asyncio.CancelledError) as error:  # whatever the function raises
            if _is_cancelled():
                raise
            return self._raised(entry, error)
        return ("dropped" if outcome.replayed else "completed"), 0.0, ""

    def _raised(self, entry: WorklistEntry, error: BaseException) -> tuple[str, float, str]:
        digest = short_digest(entry.id)
        logger.warning("The phased function %r raised, and is run again [%s]", entry.function, digest, exc_info=error)
        return "failed", _delay(entry.tries), f"{type(error).__module__}.{type(error).__qualname__}"

    async def _complete(self, function: Function, entry: WorklistEntry, beside: bool) -> Outcome[Any]:
        limit = function.policy.max_run
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                if isinstance(function, PhasedFunction):
                    return await function.complete(entry, beside=beside)
                # After the limit nobody renews its lease, and the next attempt fences it off.
                work = partial(function.complete, entry, beside=beside)
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise TooLong(f"It ran for more than {limit:g} s.") from error

    def _say_unknown(self, name: str) -> None:
        if name not in self._unknown:
            self._unknown.add(name)
            known = ", ".join(sorted(self._phased.functions)) or "none"
            logger.error("No phased function %r is registered here (known: %s).", name, known)

    def _before_giving_up(self, entry: WorklistEntry, seconds: float, reason: str) -> float:
        # due_at was the database's time of this look, and a lease.
        age = (entry.due_at - entry.listed_at) / MICROSECONDS - self._phased.engine.policy.lease
        if age < self._give_up_after:
            return seconds
        logger.error("An operation is given up after %.0f s: %s [%s]", age, reason, short_digest(entry.id))
        return NEVER

    async def revive(self) -> int:
        """Try the given-up operations again, after their cause was repaired; return how many."""
        worklist = self._worklist()
        return await self._perform(lambda: worklist.revive(NEVER / 2))

    async def entries(self, limit: int = 100) -> list[WorklistEntry]:
        """The worklist, with the longest due first."""
        worklist = self._worklist()
        return await self._perform(lambda: worklist.entries(limit))

    def _worklist(self) -> WorklistPlans:
        store = self._store()
        dialect = dialect_of(store.capabilities.name, subject="Phases are for", found="this store")
        return dialect.worklist(getattr(store, "table", TABLE))

    def _store(self) -> Any:
        opened: Any = self._phased.engine.opened()
        return getattr(opened, "opened", opened).store

    async def _perform(self, plan: Callable[[], Plan[T]]) -> T:
        store = self._store()
        if asyncio.iscoroutinefunction(store.perform):
            result: T = await store.perform(plan)
            return result
        return await asyncio.get_running_loop().run_in_executor(None, store.perform, plan)


async def _all(ends: Iterable[Awaitable[str]]) -> list[str]:
    """The result of each. If one raises, the exception is raised after all have ended."""
    found = await asyncio.gather(*ends, return_exceptions=True)
    for end in found:
        if isinstance(end, BaseException):
            raise end
    return [end for end in found if isinstance(end, str)]


def _is_cancelled() -> bool:
    """Whether this task itself was cancelled, and not only what it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _delay(tries: int) -> float:
    longest = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(max(tries - 1, 0), 20))
    return longest * random.uniform(0.5, 1.0)
