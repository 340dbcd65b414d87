"""Drives the real state machine and the real record table through every interleaving of a few callers.

Theory. A world is one record, a clock, callers that each are at some command of `core.flow.attempt`, and commands that
are still on their way to the store. From each world every step is taken that could happen there: a command is
answered; or applied with its reply lost, refused, delayed past its caller's patience, doubled; the handler returns,
raises, is cancelled; a process dies; time passes a lease or a retention. Every invariant is checked at every step.

A generator cannot be copied, so a caller is the list of what it was told and is replayed from its start; two callers
are the same when their suspended frames are. Worlds that were seen are not entered again. A world that comes back on
one path is a path without end, which is a fault too.

Under the real rules every caller is also taken to each point by `attempt.py`, in both colours, and cancelled and
interrupted there: `ways.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from retryproof.core import flow
from retryproof.core import record as table
from retryproof.core.commands import (
    NOT_BEGUN,
    Acquired,
    Cancelled,
    Checkpoint,
    Claim,
    ClaimReply,
    Command,
    Committed,
    Complete,
    Disown,
    Done,
    FenceReply,
    Found,
    LeaseLost,
    Linger,
    Look,
    Pause,
    Paused,
    Raised,
    Release,
    Renew,
    Reply,
    Returned,
    Run,
    Stopped,
    StoreCommand,
)
from retryproof.core.hold import Hold
from retryproof.core.record import MICROSECONDS, Record, State
from tests.interleavings.callers import (
    BEGUN,
    LEASE,
    NO_ANSWER,
    NOT_SENT,
    RENEWED,
    RETENTION,
    STEP,
    Caller,
    Edge,
    Replay,
    Rules,
    Told,
    frozen,
)
from tests.interleavings.invariants import Violation, check_write, holds, is_stored
from tests.interleavings.ways import Ways, by_hand


@dataclass(frozen=True)
class Scenario:
    """What may happen, and how often: unanswered or doubled commands, lapses of a lease, ends of a retention.

    steps: how many of the callers, the first ones, may keep a checkpoint.
    losses: how often the store may lose the record, although it acknowledged it: I1 is not promised then (C1).
    commits: whether a handler may commit its work and its result together, in its own transaction.
    together: whether the callers share a process, which dies as one and holds what lingers (C10).
    """

    callers: tuple[Caller, ...]
    faults: int = 2
    lapses: int = 2
    expiries: int = 0
    steps: int = 0
    renewals: bool = False
    commits: bool = False
    losses: int = 0
    together: bool = False


@dataclass(frozen=True, slots=True)
class Lingering:
    """What a process holds of an attempt that is over, until the store has answered its last command."""

    last: Complete | Release
    hold: Hold = field(compare=False)


@dataclass(frozen=True, slots=True)
class Worker:
    """A caller as part of a world. `told` is how it got here; `number` is the same for all that will act alike."""

    status: str  # idle, live, over, dead
    number: int
    told: tuple[Told, ...] = ()
    command: Command | None = None
    running: bool = False
    deadline: float = 0.0
    hold: Hold | None = None
    may_step: bool = False
    may_renew: bool = False


IDLE, OVER, DEAD = Worker("idle", -1), Worker("over", -2), Worker("dead", -3)


@dataclass(frozen=True, slots=True)
class World:
    """Everything that matters for what can happen next.

    under_way: commands that arrive later or never. dirty: (birth, caller) of handlers that began and did not end
    with a clean failure. seen: (birth, result) that callers were given.
    """

    clock: int
    record: Record | None
    workers: tuple[Worker, ...]
    under_way: tuple[StoreCommand | Disown, ...]
    faults: int
    lapses: int
    expiries: int
    losses: int = 0
    dirty: frozenset[tuple[bytes, int]] = frozenset()
    seen: frozenset[tuple[bytes, bytes | None]] = frozenset()
    lingering: tuple[Lingering, ...] = ()

    @property
    def now(self) -> float:
        """The clock in seconds."""
        return self.clock / MICROSECONDS


@dataclass
class Report:
    """What an exploration met."""

    worlds: int = 0
    edges: set[Edge] = field(default_factory=set)
    conclusions: set[str] = field(default_factory=set)


Step = tuple[tuple[object, ...], World]


class Explorer:
    """Visits every world of a scenario; raises Violation at the first fault."""

    def __init__(self, scenario: Scenario, rules: Rules, *, ways: bool) -> None:
        self.scenario = scenario
        self._ways = ways
        self.rules = rules
        self.report = Report()
        self._recovered: set[Hashable] = set()
        self._numbers: dict[Hashable, int] = {}
        self._records: dict[Hashable, Record | None] = {frozen(None): None}
        self._applied: dict[Hashable, tuple[Record | None, Any]] = {}
        self._becomes: dict[Hashable, tuple[Worker, Hold | None, flow.Conclusion | None]] = {}

    def explore(self) -> Report:
        """Depth first, so that a path without end shows as a world that is its own ancestor."""
        scenario = self.scenario
        idle = (IDLE,) * len(scenario.callers)
        first = World(
            MICROSECONDS, None, idle, (), scenario.faults, scenario.lapses, scenario.expiries, scenario.losses
        )
        seen, path = {self._key(first)}, {self._key(first)}
        stack: list[tuple[tuple[object, ...], Hashable, Iterator[Step]]] = [
            (("start",), self._key(first), self._steps(first))
        ]
        try:
            while stack:
                _, key, steps = stack[-1]
                label, world = next(steps, ((), None))
                if world is None:
                    path.discard(key)
                    stack.pop()
                    continue
                key = self._key(world)
                if key in path:
                    raise Violation(f"a path without end: {_line(label)}")
                if key not in seen:
                    seen.add(key)
                    path.add(key)
                    stack.append((label, key, self._steps(world)))
        except Violation as violation:
            trace = "\n".join(_line(label) for label, _, _ in stack)
            raise Violation(f"{violation}\nafter:\n{trace}") from None
        self.report.worlds = len(seen)
        return self.report

    def _number(self, thing: Hashable) -> int:
        """The same small number for equal things."""
        return self._numbers.setdefault(thing, len(self._numbers))

    def _key(self, world: World) -> Hashable:
        """Equal for two worlds from which the same can happen."""
        return (
            world.clock,
            id(world.record),
            *(worker.number for worker in world.workers),
            self._number((world.under_way, world.dirty, world.seen, world.lingering)),
            world.losses * 1000 + world.faults * 100 + world.lapses * 10 + world.expiries,
        )

    # What can happen

    def _steps(self, world: World) -> Iterator[Step]:
        for number, worker in enumerate(world.workers):
            name = self.scenario.callers[number].name
            if worker.status == "idle":
                yield (name, "begins"), self._tell(world, number, Told("begin", world.now))
            elif worker.status == "live":
                yield (name, "dies"), self._dead(world, number)
                for label, following in self._answers(world, number, worker):
                    yield (name, *label), following
        for lingering in world.lingering:
            yield ("settles late", lingering.last), self._settle_late(world, lingering)[0]
        for place, late in enumerate(world.under_way):
            rest = replace(world, under_way=world.under_way[:place] + world.under_way[place + 1 :])
            yield (late, "arrives"), self._arrive(rest, late)
        if all(worker.status != "live" for worker in world.workers):
            self._check_recovery(world)
        else:
            yield from self._passing(world)

    def _passing(self, world: World) -> Iterator[Step]:
        if world.lapses:
            yield ("a lease passes",), replace(self._later(world, LEASE + 1), lapses=world.lapses - 1)
        if world.losses and world.record is not None:
            yield ("the record is lost",), replace(world, record=None, losses=world.losses - 1)
        if world.expiries:
            yield ("a retention passes",), replace(self._later(world, RETENTION + 1), expiries=world.expiries - 1)

    def _answers(self, world: World, number: int, worker: Worker) -> Iterator[Step]:
        match worker.command:
            case Claim() as claim if self.scenario.together:
                yield from self._claim_answers(world, number, claim)
            case Claim() | Complete() | Release() | Renew() | Checkpoint() as command:
                yield from self._store_answers(world, number, command)
            case Run(hold) if not worker.running:
                begins = self.rules.may_begin(hold, world.now)
                told = Told(BEGUN if begins else NOT_BEGUN, world.now)
                yield ("begins its work" if begins else "is too late",), self._tell(world, number, told)
            case Run(hold):
                yield from self._run_answers(world, number, worker, hold)
            case Pause(seconds, waiting):
                over = self._later(world, seconds)
                yield ("pauses", seconds), self._tell(over, number, Told(Paused(), over.now))
                if waiting:
                    yield ("leaves",), self._tell(world, number, Told(Paused(on=False), world.now))
            case Look():
                found = world.record and replace(world.record, read_at=world.clock)
                if found is not None and found.expired(world.clock):
                    found = None
                yield ("looks",), self._tell(world, number, Told(Found(found), world.now))
                if world.faults:
                    less = replace(world, faults=world.faults - 1)
                    yield ("looks in vain",), self._tell(less, number, Told(NO_ANSWER, world.now))
            case Disown() as disown:
                yield ("disowns",), self._tell(self._send(world, disown), number, Told(None, world.now))
            case Linger(hold, last) if self.scenario.together:
                held = replace(world, lingering=(*world.lingering, Lingering(last, hold)))
                yield ("lingers",), self._tell(held, number, Told(None, world.now))
            case Linger(_, last):
                yield ("lingers",), self._tell(self._send(world, last), number, Told(None, world.now))

    def _claim_answers(self, world: World, number: int, claim: Claim) -> Iterator[Step]:
        """A claim in a process that may hold its operation, which is heard first (C10)."""
        lingering = world.lingering[-1] if world.lingering else None
        holder = next((at for at, worker in enumerate(world.workers) if worker.hold is not None), None)
        hold = lingering.hold if lingering is not None else holder is not None and world.workers[holder].hold
        if not hold:
            yield from self._store_answers(world, number, claim)
            return
        last = None if lingering is None else lingering.last
        said = self.rules.twin_first(hold, last, world.now)
        heard: list[tuple[World, Hold, Reply]] = [(world, hold, None)]
        if said is not None:
            heard = self._heard(world, lingering, holder, hold, said)
        for after, held, reply in heard:
            instead = self.rules.twin_told(held, last, claim, reply, after.now)
            if instead is not None:
                yield (claim, "stays", reply, instead), self._tell(after, number, Told(instead, after.now))
            else:
                if holds(after.record, held) and after.record and after.record.state is State.IN_PROGRESS:
                    raise Violation("C10: a claim leaves a process that holds the operation")
                for label, following in self._store_answers(after, number, claim):
                    yield ("after", reply, *label), following

    def _heard(
        self,
        world: World,
        lingering: Lingering | None,
        holder: int | None,
        hold: Hold,
        said: Complete | Release | Renew,
    ) -> list[tuple[World, Hold, Reply]]:
        """What the store may say on a hold that stands in a claim's way, and the world after it."""
        heard: list[tuple[World, Hold, Reply]] = []
        if lingering is not None:
            settled, answer = self._settle_late(world, lingering)
            heard.append((settled, hold, answer))
        else:
            assert holder is not None
            renewed, answer = self._apply(world, said)
            if isinstance(answer, Done):
                renewed = self._tell(renewed, holder, Told(RENEWED, world.now))
            heard.append((renewed, renewed.workers[holder].hold or hold, answer))
        if world.faults:
            less = replace(world, faults=world.faults - 1)
            heard += [(less, hold, NOT_SENT), (self._send(less, said), hold, NOT_SENT)]
        return heard

    def _settle_late(self, world: World, lingering: Lingering) -> tuple[World, ClaimReply | FenceReply]:
        settled, reply = self._apply(world, lingering.last)
        return replace(settled, lingering=tuple(one for one in world.lingering if one != lingering)), reply

    def _dead(self, world: World, number: int) -> World:
        if not self.scenario.together:
            return self._with(world, number, DEAD)
        workers = tuple(DEAD if worker.status == "live" else worker for worker in world.workers)
        return replace(world, workers=workers, lingering=())

    def _store_answers(self, world: World, number: int, command: StoreCommand) -> Iterator[Step]:
        applied, reply = self._apply(world, command)
        yield (command, reply), self._tell(applied, number, Told(reply, world.now))
        if world.faults:
            less = world.faults - 1
            lost, refused = replace(applied, faults=less), replace(world, faults=less)
            delayed, doubled = self._send(refused, command), self._send(lost, command)
            yield (command, reply, "lost"), self._tell(lost, number, Told(NO_ANSWER, world.now))
            yield (command, "refused"), self._tell(refused, number, Told(NO_ANSWER, world.now))
            yield (command, "delayed"), self._tell(delayed, number, Told(NO_ANSWER, world.now))
            yield (command, reply, "doubled"), self._tell(doubled, number, Told(reply, world.now))

    def _run_answers(self, world: World, number: int, worker: Worker, hold: Hold) -> Iterator[Step]:
        caller = self.scenario.callers[number]
        clean = replace(world, dirty=world.dirty - {(hold.birth, number)})
        outcomes: list[tuple[Reply, World]] = [
            (Returned(caller.name.encode()), world),
            (Raised(), clean),
            (Raised(unknown=True), world),
            (Stopped(), world),
            (Cancelled(), clean if caller.policy.release_on_cancel else world),
        ]
        if not holds(world.record, hold):
            outcomes.append((LeaseLost(), world))
        elif self.scenario.commits:
            result = caller.name.encode()
            committed, _ = self._apply(clean, hold.complete(result))
            outcomes.append((Committed(result), committed))
            yield ("commits and dies",), self._with(committed, number, DEAD)
        for outcome, after in outcomes:
            yield (outcome,), self._tell(after, number, Told(outcome, world.now))
        if worker.may_step:
            yield ("takes a step",), self._tell(world, number, Told(STEP, world.now))
        if worker.may_renew and hold.deadline < world.now + hold.lease:
            renewed, reply = self._apply(world, hold.renew())
            told = Told(RENEWED, world.now) if isinstance(reply, Done) else Told(LeaseLost(), world.now)
            yield ("renews", reply), self._tell(renewed, number, told)

    # What happens then

    def _later(self, world: World, seconds: float) -> World:
        return replace(world, clock=world.clock + table.microseconds(seconds))

    def _send(self, world: World, command: StoreCommand | Disown) -> World:
        return replace(world, under_way=tuple(sorted((*world.under_way, command), key=self._number)))

    def _arrive(self, world: World, late: StoreCommand | Disown) -> World:
        if isinstance(late, Disown):
            found = world.record
            if found is None or found.nonce != late.claim.nonce or found.state is not State.IN_PROGRESS:
                return world
            held = Acquired(found.token, found.attempt, found.first_seen, found.birth)
            return self._send(world, self.rules.disown(late.claim, held))
        applied, _ = self._apply(world, late)
        return applied

    def _with(self, world: World, number: int, worker: Worker) -> World:
        workers = (*world.workers[:number], worker, *world.workers[number + 1 :])
        return replace(world, workers=workers)

    def _tell(self, world: World, number: int, told: Told) -> World:
        before = world.workers[number]
        worker, hold, conclusion = self._told(number, before, told)
        after = self._with(world, number, worker)
        if conclusion is not None:
            return self._conclude(after, conclusion)
        if worker.running and not before.running and hold is not None:
            after = self._begin_to_run(after, number, hold)
        self._check_one_holder(after)
        return after

    def _told(self, number: int, before: Worker, told: Told) -> tuple[Worker, Hold | None, flow.Conclusion | None]:
        """The state of a caller after a reply; the same for all callers in the same state."""
        key = (number, before.number, told.now, self._number(frozen(told.what)))
        if key not in self._becomes:
            self._becomes[key] = self._replay(number, (*before.told, told))
        return self._becomes[key]

    def _replay(self, number: int, told: tuple[Told, ...]) -> tuple[Worker, Hold | None, flow.Conclusion | None]:
        caller = self.scenario.callers[number]
        if self._ways:
            self._compare(caller, told)
        replay = Replay(self.rules, caller, told)
        self.report.edges.update(replay.edges)
        if replay.conclusion is not None:
            self.report.conclusions.add(type(replay.conclusion).__name__)
            return OVER, replay.hold, replay.conclusion
        worker = Worker(
            "live",
            self._number(replay.standing()),
            told,
            replay.command,
            replay.running,
            replay.hold.deadline if replay.hold is not None else 0.0,
            replay.hold,
            may_step=number < self.scenario.steps and not replay.stepped,
            may_renew=self.scenario.renewals and not replay.renewed,
        )
        return worker, replay.hold, None

    def _apply(self, world: World, command: StoreCommand) -> tuple[World, ClaimReply | FenceReply]:
        key = (id(world.record), world.clock, command)  # equal records are one object, see `_write`
        if key not in self._applied:
            self._applied[key] = self._write(world.record, command, world.clock)
        record, reply = self._applied[key]
        clean = record is not None and record.state is State.RELEASED and record.settled
        if clean and record is not None and any(birth == record.birth for birth, _ in world.dirty):
            raise Violation("I7: an operation counts as settled, and one of its attempts ended unknown")
        return replace(world, record=record), reply

    def _write(self, before: Record | None, command: StoreCommand, now: int) -> tuple[Record | None, Any]:
        written: Record | None
        reply: ClaimReply | FenceReply
        match command:
            case Claim():
                written, reply = self.rules.decide(before, command, now)
            case Complete() | Release():
                written, reply = self.rules.settle(before, command, now)
            case Renew():
                written, reply = self.rules.renew(before, command, now)
            case Checkpoint():
                written, reply = self.rules.checkpoint(before, command)
            case _:
                assert_never(command)
        after = before if written is None else written
        check_write(before, after, command, reply, now)
        return self._records.setdefault(frozen(after), after), reply

    # Invariants

    def _begin_to_run(self, world: World, number: int, hold: Hold) -> World:
        if not holds(world.record, hold) and not self.scenario.losses:
            raise Violation("I1: a handler begins whose operation another attempt took over")
        others = {other for birth, other in world.dirty if birth == hold.birth and other != number}
        if others and self.scenario.callers[number].policy.on_abandoned == "refuse":
            raise Violation("C7: a handler runs although an earlier one may have had its effect")
        return replace(world, dirty=world.dirty | {(hold.birth, number)})

    def _check_one_holder(self, world: World) -> None:
        holders = [worker for worker in world.workers if worker.running and worker.deadline > world.now]
        if len(holders) > 1 and not self.scenario.losses:
            raise Violation("I1: two handlers run, and both believe that their lease is live")

    def _compare(self, caller: Caller, told: tuple[Told, ...]) -> None:
        """Take the other ways to the same point; and to the one before, to be cancelled there."""
        ways = Ways(caller, told[0].now)
        replay = Replay(self.rules, caller, told, ways)
        if not isinstance(replay.command, Checkpoint):  # which goes to the store from the work, not from the attempt
            ways.compare(replay.command, replay.conclusion)
        if replay.conclusion is None:
            ways.cancel(None)
        last = told[-1].what
        if len(told) > 1 and not isinstance(last, str):
            unread = Ways(caller, told[0].now)
            Replay(self.rules, caller, told[:-1], unread)
            unread.cancel(last)

    def _conclude(self, world: World, conclusion: flow.Conclusion) -> World:
        match conclusion:
            case flow.Completed(hold, result, True):
                birth = hold.birth
                if not is_stored(world.record, birth, result):
                    raise Violation(f"I5: a caller is given {result!r}, which is not stored")
            case flow.Replayed(finished) if finished.stored:
                result = finished.result
                birth = world.record.birth if world.record is not None else b""
                if not is_stored(world.record, birth, result):
                    raise Violation(f"I5: a caller is replayed {result!r}, which is not stored")
            case _:
                return world
        seen = world.seen | {(birth, result)}
        if len({each for first, each in seen if first == birth}) > 1:
            raise Violation(f"I10: callers of one operation see {sorted(map(repr, seen))}")
        return replace(world, seen=seen)

    def _check_recovery(self, world: World) -> None:
        """Whatever happened, a caller that comes after the lease gets a definite answer."""
        key = (id(world.record), world.clock)
        if key in self._recovered:
            return
        self._recovered.add(key)
        later = self._later(world, LEASE + 1)
        last = Caller("last", fingerprint=world.record.fingerprint if world.record else b"\1\1same")
        told: tuple[Told, ...] = (Told("begin", later.now),)
        while (replay := Replay(self.rules, last, told)).conclusion is None:
            match replay.command:
                case Run():
                    told = (*told, Told(BEGUN, later.now))
                    reply: Reply = Returned(b"last")
                case Claim() | Complete() as command:
                    later, reply = self._apply(later, command)
                case other:
                    raise Violation(f"a caller that comes after everything is over has to {other}")
            told = (*told, Told(reply, later.now))
        if not isinstance(replay.conclusion, flow.Completed | flow.Replayed):
            raise Violation(f"a caller that comes after everything is over is told {replay.conclusion}")


def _line(label: tuple[object, ...]) -> str:
    return " ".join(map(str, label))


def explore(scenario: Scenario, rules: Rules | None = None, *, ways: bool = True) -> Report:
    """Visit every world of a scenario under the real rules, or faulty ones.

    ways: whether the other ways are taken as well. What a caller is told decides them, not how many callers there are.
    """
    with by_hand():
        return Explorer(scenario, rules or Rules(), ways=ways and rules is None).explore()
