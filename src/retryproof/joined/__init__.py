"""Work that commits with its operation's record: callers' transactions that an attempt has joined (T1, T3).

An attempt has one transaction for all its work (`transaction`), or one for each phase (`phases`), and never two at the
same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from retryproof.core.commands import Raised, WorkOutcome
from retryproof.core.errors import ConfigurationError
from retryproof.drive import Asking, apump, pump
from retryproof.joined.transaction import Settled, Steps, Transaction
from retryproof.recovery import Recovery, lease_lost

_ANOTHER = "This operation has a transaction already; all that it does commits in one."


class Joined:
    """What one attempt has joined.

    asking: how the attempt's code sends commands to the store. transaction: the one that all its work commits in.
    phase: the open phase, in words. part: the transaction of that phase.
    """

    __slots__ = ("_joining", "_store", "asking", "part", "phase", "recovery", "transaction")

    def __init__(self, recovery: Recovery, store: Any, asking: Asking) -> None:
        self.recovery = recovery
        self.asking = asking
        self.transaction: Transaction | None = None
        self.phase: str | None = None
        self.part: Transaction | None = None
        self._store = store
        self._joining = False

    @property
    def holds(self) -> bool:
        """Whether a transaction holds the record, so that no step can be stored."""
        open_one = self.part or self.transaction
        return open_one is not None and open_one.held

    def new(self, given: Any, *, on_loop: bool) -> Transaction:
        """A transaction that is still to be entered, of that colour."""
        ask: Callable[[Any], Any] = self.asking.aask if on_loop else self.asking.ask
        return Transaction(self.recovery, self._store, given, ask, on_loop=on_loop)

    def join(self, given: Any) -> Any:
        """Make the transaction of this connection, or of one that a block gives, the attempt's; the connection."""
        transaction = self.new(given, on_loop=False)
        return pump(self._join(transaction), transaction.perform)

    async def ajoin(self, given: Any) -> Any:
        """`join` for a connection that is awaited."""
        self.asking.check_awaited()
        transaction = self.new(given, on_loop=True)
        return await apump(self._join(transaction), transaction.perform)

    def _join(self, transaction: Transaction) -> Steps[Any]:
        given, recovery = transaction.given, self.recovery
        self._refuse_beside_phase()
        if recovery.refuses:
            raise ConfigurationError(recovery.refuses, digest=recovery.digest)
        if recovery.hold.lost:
            raise lease_lost(recovery.hold)
        joined = self.transaction
        if joined is not None:
            if joined.given is given or joined.connection is given:
                return joined.connection
            raise ConfigurationError(_ANOTHER, digest=recovery.digest)
        with self._alone():
            yield from transaction.enter()
            self.transaction = transaction  # before the look: an end that comes later finds it
            if recovery.refuses:  # since the operation has ended meanwhile
                if self._take() is not None:  # else its end took it
                    yield from transaction.settle(Raised())
                raise ConfigurationError(recovery.refuses, digest=recovery.digest)
        return transaction.connection

    def _take(self) -> Transaction | None:
        """Take the transaction out: the one who gets it settles it."""
        with _mutex:
            transaction, self.transaction = self.transaction, None
        return transaction

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Prevent another join or phase meanwhile: one of the two would be neither committed nor rolled back."""
        with _mutex:
            self._refuse_beside_phase()
            if self._joining or self.transaction is not None:
                raise ConfigurationError(_ANOTHER, digest=self.recovery.digest)
            self._joining = True
        try:
            yield
        finally:
            self._joining = False

    def _refuse_beside_phase(self) -> None:
        if self.phase is not None:
            raise ConfigurationError(
                f"{self.phase} has a transaction of its own; leave it first.", digest=self.recovery.digest
            )

    def refuse_phase(self, name: str) -> None:
        """Raise ConfigurationError if a phase cannot begin, since the attempt has a transaction or joins one."""
        if self.phase is not None or self.transaction is not None or self._joining:
            raise ConfigurationError(
                f"The phase {name!r} is inside of {self.phase or 'the transaction of the operation'}; each phase is a "
                "transaction of its own.",
                digest=self.recovery.digest,
            )

    def begin_phase(self, name: str) -> None:
        """Begin this phase of the attempt; raises as `refuse_phase` does."""
        with _mutex:
            self.refuse_phase(name)
            self.phase = f"the phase {name!r}"

    def settle(self, outcome: WorkOutcome) -> Settled:
        """Commit the transaction with this outcome, or roll it back; what came of the work, which has none then."""
        transaction = self._take()
        if transaction is None:
            return outcome, None
        return pump(transaction.settle(outcome), transaction.perform)

    async def asettle(self, outcome: WorkOutcome) -> Settled:
        """`settle` on the event loop, for every kind of connection.

        A cancellation does not separate the result from its commit: it is returned as the error, after the end. A
        second cancellation does not wait.
        """
        transaction = self._take()
        if transaction is None:
            return outcome, None
        task = asyncio.get_running_loop().create_task(transaction.asettle(outcome, self.asking.aask))
        _settling.add(task)
        task.add_done_callback(_settling.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError as cancellation:
            await asyncio.wait({task})
            return task.result()[0], cancellation


_mutex = threading.Lock()
_settling: set[asyncio.Task[Settled]] = set()
"""References to tasks, so that the loop does not lose them."""
