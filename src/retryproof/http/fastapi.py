"""FastAPI: a dependency that gives a session, or connection, which commits with the response (T1).

Charging = Annotated[AsyncSession, Depends(transaction(async_sessionmaker(engine)))]

@app.post("/charges")
async def charge(session: Charging) -> Receipt: ...

What raises is rolled back, an HTTPException too, though its response may be kept: from outside of the app it is a
response like any other, but a dependency sees it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

from retryproof.core.errors import NoOperation
from retryproof.operation import Operation, current_operation

S = TypeVar("S")

WAITING = 16
"""Threads of a dependency that open sessions, or wait for a connection; what waits behind them does so without one."""
_NO_OPERATION = (
    "This route works in the operation's transaction, and its request has no operation. Give the middleware "
    "required=True for it, so that a request without a key is refused before it gets here."
)


def transaction(make: Callable[[], AbstractAsyncContextManager[S]]) -> Callable[[], AsyncIterator[S]]:
    """A dependency: what `make` opens, in a transaction that is committed with the response before it is sent.

    make: `async_sessionmaker(engine)`, `engine.connect`, `pool.acquire`, `pool.connection`; called once a request,
        and what it opens is closed after the commit or the roll-back.
    The handler leaves commit and roll-back alone; what it raises is rolled back. Raises NoOperation for a request that
    has none.
    """

    @asynccontextmanager
    async def opened() -> AsyncIterator[S]:
        # A session is a connection itself; inside a block of ours it is closed with it.
        async with make() as session:
            yield session

    async def dependency() -> AsyncIterator[S]:
        operation = _operation()
        session = await operation.atransaction(opened())
        try:
            yield session
        except Exception:
            await operation.arollback()
            raise

    return dependency


def blocking_transaction(make: Callable[[], AbstractContextManager[S]]) -> Callable[[], AsyncIterator[S]]:
    """`transaction` for what blocks, such as `sessionmaker(engine)`, and handlers that FastAPI runs in threads.

    It is opened in threads of its own: who waits for a connection in one of FastAPI's takes it from a handler that has
    one, and needs a thread to get to its end.
    """
    threads = ThreadPoolExecutor(WAITING, thread_name_prefix="retryproof-session")

    @contextmanager
    def opened() -> Iterator[S]:
        with make() as session:
            yield session

    async def dependency() -> AsyncIterator[S]:
        operation = _operation()
        context = contextvars.copy_context()
        opening = asyncio.get_running_loop().run_in_executor(
            threads, lambda: context.run(operation.transaction, opened())
        )
        try:
            session: S = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait({opening})  # what it opens is the operation's, which sees to its end
            raise
        try:
            yield session
        except Exception:
            await operation.arollback()
            raise

    return dependency


def _operation() -> Operation:
    operation = current_operation(default=None)
    if operation is None:
        raise NoOperation(_NO_OPERATION)
    return operation
