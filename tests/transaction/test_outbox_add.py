"""Messages are added through every library that a caller may use (T5)."""

from typing import Any

import pytest

from retryproof.core.errors import ConfigurationError
from retryproof.sql.callers import adapt
from retryproof.sql.plan import Statement
from retryproof.transaction import Outbox
from tests.transaction.styles import BLOCKING, ON_LOOP, abegin, begin

OUTBOX = Outbox()
BATCH = [OUTBOX.message("t", b"3", headers={"kind": "made"}, trace="00-1-2-01"), OUTBOX.message("t", b"4", key="k")]
ADDED = Statement("SELECT payload, key, headers, content_type FROM retryproof_outbox ORDER BY sequence")
EXPECTED = [
    (b"1", "k", None, None),
    (b"2", None, None, "text/plain"),
    (b"3", None, '{"kind": "made"}', None),
    (b"4", "k", None, None),
]


def found(rows: Any) -> list[tuple[Any, ...]]:
    return [(bytes(payload), *others) for payload, *others in rows]


@pytest.mark.parametrize("style", BLOCKING)
def test_t5_messages_are_added_whatever_library_the_caller_uses(style: str, request: pytest.FixtureRequest) -> None:
    name, connect = BLOCKING[style]
    with connect(request.getfixturevalue(name)) as (connection, _):
        begin(connection)
        OUTBOX.add(connection, topic="t", payload=b"1", key="k")
        OUTBOX.add(connection, topic="t", payload=b"2", content_type="text/plain")
        OUTBOX.add_many(connection, BATCH)
        with pytest.raises(ConfigurationError, match="the database 64"):
            Outbox(partitions=8).add(connection, topic="t", payload=b"")
        rows: Any = adapt(connection).execute(ADDED)
        assert found(rows) == EXPECTED
        connection.rollback()


@pytest.mark.parametrize("style", ON_LOOP)
async def test_t5_messages_are_added_on_an_event_loop(style: str, request: pytest.FixtureRequest) -> None:
    name, connect = ON_LOOP[style]
    async with connect(request.getfixturevalue(name)) as (connection, _):
        await abegin(connection)
        await OUTBOX.aadd(connection, topic="t", payload=b"1", key="k")
        await OUTBOX.aadd(connection, topic="t", payload=b"2", content_type="text/plain")
        await OUTBOX.aadd_many(connection, BATCH)
        with pytest.raises(ConfigurationError, match="the database 64"):
            await Outbox(partitions=8).aadd(connection, topic="t", payload=b"")
        rows: Any = adapt(connection).execute(ADDED)
        assert found(await rows) == EXPECTED
