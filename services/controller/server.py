"""The shell around the core: sockets, clock, journal, spool, files.

Who waits for whom: a reader task takes messages off the bus into a bounded queue; the main loop takes everything that
is there, asks the core, appends to journal and spool, syncs both once (the group commit), and only then lets
acknowledgements, replies and commands leave. While the disk syncs, the next messages gather.

    bus -> queue -> core.judge -> spool, core.step, journal.append -> sync -> acks, replies, effects -> bus
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from services.controller.core.core import Core
from services.controller.core.events import (
    AnyEvent,
    DeadlinePassed,
    HyperparametersRequested,
    MeshIdMinted,
    MessageReceived,
    ReplicaLost,
    ReplicaMessage,
    ReplicaRegistered,
    RunBegan,
    StopRequested,
    TermBegan,
)
from services.controller.core.outcome import (
    Effect,
    EndRun,
    ForgetMesh,
    FreeSpool,
    MintMeshId,
    Part,
    RecordEvaluation,
    RecordMetrics,
    Send,
    Welcome,
)
from services.controller.journal import Journal
from services.controller.liveness import Liveness
from services.controller.outputs import Outputs
from services.controller.rendezvous import Rendezvous
from services.controller.spool import Spool
from services.controller.status import status
from shared.bus import Incoming, RouterBus
from shared.config import Recipe, RecipeError, check_changes, dump_recipe
from shared.messages import (
    Accepted,
    AnyMessage,
    Heartbeat,
    HeartbeatReply,
    LeaseRef,
    Refused,
    Register,
    Registered,
    ReplicaExited,
    SetHyperparameters,
    Status,
    StatusRequest,
    StopRun,
    StoreGet,
    StoreSet,
)
from shared.telemetry import get_logger

log = get_logger()

TICK_S = 0.1
"""How often silence, deadlines and waits are looked at."""
QUEUE = 1024
BATCH = 256
"""Most messages that one group commit covers."""


class Controller:
    """One term of one run."""

    def __init__(self, core: Core, journal: Journal, spool: Spool, outputs: Outputs, bus: RouterBus) -> None:
        self._core = core
        self._journal = journal
        self._spool = spool
        self._outputs = outputs
        self._bus = bus
        self._recipe = core.recipe
        self._liveness = Liveness(core.recipe.bus.lost_after_s)
        self._rendezvous = Rendezvous()
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue(QUEUE)
        self._peers: dict[tuple[str, int], tuple[int, bytes]] = {}
        self._registers: dict[tuple[str, int], Incoming] = {}
        self._durable: dict[bytes, tuple[int, int]] = {}
        self._effects: list[Effect] = []
        self._replies: list[Callable[[], None]] = []
        self._ending: EndRun | None = None

    async def serve(self, run: str) -> EndRun:
        """Run this term to its end; how the run ended."""
        if self._journal.number == 0:
            self._step(RunBegan(at=self._now(), run=run, recipe=dump_recipe(self._recipe)))
        self._step(TermBegan(at=self._now(), term=self._bus.term))
        await self._commit()
        self._outputs.address(await self._bus.start(), self._bus.term)
        log.info("the controller listens", address=self._bus.address, term=self._bus.term)
        reader = asyncio.create_task(self._read())
        try:
            while self._ending is None:
                await self._turn(reader)
            await self._say_goodbye(reader)
            return self._ending
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await self._bus.close()

    # --- one turn: take, decide, commit, tell -------------------------------------------------------------------------

    async def _turn(self, reader: asyncio.Task[None]) -> None:
        if reader.done():
            reader.result()
        try:
            async with asyncio.timeout(TICK_S):
                self._take(await self._queue.get())
        except TimeoutError:
            pass
        for _ in range(BATCH):
            if self._queue.empty():
                break
            self._take(self._queue.get_nowait())
        self._tick()
        await self._commit()

    async def _read(self) -> None:
        while True:
            await self._queue.put(await self._bus.recv())

    async def _commit(self) -> None:
        """Make durable what was decided, then let its consequences leave."""
        if self._journal.pending:
            await asyncio.to_thread(self._sync)
        for peer, (sequence, session) in self._durable.items():
            self._bus.durable(peer, sequence, session)
        self._durable.clear()
        replies, self._replies = self._replies, []
        for reply in replies:
            reply()
        effects, self._effects = self._effects, []
        for effect in effects:
            self._do(effect)
        if self._journal.pending:  # an effect was answered at once, as minting an id is
            await self._commit()
        elif self._journal.since_snapshot() >= self._recipe.journal.snapshot_every:
            self._journal.save_snapshot(self._core.snapshot())

    def _sync(self) -> None:
        self._spool.sync()
        self._journal.sync()

    def _step(self, event: AnyEvent) -> None:
        outcome = self._core.step(event)
        self._journal.append(self._core.state.term, event, outcome.facts)
        self._effects += outcome.effects
        for fact in outcome.facts:
            log.debug("fact", fact=type(fact).__name__)

    def _now(self) -> float:
        """Seconds since the epoch, never before the last event's."""
        return max(time.time(), self._core.state.now)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _take(self, incoming: Incoming) -> None:
        envelope = incoming.envelope
        now = time.monotonic()
        if incoming.session:
            self._liveness.hear((envelope.sender, envelope.incarnation, envelope.rank), now)
        match envelope.body:
            case Register():
                self._take_register(incoming, envelope.body)
            case Heartbeat(state=state, progress=progress):
                self._liveness.note((envelope.sender, envelope.incarnation, envelope.rank), state, progress)
                self._bus.reply(incoming, HeartbeatReply())
            case StoreSet():
                self._rendezvous.set(envelope.body, lambda answer: self._bus.reply(incoming, answer))
            case StoreGet():
                self._rendezvous.get(envelope.body, now, lambda answer: self._bus.reply(incoming, answer))
            case StatusRequest():
                counters = dict(sorted(self._bus.counters.items()))
                run = status(self._core.state, self._liveness, counters, now)
                self._bus.reply(incoming, Status(run))
            case StopRun(cause=cause):
                if not self._core.state.stages.stopping:
                    self._step(StopRequested(at=self._now(), cause=cause))
                self._answer(
                    incoming, Accepted("the batch in hand is finished, a checkpoint written, then the run ends")
                )
            case SetHyperparameters():
                self._take_changes(incoming, envelope.body)
            case ReplicaExited():
                self._take_exit(incoming, envelope.body)
            case Refused():
                log.warning("a replica refused a message", replica=envelope.sender, fault=envelope.body.fault)
            case body if body.reliable:
                self._take_report(incoming)
            case _:
                advice = "see docs/protocol.md for who sends what"
                name = type(envelope.body).__name__
                self._bus.reply(incoming, Refused("role", "a message for the controller", name, advice))

    def _take_register(self, incoming: Incoming, register: Register) -> None:
        refusal = self._core.judge_registration(register)
        if refusal is not None:
            log.warning("registration refused", replica=register.replica, fault=refusal.fault, got=refusal.got)
            self._bus.counters[refusal.fault] += 1
            self._bus.reply(incoming, refusal)
            return
        self._registers[register.replica, register.rank] = incoming
        self._step(ReplicaRegistered(at=self._now(), register=register))

    def _take_report(self, incoming: Incoming) -> None:
        """A reliable message of a replica: judge it, spool its payload, journal it; it is acknowledged either way."""
        envelope = incoming.envelope
        message = envelope.body
        self._durable[incoming.peer] = (envelope.sequence, incoming.session)
        if not isinstance(message, ReplicaMessage):
            advice = "see docs/protocol.md for who sends what"
            refusal = Refused("role", "a message for the controller", type(message).__name__, advice)
            self._refuse(incoming, refusal)
            return
        if envelope.rank != 0:
            self._refuse(incoming, Refused("role", "reports of rank 0", f"rank {envelope.rank}", "let rank 0 report"))
            return
        verdict = self._core.judge(envelope.sender, envelope.incarnation, message)
        if verdict == "duplicate":
            self._bus.counters["repeated"] += 1
            return
        if isinstance(verdict, Refused):
            self._refuse(incoming, verdict)
            return
        place = self._spool.append(incoming.frames) if incoming.frames else None
        event = MessageReceived(
            at=self._now(),
            replica=envelope.sender,
            incarnation=envelope.incarnation,
            rank=envelope.rank,
            body=message,
            spooled=place,
        )
        self._step(event)

    def _refuse(self, incoming: Incoming, refusal: Refused) -> None:
        self._bus.counters[refusal.fault] += 1
        log.warning(
            "message refused",
            replica=incoming.envelope.sender,
            message=type(incoming.envelope.body).__name__,
            fault=refusal.fault,
            expected=refusal.expected,
            got=refusal.got,
        )
        self._answer(incoming, refusal)

    def _take_changes(self, incoming: Incoming, message: SetHyperparameters) -> None:
        try:
            changes = check_changes(self._recipe, message.changes)
        except RecipeError as error:
            advice = "change only live fields, within their range"
            self._bus.reply(incoming, Refused("hyperparameter", str(error), str(message.changes), advice))
            return
        self._step(HyperparametersRequested(at=self._now(), changes=changes, at_step=message.at_step))
        pending = self._core.state.hyperparameters.pending
        step = max((change.at_step for change in pending if change.changes == changes), default=0)
        self._answer(incoming, Accepted(f"in force from step {step} on"))

    def _take_exit(self, incoming: Incoming, message: ReplicaExited) -> None:
        replica = self._core.state.fleet.replicas.get(message.replica)
        if replica is not None and replica.live and message.pid in replica.pids.values():
            cause = f"process {message.pid} ended with code {message.code}"
            self._step(ReplicaLost(at=self._now(), replica=replica.name, incarnation=replica.incarnation, cause=cause))
        self._answer(incoming, Accepted("noted"))

    def _answer(self, incoming: Incoming, message: AnyMessage) -> None:
        """Reply once what it speaks of is durable."""
        self._replies.append(lambda: self._bus.reply(incoming, message))

    # --- what time brings ---------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        self._rendezvous.expire(now)
        for (replica, incarnation, rank), silence in self._liveness.silent(now):
            cause = f"rank {rank} silent for {silence:.1f} s (bus.lost_after_s)"
            self._step(ReplicaLost(at=self._now(), replica=replica, incarnation=incarnation, cause=cause))
            self._liveness.forget(replica, incarnation)
        for peer in self._bus.overdue(now):
            for (replica, _), (incarnation, known) in list(self._peers.items()):
                if known == peer:
                    cause = "it does not take its messages (bus.window)"
                    self._step(ReplicaLost(at=self._now(), replica=replica, incarnation=incarnation, cause=cause))
        if self._core.next_deadline() <= self._now():
            self._step(DeadlinePassed(at=self._now()))

    # --- effects ------------------------------------------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Welcome():
                self._welcome(effect)
            case Part():
                self._part(effect)
            case MintMeshId(epoch=epoch):
                self._rendezvous.open(epoch)
                self._step(MeshIdMinted(at=self._now(), epoch=epoch, unique_id=secrets.token_bytes(16)))
            case ForgetMesh(epoch=epoch):
                self._rendezvous.close(epoch)
            case RecordMetrics(line=line):
                self._outputs.metrics(line)
            case RecordEvaluation(result=result):
                self._outputs.evaluation(result)
                share = f"{result['correct']}/{result['n']}"
                log.info("evaluated", version=result["version"], accuracy=round(result["accuracy"], 4), correct=share)
            case FreeSpool(segment=segment):
                self._spool.free_below(segment)
            case EndRun():
                self._ending = effect

    def _send(self, effect: Send) -> None:
        peer = self._peers.get((effect.replica, effect.rank))
        if peer is None:
            return  # it lost its session in this very turn: what is outstanding is derived again when it is back
        frames: list[bytes | memoryview] = []
        for place in effect.payload:
            frames += self._spool.read(place)
        self._bus.send(peer[1], effect.message, frames)

    def _welcome(self, effect: Welcome) -> None:
        incoming = self._registers.pop((effect.replica, effect.rank), None)
        if incoming is None:
            return
        self._peers[effect.replica, effect.rank] = (effect.incarnation, incoming.peer)
        self._liveness.hear((effect.replica, effect.incarnation, effect.rank), time.monotonic())
        self._bus.open_session(incoming.peer, effect.replica, effect.rank, effect.incarnation)
        self._bus.reply(incoming, Registered(effect.incarnation, [LeaseRef(*ref) for ref in effect.leases]))
        log.info("replica registered", replica=effect.replica, rank=effect.rank, incarnation=effect.incarnation)

    def _part(self, effect: Part) -> None:
        self._liveness.forget(effect.replica, effect.incarnation)
        for key, (incarnation, peer) in list(self._peers.items()):
            if key[0] == effect.replica and incarnation == effect.incarnation:
                self._bus.close_session(peer)
                del self._peers[key]
        log.info("replica gone", replica=effect.replica, incarnation=effect.incarnation)

    async def _say_goodbye(self, reader: asyncio.Task[None]) -> None:
        """Give everyone the time to take its Shutdown, then keep the state for a quick start of the next term."""
        until = time.monotonic() + self._recipe.timeouts.exit_s / 2
        while time.monotonic() < until and any(self._bus.unacknowledged(peer) for _, peer in self._peers.values()):
            await self._turn(reader)
        self._journal.save_snapshot(self._core.snapshot())


def open_run(recipe: Recipe, folder: Path, journal: Journal, outputs: Outputs) -> Core:
    """The core as the journal in `folder` left it; facts that replay differently are refused."""
    snapshot = journal.snapshot()
    core = Core.restore(recipe, snapshot) if snapshot is not None else Core(recipe)
    replayed = 0
    for record in journal.replay():
        outcome = core.step(record.event)
        if outcome.facts != record.facts:
            raise DriftedJournal(folder, journal, record.event, outcome.facts, record.facts)
        for effect in outcome.effects:
            if isinstance(effect, RecordMetrics):
                outputs.metrics(effect.line)
            elif isinstance(effect, RecordEvaluation):
                outputs.evaluation(effect.result)
        replayed += 1
    if replayed or snapshot is not None:
        log.info("journal replayed", records=replayed, after_snapshot=snapshot is not None, torn_bytes=journal.cut)
    return core


class DriftedJournal(Exception):
    """Replaying an event gave other facts than those on record: the code or the recipe is not the one that ran."""

    def __init__(self, folder: Path, journal: Journal, event: AnyEvent, got: object, expected: object) -> None:
        super().__init__(
            f"{folder / 'journal'}: replaying {type(event).__name__} at {event.at:.3f} gives {got}, not {expected}; "
            "resume with the recipe in config.toml and the version of Orrery that wrote the journal"
        )
