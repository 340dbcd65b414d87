"""FastAPI: a dependency that gives a session, or connection, which commits with the response (T1).

Charging = Annotated[AsyncSession, Depends(transaction(async_sessionmaker(engine)))]

@app.post("/charges")
async def charge(session: Charging) -> Receipt: ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import TypeVar

from retryproof.core.errors import NoOperation
from retryproof.operation import Operation, current_operation

S = TypeVar("S")

_NO_OPERATION = (
    "This route works in the operation's transaction, and its request has no operation. Give the middleware "
    "required=True for it, so that a request without a key is refused before it gets here."
)


def transaction(make: Callable[[], AbstractAsyncContextManager[S]]) -> Callable[[], Awaitable[S]]:
    """A dependency: what `make` opens, in a transaction that is committed with the response before it is sent.

    make: `async_sessionmaker(engine)`, `engine.connect`, `pool.acquire`, `pool.connection`; called once a request,
        and what it opens is closed after the commit or the roll-back.
    The handler leaves commit and roll-back alone. Raises NoOperation for a request that has none.
    """

    @asynccontextmanager
    async def opened() -> AsyncIterator[S]:
        # A session is a connection itself; inside a block of ours it is closed with it.
        async with make() as session:
            yield session

    async def dependency() -> S:
        return await _operation().atransaction(opened())

    return dependency


def blocking_transaction(make: Callable[[], AbstractContextManager[S]]) -> Callable[[], S]:
    """`transaction` for what blocks, such as `sessionmaker(engine)`; FastAPI calls it in a thread, as its handlers."""

    @contextmanager
    def opened() -> Iterator[S]:
        with make() as session:
            yield session

    def dependency() -> S:
        return _operation().transaction(opened())

    return dependency


def _operation() -> Operation:
    operation = current_operation(default=None)
    if operation is None:
        raise NoOperation(_NO_OPERATION)
    return operation
