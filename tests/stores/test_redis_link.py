"""An event loop's connection to Redis: what a server that answers oddly, late or never does to the calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop

from retryproof.core.errors import StoreUnavailable
from retryproof.stores.redis import link
from retryproof.stores.redis.asynchronous import AsyncRedisStore
from retryproof.stores.redis.protocol import Plan, RedisReply, RedisRequest

SECONDS = 10.0
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@pytest.fixture(params=["own protocol", "streams"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With hiredis, and without."""
    if request.param == "streams":
        monkeypatch.setattr(link, "Reader", None)
    return str(request.param)


class Server:
    """Answers each ECHO by `answer`, which is told the number of the request; everything else with OK."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readline():
                arguments = []
                for _ in range(int(head[1:])):
                    size = int((await reader.readline())[1:])
                    arguments.append((await reader.readexactly(size + 2))[:-2])
                if arguments[0] == b"ECHO":
                    self.requests += 1
                    await self.answer(reader, writer, self.requests)
                else:
                    writer.write(b"+OK\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


Serve = Callable[..., Awaitable[tuple[Server, AsyncRedisStore]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    opened: list[tuple[asyncio.Server, AsyncRedisStore]] = []

    async def start(answer: Answer, timeout: float = SECONDS) -> tuple[Server, AsyncRedisStore]:
        server = Server(answer)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        store = AsyncRedisStore(f"redis://127.0.0.1:{port}", timeout=timeout)
        opened.append((listening, store))
        return server, store

    yield start
    for listening, store in opened:
        await store.aclose()
        listening.close()


def echo(store: AsyncRedisStore, *, repeatable: bool = True) -> Awaitable[RedisReply]:
    def plan() -> Plan[RedisReply]:
        return (yield RedisRequest(["ECHO", "x"], repeatable=repeatable))

    return store.perform(plan())


async def answer_number(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b":%d\r\n" % number)


async def test_an_answer_that_comes_byte_by_byte_is_put_together(serve: Serve) -> None:
    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        for byte in b"*2\r\n$3\r\none\r\n:2\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    server, store = await serve(dribble)
    assert [await echo(store), await echo(store)] == [[b"one", 2]] * 2
    assert server.connections == 1


async def test_c3_a_cancelled_call_leaves_no_answer_for_the_next(serve: Serve) -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        asked.set()
        await go.wait()
        await answer_number(reader, writer, number)

    server, store = await serve(late)
    first = asyncio.ensure_future(echo(store))
    await asked.wait()
    first.cancel()
    await asyncio.wait([first])
    go.set()
    assert [await echo(store), await echo(store)] == [2, 3]
    assert server.connections == 2


async def test_c10_a_server_that_hangs_is_an_error_in_time_and_its_connection_is_not_used_again(serve: Serve) -> None:
    async def hang_at_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 2:
            await reader.read()  # until the client leaves
        await answer_number(reader, writer, number)

    server, store = await serve(hang_at_second, timeout=0.2)
    assert await echo(store) == 1
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
        await echo(store)
    assert time.monotonic() - began >= 0.2
    assert await echo(store) == 3
    assert server.connections == 2


async def test_a_connection_that_was_closed_while_it_was_idle_is_made_anew(serve: Serve) -> None:
    async def answer_and_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await answer_number(reader, writer, number)
        await writer.drain()
        writer.close()

    server, store = await serve(answer_and_leave)
    replies = []
    for _ in range(3):
        replies.append(await echo(store))
        await asyncio.sleep(0.02)
    assert (replies, server.connections) == ([1, 2, 3], 3)


async def test_c3_a_connection_that_is_cut_in_an_answer_is_no_answer(serve: Serve) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            writer.write(b"*2\r\n:1\r\n")
            await writer.drain()
            writer.close()
        else:
            await answer_number(reader, writer, number)

    _, store = await serve(half)
    with pytest.raises(StoreUnavailable, match="given no answer"):
        await echo(store, repeatable=False)
    assert await echo(store) == 2


async def test_an_error_of_the_server_is_one_and_so_is_what_is_no_redis(serve: Serve) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"-OOM no memory\r\n" if number == 1 else b"HTTP/1.1 400 Bad RedisRequest\r\n\r\n")

    _, store = await serve(refuse)
    with pytest.raises(StoreUnavailable, match="refused: no memory"):
        await echo(store)
    with pytest.raises(StoreUnavailable):
        await echo(store, repeatable=False)


@pytest.mark.parametrize("way", ["own protocol"], indirect=True)  # redis-py's streams hand it to the next
async def test_c3_what_comes_unasked_is_nobodys_answer(serve: Serve) -> None:

    async def answer_and_more(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await answer_number(reader, writer, number)
        await writer.drain()
        if number == 1:
            await asyncio.sleep(0.02)
            writer.write(b":1000\r\n")

    server, store = await serve(answer_and_more)
    assert await echo(store) == 1
    await asyncio.sleep(0.1)
    assert [await echo(store), server.connections] == [2, 2]


@pytest.mark.parametrize("way", ["own protocol"], indirect=True)
async def test_c3_two_answers_at_once_are_no_answer_and_leave_none_behind(serve: Serve) -> None:
    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b":1\r\n:1000\r\n" if number == 1 else b":%d\r\n" % number)

    server, store = await serve(answer_twice)
    with pytest.raises(StoreUnavailable, match="not asked for"):
        await echo(store)
    assert [await echo(store), server.connections] == [2, 2]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_calls_side_by_side_get_their_own_answers(redis_url: str, loop: str) -> None:
    async def main() -> None:
        store = AsyncRedisStore(redis_url)

        def plan(text: str) -> Plan[RedisReply]:
            return (yield RedisRequest(["ECHO", text]))

        for _ in range(5):
            texts = [f"{number} " + "x" * number * 1_000 for number in range(40)]
            replies = await asyncio.gather(*(store.perform(plan(text)) for text in texts))
            assert replies == [text.encode() for text in texts]
        await store.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(main())
