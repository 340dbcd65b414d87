"""FastAPI: a dependency that gives a session, or connection, which commits with the response (T1).

Charging = Annotated[AsyncSession, Depends(transaction(async_sessionmaker(engine)))]

@app.post("/charges")
async def charge(session: Charging) -> Receipt: ...

If the handler raises, the work is rolled back, also after an HTTPException, whose response may be stored: outside the
app it is a normal response, but a dependency sees the exception.
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
"""How many threads of a dependency open sessions or wait for connections; further requests wait without a thread."""
_NO_OPERATION = (
    "This route works in the operation's transaction, and its request has no operation. Give the middleware "
    "required=True for it, so that a request without a key is refused before it gets here."
)


def transaction(make: Callable[[], AbstractAsyncContextManager[S]]) -> Callable[[], AsyncIterator[S]]:
    """A dependency: the session or connection from `make`, in a transaction that commits with the response.

    make: `async_sessionmaker(engine)`, `engine.connect`, `pool.acquire`, `pool.connection`; called once for each
        request. What it opens is closed after the commit or the rollback.
    The transaction commits before the response is sent. The handler must not commit or roll back; if it raises, the
    work is rolled back. Raises NoOperation for a request without an operation.
    """

    @asynccontextmanager
    async def opened() -> AsyncIterator[S]:
        # A session is a connection itself; our block closes it.
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
    """`transaction` for blocking makers, such as `sessionmaker(engine)`, and handlers that run in threads.

    It opens sessions in threads of its own. A request that waits for a connection in one of FastAPI's threads would
    take this thread from a handler that has a connection, and needs a thread to finish.
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
            await asyncio.wait({opening})  # the operation closes what it opens
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
