"""H11, C8, C10: clients that leave, servers that cancel, leases that are lost, stores that fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from retryproof.core.commands import Claim, Complete
from retryproof.core.errors import ConfigurationError, LeaseLost, OutcomeUnknown, StoreUnavailable
from retryproof.core.policy import Policy
from retryproof.core.record import Record
from retryproof.http.client_link import ClientLink
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from retryproof.operation import current_operation
from retryproof.stores.memory import MemoryStore
from retryproof.testing.clock import ManualClock
from tests.engine.support import Events as AwaitedEvents
from tests.engine.support import Shared
from tests.http.conftest import MakeLayer
from tests.http.harness import Answer, Conversation, Counting, Events, call, layered, new_key, read_body, start
from tests.http.scripts import Script, head, part, sent, settled_code


async def replayed(covered: App, key: str) -> Answer:
    """The replay, as soon as there is one."""
    async with asyncio.timeout(10):
        while True:
            answer = await call(covered, key=key)
            if answer.replayed:
                return answer


# H11: the client


@pytest.mark.needs("departures at once")
async def test_h11_receive_gives_the_body_once_then_the_disconnect_once_it_is_settled(layer: MakeLayer) -> None:
    received: list[AsgiMessage] = []
    left, settled = asyncio.Event(), asyncio.Event()

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        received.append(await receive())
        listening = asyncio.ensure_future(receive())
        left.set()
        await asyncio.wait({listening}, timeout=0.05)
        assert not listening.done()  # a framework would stop the handler
        await send(head())
        await send(part(b"", more=False))
        settled.set()
        received.append(await listening)

    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"ab", more=True)
    conversation.give(b"c")
    await asyncio.wait_for(left.wait(), 10)
    conversation.leave()
    await conversation.end()
    assert settled.is_set()
    assert received == [
        {"type": "http.request", "body": b"abc", "more_body": False},
        {"type": "http.disconnect"},
    ]


@pytest.mark.needs("departures at once")
async def test_h11_a_background_task_hears_of_the_disconnect_though_nobody_listened_before(layer: MakeLayer) -> None:
    heard: list[str] = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        heard.extend([(await receive())["type"], (await receive())["type"]])

    for on_departure in ("finish", "stop"):
        assert (await call(layer(app, on_departure=on_departure), key=new_key())).status == 201
    assert heard == ["http.request", "http.disconnect"] * 2


@pytest.mark.parametrize("size", [0, 1, 1_048_576, 1_048_577, 5_000_000])
async def test_h11_the_body_arrives_byte_for_byte_from_memory_or_file(layer: MakeLayer, size: int) -> None:
    app = Counting()
    body = bytes(index % 251 for index in range(size))
    covered, key = layer(app), new_key()
    for _ in range(2):
        conversation = start(covered, key=key)
        for at in range(0, size, 300_000):
            conversation.give(body[at : at + 300_000], more=True)
        conversation.give(b"")
        answer = await conversation.end()
        assert answer.status == 201
    assert app.bodies == [body]


async def test_h11_a_client_that_leaves_does_not_stop_the_operation(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    conversation.leave()
    conversation.fail_sends_with = OSError("gone")
    assert app.gate is not None
    app.gate.set()
    await conversation.end()
    replay = await call(covered, key=key)
    assert (replay.body, replay.replayed, app.effects) == (b'{"n": 1}', True, 1)


async def test_h11_a_stream_whose_client_left_is_stored_whole(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a"), part(b"b"), part(b"c", more=False), paused=2)
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(2))
    conversation.leave()
    conversation.fail_sends_with = OSError("gone")
    app.go_on.set()
    await conversation.end()
    assert (await call(covered, key=key, body=b"")).body == b"abc"
    assert app.runs == 1


EVENTS = (b"content-type", b"text/event-stream")


def never_ending(*steps: AsgiMessage) -> tuple[App, list[int]]:
    """An app that never ends, and never waits either; and the number of its parts so far."""
    parts = [0]

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(head(EVENTS, status=201))
        while True:
            parts[0] += 1
            await send(part(b"data: 1\n\n"))

    return app, parts


def by_route(scope: AsgiScope) -> str:
    return "stop" if scope["path"] == "/charges" else "finish"


def by_head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> str:
    return "stop" if EVENTS in headers else "finish"


REFUSE = Policy(lease=0.05, on_abandoned="refuse")


@pytest.mark.needs("departures at once")
@pytest.mark.parametrize("on_departure", ["stop", by_route, by_head])
async def test_h11_a_stream_that_is_to_stop_does_and_its_outcome_is_unknown(
    layer: MakeLayer, on_departure: Any
) -> None:
    app, _ = never_ending()
    covered, key = layer(app, on_departure=on_departure, policy=REFUSE), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(2))
    conversation.leave()
    with pytest.raises(OSError, match="left"):
        await conversation.end()
    assert await settled_code(covered, key) == "outcome-unknown"


async def test_h11_an_event_stream_whose_client_left_runs_to_its_end(layer: MakeLayer) -> None:
    app = Script(head(EVENTS), part(b"a"), part(b"b"), part(b"c", more=False), paused=2)
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(2))
    conversation.leave()
    conversation.fail_sends_with = OSError("gone")
    app.go_on.set()
    await conversation.end()
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.values(b"idempotency-replay"), app.runs) == (200, [b"omitted"], 1)


async def test_h11_an_endless_stream_without_a_client_yields_and_is_stopped_at_max_run(layer: MakeLayer) -> None:
    app, parts = never_ending()
    covered = layer(app, policy=Policy(lease=0.1, max_run=0.3, on_abandoned="refuse"))
    key = new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(2))
    conversation.leave()
    await conversation.end()  # in a loop that is held, no time-out would come
    assert parts[0] > 2
    assert await settled_code(covered, key) == "outcome-unknown"


@pytest.mark.needs("departures at once")
async def test_h11_a_handler_that_waits_for_the_disconnect_is_stopped_at_max_run(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await receive()

    covered, key = layer(app, policy=Policy(lease=0.1, max_run=0.2, on_abandoned="refuse")), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    conversation.leave()
    await conversation.end()
    assert await settled_code(covered, key) == "outcome-unknown"


async def test_c6_a_handler_with_a_client_may_run_past_max_run(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=Policy(lease=0.1, max_run=0.1)), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    await asyncio.sleep(0.3)
    assert app.gate is not None
    app.gate.set()
    assert (await conversation.end()).status == 201


@pytest.mark.needs("cancellation")
async def test_h11_over_the_limit_the_run_that_was_left_first_is_stopped(layer: MakeLayer) -> None:
    app = Script(head(EVENTS), part(b"a"), part(b"b"), part(b"c", more=False), paused=2)
    covered = layer(app, max_departed=1, policy=REFUSE)
    keys = [new_key(), new_key()]
    left: list[Conversation] = []
    for key in keys:
        conversation = start(covered, key=key)
        conversation.give()
        await conversation.until(sent(2))
        conversation.leave()
        left.append(conversation)
    await left[0].end()
    app.go_on.set()
    await left[1].end()
    assert await settled_code(covered, keys[0]) == "outcome-unknown"
    assert (await call(covered, key=keys[1], body=b"")).replayed
    assert len(covered._engine.departed) == 0


class Stopping(dict[Any, Any]):
    """The runs of a layer, each of which is stopped before its first step, as one that had left before may be."""

    def __setitem__(self, hold: Any, run: Any) -> None:
        super().__setitem__(hold, run)
        run.loop.call_soon(run.stop, "too many")


@pytest.mark.needs("cancellation")
async def test_h11_a_run_that_is_stopped_before_its_first_step_ends_all_the_same(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=REFUSE), new_key()
    covered._engine.runs = Stopping()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    async with asyncio.timeout(10):
        with pytest.raises(OutcomeUnknown):
            await conversation.end()
    assert not covered._engine.runs
    assert not covered._engine.opened().background.holds


@pytest.mark.needs("cancellation")
async def test_h11_a_client_that_leaves_while_its_claim_is_on_its_way_counts_as_left(
    layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    began, again, fails, go_on = (asyncio.Event() for _ in range(4))

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            began.set()
            await fails.wait()
            raise RollBack
        again.set()
        await go_on.wait()
        await send(head())
        await send(part(b"", more=False))

    covered, key = layer(app, policy=Policy(wait=60.0, poll=0.01)), new_key()
    first, twin = start(covered, key=key), start(covered, key=key)
    waits = ClientLink.stays

    async def leaving(link: ClientLink, seconds: float) -> bool:
        stays = await waits(link, seconds)
        fails.set()
        await asyncio.wait({first.task})
        twin.leave()
        await asyncio.wait({link.watch()})
        return stays

    monkeypatch.setattr(ClientLink, "stays", leaving)
    first.give(b"{}")
    await asyncio.wait_for(began.wait(), 10)
    twin.give(b"{}")
    await asyncio.wait_for(again.wait(), 10)
    assert len(covered._engine.departed) == 1
    go_on.set()
    await twin.end()
    assert len(covered._engine.departed) == 0
    with pytest.raises(RollBack):
        await first.end()


class RollBack(Exception):
    """What a handler raises to roll back."""


@pytest.mark.needs("departures at once")
@pytest.mark.parametrize("on_departure", ["finish", "stop"])
async def test_h11_a_handler_that_raises_has_raised_whoever_left(layer: MakeLayer, on_departure: str) -> None:
    runs = 0

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        nonlocal runs
        runs += 1
        await read_body(receive)
        await send(head(EVENTS))
        await send(part(b"a"))
        if on_departure == "stop":
            assert (await receive())["type"] == "http.disconnect"
        raise RollBack

    covered, key = layer(app, on_departure=on_departure), new_key()
    for _ in range(2):
        conversation = start(covered, key=key)
        conversation.give()
        await conversation.until(sent(2))
        conversation.leave()
        with pytest.raises(RollBack):
            await conversation.end()
    assert runs == 2


@pytest.mark.parametrize(
    "wrong",
    ["go on", lambda: "stop", lambda a, b, c: "stop", lambda *a: "stop"],
    ids=["another word", "no argument", "three", "any number"],
)
def test_h11_what_is_no_choice_for_departures_is_refused(layer: MakeLayer, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="on_departure"):
        layer(Counting(), on_departure=wrong)


async def test_h11_a_wrong_answer_about_a_head_lets_the_handler_finish(layer: MakeLayer) -> None:
    def raising(status: int, headers: object) -> str:
        raise ZeroDivisionError

    for decide in (raising, lambda status, headers: "perhaps"):
        covered, key = layer(Script(head(), part(b"a", more=False)), on_departure=decide), new_key()
        await call(covered, key=key)
        assert (await call(covered, key=key)).replayed


# H11: the server


@pytest.mark.needs("cancellation")
async def test_h11_a_server_that_cancels_does_not_stop_the_operation(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    conversation.task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not conversation.task.done()
    assert app.gate is not None
    app.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await conversation.end()
    assert conversation.answer.status == 201
    assert (await call(covered, key=key)).replayed


@pytest.mark.needs("cancellation")
async def test_h11_a_second_cancellation_leaves_the_operation_in_the_background(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    for _ in range(2):
        conversation.task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await conversation.end()
    assert app.gate is not None
    app.gate.set()
    await covered.aclose()
    assert (conversation.sent, app.effects) == ([], 1)


@pytest.mark.needs("cancellation")
@pytest.mark.parametrize("cancellations", [1, 2])
async def test_h11_a_handler_that_fails_after_its_server_left_is_logged(
    layer: MakeLayer, cancellations: int, caplog: pytest.LogCaptureFixture
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        began.set()
        await go_on.wait()
        raise ZeroDivisionError

    covered = layer(app)
    conversation = start(covered, key=new_key())
    conversation.give()
    await asyncio.wait_for(began.wait(), 10)
    for _ in range(cancellations):
        conversation.task.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await conversation.end()
    await covered.aclose()
    cancelled, failure = [record for record in caplog.records if record.name == "retryproof.http"]
    assert "goes on" in cancelled.message
    assert failure.exc_info is not None
    assert failure.exc_info[0] is ZeroDivisionError


async def test_a_loop_that_shuts_down_ends_everything_and_the_record_stays_in_progress() -> None:
    store = MemoryStore()

    async def serve() -> None:
        app = Counting(gate=asyncio.Event())
        start(layered(app, store=store), key="k").give()
        await app.began.wait()

    await asyncio.to_thread(asyncio.run, serve())
    [record] = store.scan()
    assert not record.settled


@pytest.mark.needs("cancellation")
async def test_h11_a_cancel_scope_that_cancels_again_and_again_does_not_stop_it(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()

    async def with_timeout(scope: AsgiScope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancelling:
            app_began.append(cancelling)
            await covered(scope, receive, send)

    app_began: list[anyio.CancelScope] = []
    conversation = start(with_timeout, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    app_began[0].cancel()
    await conversation.end()
    assert (await call(covered, key=key)).code == "in-progress"
    assert app.gate is not None
    app.gate.set()
    await replayed(covered, key)
    assert app.effects == 1


@pytest.mark.needs("cancellation")
async def test_a_cancellation_while_a_duplicate_waits_ends_it_at_once(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=Policy(wait=600.0, poll=600.0)), new_key()
    first, twin = start(covered, key=key), start(covered, key=key)
    first.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    twin.give(b"{}")
    for _ in range(5):
        await asyncio.sleep(0.01)
    twin.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await twin.end()
    assert app.gate is not None
    app.gate.set()
    assert (await first.end()).status == 201


@pytest.mark.needs("cancellation")
async def test_a_timeout_inside_the_app_cannot_lose_a_response_that_is_being_stored(layer: MakeLayer) -> None:
    store = Slow()

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(head(status=201))
        with anyio.CancelScope() as cancelling:
            asyncio.get_running_loop().call_later(0.02, cancelling.cancel)
            await send(part(b"a", more=False))

    covered, key = layer(app, store=store), new_key()
    store.completes.clear()
    conversation = start(covered, key=key)
    conversation.give()
    await asyncio.wait_for(store.completing.wait(), 10)
    await asyncio.sleep(0.05)
    store.completes.set()
    answer = await conversation.end()
    assert (answer.status, answer.body) == (201, b"a")
    assert (await call(covered, key=key, body=b"")).replayed


class Slow:
    """A memory store for a loop, whose completions wait until they may go on, and whose calls may fail."""

    def __init__(self) -> None:
        self._store = MemoryStore()
        self.capabilities = self._store.capabilities
        self.completes = asyncio.Event()
        self.completes.set()
        self.completing = asyncio.Event()
        self.fails: set[str] = set()
        self.claims = 0

    async def claim(self, claims: Sequence[Claim]) -> Any:
        self.claims += len(claims)
        self._check("claim")
        return self._store.claim(claims)

    async def complete(self, commands: Sequence[Complete]) -> Any:
        self.completing.set()
        await self.completes.wait()
        self._check("complete")
        return self._store.complete(commands)

    async def release(self, commands: Any) -> Any:
        self._check("release")
        return self._store.release(commands)

    async def renew(self, commands: Any) -> Any:
        self._check("renew")
        return self._store.renew(commands)

    async def checkpoint(self, commands: Any) -> Any:
        return self._store.checkpoint(commands)

    async def get(self, ids: Any) -> Any:
        self._check("get")
        return self._store.get(ids)

    async def scan(self, **options: Any) -> Any:
        return self._store.scan(**options)

    async def evict(self, ids: Any) -> Any:
        return self._store.evict(ids)

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Any:
        return self._store.reap(limit, told)

    async def aclose(self) -> None:
        self._store.close()

    def keeper(self) -> MemoryStore:
        """What the keeper's thread uses: the records, without the faults."""
        return self._store

    def _check(self, what: str) -> None:
        if what in self.fails:
            raise StoreUnavailable("The store is down.")


# C10


@pytest.mark.needs("loop")
async def test_h7_a_store_that_is_down_refuses_and_nothing_runs(layer: MakeLayer) -> None:
    app, store, events = Counting(), Slow(), Events()
    store.fails = {"claim"}
    covered = layer(app, store=store, events=(events,))
    answer = await call(covered, key=new_key())
    assert (answer.status, answer.code, answer.values(b"retry-after")) == (503, "store-unavailable", [b"1"])
    assert (app.effects, events.kinds) == (0, ["store_error"])


@pytest.mark.needs("loop")
async def test_c10_fail_open_runs_and_says_so(layer: MakeLayer) -> None:
    app, store, events = Counting(), Slow(), Events()
    store.fails = {"claim"}
    covered = layer(app, store=store, fail_open=lambda scope: scope["path"] == "/notes", events=(events,))
    answer = await call(covered, path="/notes", key=new_key())
    assert (answer.status, answer.values(b"idempotency-unprotected")) == (201, [b"store-unavailable"])
    assert (await call(covered, key=new_key())).code == "store-unavailable"
    assert (app.bodies, events.kinds) == ([b"{}"], ["unprotected", "store_error"])


@pytest.mark.needs("loop")
async def test_c10_after_the_effect_the_caller_gets_the_real_result(layer: MakeLayer) -> None:
    app, store, events = Counting(), Slow(), AwaitedEvents()
    store.fails = {"complete"}
    covered = layer(app, store=store, policy=Policy(complete_timeout=0.05), events=(events,))
    key = new_key()
    assert (await call(covered, key=key)).body == b'{"n": 1}'
    assert events.kinds == ["unstored"]
    store.fails = set()
    await replayed(covered, key)
    assert app.effects == 1
    await asyncio.to_thread(events.wait_for, "stored_late")
    await replayed(covered, key)


class NotSetUp(Slow):
    """A store whose schema is too old."""

    def _check(self, what: str) -> None:
        raise ConfigurationError("The schema is old; run `retryproof migrate`.")


@pytest.mark.needs("loop")
async def test_a_store_that_is_not_set_up_refuses_even_where_the_route_fails_open(layer: MakeLayer) -> None:
    app, events = Counting(), Events()
    covered = layer(app, store=NotSetUp(), fail_open=True, events=(events,))
    answer = await call(covered, key=new_key())
    assert (answer.status, answer.code, app.effects, events.kinds) == (503, "store-unavailable", 0, ["store_error"])
    assert "migrate" in str(events[0].error)


# C8


class Overtaken:
    """An app that pauses in the middle of its first run; a later run answers at once.

    paused: the first run is there. cancelled: whether it was stopped there.
    """

    def __init__(self, before: Sequence[AsgiMessage], after: Sequence[AsgiMessage | Exception]) -> None:
        self.before, self.after = before, after
        self.runs = 0
        self.paused = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = False

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        self.runs += 1
        if self.runs > 1:
            await send(head(status=202))
            await send(part(b"the winner's", more=False))
            return
        await read_body(receive)
        for message in self.before:
            await send(message)
        self.paused.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        for step in self.after:
            if isinstance(step, Exception):
                raise step
            await send(step)


async def overtake(layer: MakeLayer, app: Overtaken, policy: Policy) -> Conversation:
    """Run the app's first attempt, let its lease pass and a second attempt win, in another process."""
    clock = ManualClock()
    store = MemoryStore(clock)
    covered, rival, key = layer(app, store=store, policy=policy), layer(app, store=Shared(store)), new_key()
    first = start(covered, key=key)
    first.give()
    await asyncio.wait_for(app.paused.wait(), 10)
    clock.advance(policy.lease + 1)
    winner = await call(rival, key=key, body=b"")
    assert (winner.status, winner.body) == (202, b"the winner's")
    return first


CARRY_ON = Policy(on_lease_lost="continue")


async def test_c8_who_lost_the_lease_answers_with_the_winners_response(layer: MakeLayer) -> None:
    app = Overtaken([head(status=201)], [part(b"the loser's", more=False)])
    first = await overtake(layer, app, CARRY_ON)
    app.go_on.set()
    answer = await first.end()
    assert (answer.status, answer.body, answer.replayed) == (202, b"the winner's", True)


async def test_c8_the_exception_of_who_lost_the_lease_goes_on_and_its_client_gets_the_winners_answer(
    layer: MakeLayer,
) -> None:
    app = Overtaken([], [head(), ZeroDivisionError()])
    first = await overtake(layer, app, CARRY_ON)
    app.go_on.set()
    with pytest.raises(ZeroDivisionError):
        await first.end()
    assert (first.answer.status, first.answer.body) == (202, b"the winner's")


async def test_c8_a_stream_whose_head_was_sent_is_cut(layer: MakeLayer) -> None:
    app = Overtaken([head(status=201), part(b"the loser")], [part(b"'s", more=False)])
    first = await overtake(layer, app, CARRY_ON)
    app.go_on.set()
    with pytest.raises(LeaseLost):
        await first.end()
    assert not first.answer.complete


@pytest.mark.needs("cancellation")
async def test_c8_a_handler_that_lost_its_lease_is_cancelled(layer: MakeLayer) -> None:
    app = Overtaken([], [])
    first = await overtake(layer, app, Policy(lease=0.3))
    answer = await first.end()
    assert (app.cancelled, answer.status, answer.body) == (True, 202, b"the winner's")


# The operation that the handler sees


async def test_c13_the_handler_sees_its_operation_and_a_retry_the_same_ids(layer: MakeLayer) -> None:
    seen: list[Any] = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        operation = current_operation()
        seen.append((operation.derive("charge"), operation.first_seen, operation.attempt))
        await send(head(status=503 if len(seen) == 1 else 201))
        await send(part(b"", more=False))

    covered, key = layer(app), new_key()
    await call(covered, key=key)
    await call(covered, key=key)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert current_operation(default=None) is None


async def test_c20_layers_of_two_apps_on_one_store_object_keep_their_own_settings(layer: MakeLayer) -> None:
    store = MemoryStore()
    one = layer(Counting(201), store=store, endpoint="one")
    two = layer(Counting(409), store=store, endpoint="two", store_when="stripe")
    key = new_key()
    assert [(await call(app, key=key)).status for app in (one, two, one, two)] == [201, 409, 201, 409]


@pytest.mark.needs("loop")
async def test_a_shutdown_waits_for_operations_that_their_servers_left(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    closing = asyncio.ensure_future(covered.aclose())
    await asyncio.sleep(0.05)
    assert not closing.done()
    assert app.gate is not None
    app.gate.set()
    await closing
    assert (await conversation.end()).status == 201


@pytest.mark.needs("loop")
async def test_h11_context_variables_of_a_handler_stay_inside_and_its_state_does_not(layer: MakeLayer) -> None:
    """As docs/howto/fastapi.md says: the app has a task of its own, and the scope is one."""
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    seen: list[tuple[str, str | None]] = []

    async def handler(scope: AsgiScope, receive: Receive, send: Send) -> None:
        seen.append((variable.get(), None))
        variable.set("inside")
        scope.setdefault("state", {})["who"] = "inside"
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    covered = layer(handler)

    async def outside(scope: AsgiScope, receive: Receive, send: Send) -> None:
        variable.set("outside")
        await covered(scope, receive, send)
        seen.append((variable.get(), scope.get("state", {}).get("who")))

    await call(outside, key=new_key())
    assert seen == [("outside", None), ("outside", "inside")]
