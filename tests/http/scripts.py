"""Apps that send a script of ASGI messages, and what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from tests.http.harness import Conversation, Header, call, read_body


def head(*headers: Header, status: int = 200, **more: Any) -> AsgiMessage:
    """The start of a response."""
    return {"type": "http.response.start", "status": status, "headers": list(headers), **more}


def part(body: bytes, *, more: bool = True) -> AsgiMessage:
    """A part of a response's body."""
    return {"type": "http.response.body", "body": body, "more_body": more}


class Script:
    """An app that sends these messages in turn; before a callable's place it waits for `go_on`.

    runs: how often it was called.
    """

    def __init__(self, *messages: AsgiMessage | Exception, paused: int | None = None) -> None:
        self.messages = messages
        self.paused = paused
        self.go_on = asyncio.Event()
        self.runs = 0
        self.after = asyncio.Event()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        self.runs += 1
        await read_body(receive)
        for index, message in enumerate(self.messages):
            if index == self.paused:
                await self.go_on.wait()
            if isinstance(message, Exception):
                raise message
            await send(message)
        self.after.set()


def sent(count: int) -> Callable[[Conversation], bool]:
    """That so many messages were sent."""
    return lambda conversation: len(conversation.sent) >= count


async def settled_code(covered: App, key: str) -> str:
    """The answer to a retry after the lease of an unknown attempt is over."""
    code = "in-progress"
    while code == "in-progress":  # a call goes through the loop, where the renewal and the clock go on
        code = (await call(covered, key=key, body=b"")).code
    return code
