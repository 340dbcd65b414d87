"""Crash points: places where a process kills itself with SIGKILL, if the environment says so.

    crash = CrashPoints.from_environment()                # RETRYPROOF_CRASH="after claim"
    app = IdempotencyMiddleware(app, store=crash.wrap(open_store(url)), scope=single_tenant)

    def handler() -> None:
        crash.reach("before effect")
        …

A wrapped store has the points `before claim`, `after claim`, `before complete`, `after complete`, and the same for its
other calls. `reach` is for points of your own. `"after claim:3"` means the third time. The rest of the library does not
know crash points: an unwrapped store has no cost, and a wrapper that is not armed only counts.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, overload

from retryproof.core.errors import ConfigurationError
from retryproof.stores.base import AsyncStore, HasCommitGroup, HasKeeper, Store

__all__ = ["CrashPoints"]

VARIABLE = "RETRYPROOF_CRASH"
CALLS = ("claim", "complete", "release", "renew", "checkpoint")
"""The calls of a store with a point before and after them."""

T = TypeVar("T")


def kill_this_process() -> NoReturn:
    """`kill -9`: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


class CrashPoints:
    """The crash points of one process. At most one is armed: the process dies there.

    armed: "", or a point's name, or "name:n" for the nth time that it is reached. die: what to do there.
    Safe to use from any thread.
    """

    def __init__(self, armed: str = "", *, die: Callable[[], object] = kill_this_process) -> None:
        name, separator, count = armed.rpartition(":")
        if separator and not (count.isdigit() and int(count) > 0):
            raise ConfigurationError(f"{VARIABLE}={armed!r}: what follows the colon is a number from 1.")
        self._name = name if separator else armed
        self._count = int(count) if separator else 1
        self._die = die
        self._reached: Counter[str] = Counter()
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> CrashPoints:
        """Arm the point that RETRYPROOF_CRASH names, if it is set."""
        return cls((os.environ if environment is None else environment).get(VARIABLE, ""))

    @property
    def reached(self) -> dict[str, int]:
        """How often the process has reached each point."""
        with self._lock:
            return dict(self._reached)

    def reach(self, name: str) -> None:
        """Pass this point, or die there."""
        with self._lock:
            self._reached[name] += 1
            dies = name == self._name and self._reached[name] == self._count
        if dies:
            self._die()

    @overload
    def wrap(self, store: Store) -> Store: ...

    @overload
    def wrap(self, store: AsyncStore) -> AsyncStore: ...

    def wrap(self, store: Store | AsyncStore) -> Store | AsyncStore:
        """Return the same store with a point before and after each call."""
        wrapper: Store | AsyncStore
        if asyncio.iscoroutinefunction(getattr(type(store), "claim", None)):
            wrapper = _AsyncWrapped(store, self.reach)
        else:
            wrapper = _Wrapped(store, self.reach)
        return wrapper


class _Wrapped:
    """A blocking store whose calls reach points."""

    def __init__(self, store: Any, reach: Callable[[str], None]) -> None:
        self._store = store
        self._reach = reach
        self.capabilities = store.capabilities
        self.get, self.scan, self.evict, self.reap, self.close = (
            store.get,
            store.scan,
            store.evict,
            store.reap,
            store.close,
        )

    def _call(self, name: str, commands: Sequence[Any]) -> Any:
        self._reach(f"before {name}")
        answers = getattr(self._store, name)(commands)
        self._reach(f"after {name}")
        return answers

    def claim(self, claims: Sequence[Any]) -> Any:
        return self._call("claim", claims)

    def complete(self, commands: Sequence[Any]) -> Any:
        return self._call("complete", commands)

    def release(self, commands: Sequence[Any]) -> Any:
        return self._call("release", commands)

    def renew(self, commands: Sequence[Any]) -> Any:
        return self._call("renew", commands)

    def checkpoint(self, commands: Sequence[Any]) -> Any:
        return self._call("checkpoint", commands)

    def commit_group(self, calls: Callable[[], T]) -> T:
        """The store's own, if it has one: a point inside it is before the commit."""
        return self._store.commit_group(calls) if isinstance(self._store, HasCommitGroup) else calls()


class _AsyncWrapped:
    """An async store whose calls reach points; also those of its keeper."""

    def __init__(self, store: Any, reach: Callable[[str], None]) -> None:
        self._store = store
        self._reach = reach
        self.capabilities = store.capabilities
        self.get, self.scan, self.evict, self.reap, self.aclose = (
            store.get,
            store.scan,
            store.evict,
            store.reap,
            store.aclose,
        )

    async def _call(self, name: str, commands: Sequence[Any]) -> Any:
        self._reach(f"before {name}")
        answers = await getattr(self._store, name)(commands)
        self._reach(f"after {name}")
        return answers

    async def claim(self, claims: Sequence[Any]) -> Any:
        return await self._call("claim", claims)

    async def complete(self, commands: Sequence[Any]) -> Any:
        return await self._call("complete", commands)

    async def release(self, commands: Sequence[Any]) -> Any:
        return await self._call("release", commands)

    async def renew(self, commands: Sequence[Any]) -> Any:
        return await self._call("renew", commands)

    async def checkpoint(self, commands: Sequence[Any]) -> Any:
        return await self._call("checkpoint", commands)

    def keeper(self) -> Any:
        if not isinstance(self._store, HasKeeper):
            raise ConfigurationError(f"{type(self._store).__name__} has no keeper.")
        return _Wrapped(self._store.keeper(), self._reach)
