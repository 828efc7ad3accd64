"""The shell around the core, without sockets or loops: what comes in, what becomes durable, what leaves.

    take / tick  ->  core.judge  ->  spool, core.step, journal.append   (in memory)
    seal         ->  what was decided so far is the next commit
    sync         ->  spool and journal of that commit on disk           (in another thread, while `take` goes on)
    release      ->  its acknowledgements, replies, commands, files

`server` drives it with a real bus and a real clock, the simulator with virtual ones. The invariant is the order:
nothing that follows from an event leaves before `sync` has returned.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.controller.core.core import Core
from services.controller.core.events import (
    AnyEvent,
    DeadlinePassed,
    MeshIdFailed,
    MeshIdMinted,
    MessageReceived,
    ReplicaLost,
    ReplicaMessage,
    ReplicaRegistered,
    RunBegan,
    TermBegan,
)
from services.controller.core.outcome import (
    Effect,
    EndMint,
    EndRun,
    ForgetMesh,
    FreeSpool,
    MintMeshId,
    Part,
    RecordEvaluation,
    RecordMetrics,
    Send,
    Welcome,
    merge_leases,
)
from services.controller.journal import Journal
from services.controller.liveness import Liveness
from services.controller.minting import Minted, Minter, MintFailed
from services.controller.outputs import Outputs
from services.controller.rendezvous import Rendezvous
from services.controller.requests import Request, Requests
from services.controller.spool import Spool
from services.controller.status import status
from shared.bus import Incoming, WireFault
from shared.config import dump_recipe
from shared.messages import (
    AnyMessage,
    Heartbeat,
    HeartbeatReply,
    LeaseRef,
    Refused,
    Register,
    Registered,
    Status,
    StatusRequest,
    StoreGet,
    StoreSet,
)
from shared.telemetry import get_logger

log = get_logger()

MOST_PENDING = 512
"""Records that may wait for the disk before no more is taken."""


class Bus(Protocol):
    """What the shell asks of the bus; `shared.bus.RouterBus` is the real one."""

    term: int
    counters: Counter[str]

    def open_session(self, peer: bytes, sender: str, rank: int, incarnation: int) -> None:
        """Sequences with this peer count from 1 again."""

    def close_session(self, peer: bytes) -> None:
        """What this peer still says is refused."""

    def send(
        self, peer: bytes, message: AnyMessage, frames: Sequence[bytes | memoryview] = (), *, reply_to: int = 0
    ) -> None:
        """Send; never waits, never raises for the peer's sake."""

    def reply(self, incoming: Incoming, message: AnyMessage) -> None:
        """Answer a message."""

    def durable(self, peer: bytes, sequence: int, session: int | None = None) -> None:
        """Acknowledge up to this sequence."""

    def overdue(self, now: float) -> list[bytes]:
        """Peers that don't take their messages."""


class Minting(Protocol):
    """What the shell asks of who mints NCCL's ids; `Minter` is the real one. Nothing of it waits."""

    def mint(self, epoch: int, count: int) -> None:
        """Ask for ids."""

    def poll(self) -> list[Minted | MintFailed]:
        """What came of it."""

    def forget(self, epoch: int) -> None:
        """The ids of this epoch are used, or never will be."""

    def close(self) -> None:
        """Leave nothing running."""


@dataclass(frozen=True)
class Clock:
    """Two clocks in seconds: `wall` tells when the term began and may jump, `steady` counts on from there."""

    wall: Callable[[], float]
    steady: Callable[[], float]


class MessageTooLarge(Exception):
    """A message for a replica is larger than the bus takes: no restart would make it smaller."""

    def __init__(self, name: str, fault: WireFault) -> None:
        super().__init__(
            f"{name}: expected {fault.expected}, got {fault.got}; raise bus.max_message_mb, or lower the stage's "
            "batch_size (train.batch_size, sft.batch_size), train.samples or rollout.max_new_tokens, in config.toml "
            "of the run folder, then resume"
        )


@dataclass
class _Commit:
    """What leaves once it is durable: acknowledgements (sequence and session by peer), replies, effects."""

    durable: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    replies: list[Callable[[], None]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)


class Shell:
    """One term of one run, as far as it needs no socket.

    Not thread-safe, but for `sync`, during which the other thread may `take` and `tick`.
    """

    def __init__(
        self,
        core: Core,
        journal: Journal,
        spool: Spool,
        outputs: Outputs,
        bus: Bus,
        clock: Clock,
        minter: Minting | None = None,
    ) -> None:
        self._core = core
        self._journal = journal
        self._spool = spool
        self._outputs = outputs
        self._bus = bus
        self._clock = clock
        self._began = max(clock.wall(), core.state.now), clock.steady()
        self._recipe = core.recipe
        self._liveness = Liveness(core.recipe.bus.lost_after_s)
        self._rendezvous = Rendezvous()
        self._minter = minter or Minter(core.recipe.weights)
        self._minting: dict[int, str] = {}
        self._requests = Requests(core, self._now, self._step, self._answer, bus.reply)
        self._peers: dict[tuple[str, int], tuple[int, bytes]] = {}
        self._registers: dict[tuple[str, int, int], Incoming] = {}
        self._decided = _Commit()
        self._sealed: _Commit | None = None
        self._lag = 0.0
        self.ending: EndRun | None = None

    def begin(self, run: str) -> None:
        """The first events of a term; a commit must follow before anyone connects."""
        if self._journal.number == 0:
            self._step(RunBegan(at=self._now(), run=run, recipe=dump_recipe(self._recipe)))
        self._step(TermBegan(at=self._now(), term=self._bus.term))

    @property
    def peers(self) -> list[bytes]:
        """Whoever has a session."""
        return [peer for _, peer in self._peers.values()]

    @property
    def unsynced(self) -> bool:
        """Whether something was decided that is not durable yet."""
        return self._journal.pending > 0

    @property
    def crowded(self) -> bool:
        """Whether a commit should come to its end before more is taken: much waits for it, or a snapshot does."""
        return self._journal.pending >= MOST_PENDING or self._snapshot_due

    def seal(self) -> None:
        """What was taken so far is what the next `sync` makes durable and the next `release` lets out.

        Who takes nothing meanwhile need not call it: `sync` and `release` do.
        """
        self._journal.seal()
        self._sealed, self._decided = self._decided, _Commit()

    def sync(self) -> None:
        """Make durable what was sealed: payloads first, then the records that speak of them."""
        if self._sealed is None:
            self.seal()
        self._spool.sync()
        self._journal.flush()

    @property
    def unwritten(self) -> bool:
        """Whether `write` would find something."""
        return self._spool.unwritten

    def write(self) -> None:
        """Write payloads that no `sync` has come to yet: it will find less to do. May run beside it."""
        self._spool.write()

    def release(self) -> None:
        """Let out what follows from the sealed events, which are durable now. May decide something at once."""
        if self._sealed is None:
            self.seal()
        commit, self._sealed = self._sealed, None
        assert commit is not None
        for peer, (sequence, session) in commit.durable.items():
            self._bus.durable(peer, sequence, session)
        for reply in commit.replies:
            reply()
        # In a deterministic run a message is one composition: what leaves together must not depend on the timing.
        together = commit.effects if self._recipe.run.deterministic else merge_leases(commit.effects)
        for effect in together:
            self._do(effect)
        if self._snapshot_due and not self.unsynced:
            self.save_snapshot()

    @property
    def _snapshot_due(self) -> bool:
        return self._journal.since_snapshot() >= self._recipe.journal.snapshot_every

    def save_snapshot(self) -> None:
        """Bound the next term's replay."""
        self._journal.save_snapshot(self._core.snapshot())

    def _step(self, event: AnyEvent) -> None:
        outcome = self._core.step(event)
        self._journal.append(self._core.state.term, event, outcome.facts)
        self._decided.effects += outcome.effects

    def _now(self) -> float:
        """Seconds since the epoch as of the term's beginning: a clock that is set must not move deadlines."""
        wall, steady = self._began
        return max(wall + self._clock.steady() - steady, self._core.state.now)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def take(self, incoming: Incoming) -> None:
        """Take a message off the bus."""
        envelope = incoming.envelope
        now = self._clock.steady()
        if incoming.session:
            self._liveness.hear((envelope.sender, envelope.incarnation, envelope.rank), now)
        match envelope.body:
            case Register():
                self._take_register(incoming, envelope.body)
            case Heartbeat(state=state, progress=progress, seconds=seconds):
                self._liveness.note((envelope.sender, envelope.incarnation, envelope.rank), state, progress, seconds)
                self._bus.reply(incoming, HeartbeatReply())
            case StoreSet():
                self._rendezvous.set(envelope.body, lambda answer: self._bus.reply(incoming, answer))
            case StoreGet():
                self._rendezvous.get(envelope.body, now, lambda answer: self._bus.reply(incoming, answer))
            case StatusRequest():
                counters = dict(sorted(self._bus.counters.items()))
                run = status(self._core.state, self._recipe, self._liveness, counters, now)
                self._bus.reply(incoming, Status(run))
            case body if isinstance(body, Request):
                self._requests.take(incoming, body)
            case Refused():
                log.warning("a replica refused a message", who=envelope.sender, fault=envelope.body.fault)
            case body if body.reliable:
                self._take_report(incoming)
            case _:
                advice = "see docs/protocol.md for who sends what"
                name = type(envelope.body).__name__
                self._bus.reply(incoming, Refused("role", "a message for the controller", name, advice))

    def _take_register(self, incoming: Incoming, register: Register) -> None:
        refusal = self._core.judge_registration(register)
        if refusal is not None:
            log.warning("registration refused", who=register.replica, fault=refusal.fault, got=refusal.got)
            self._bus.counters[refusal.fault] += 1
            self._bus.reply(incoming, refusal)
            return
        self._registers[register.replica, register.rank, register.nonce] = incoming
        self._step(ReplicaRegistered(at=self._now(), register=register))

    def _take_report(self, incoming: Incoming) -> None:
        """A reliable message of a replica: judge it, spool its payload, journal it; it is acknowledged either way."""
        envelope = incoming.envelope
        message = envelope.body
        self._decided.durable[incoming.peer] = (envelope.sequence, incoming.session)
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
            who=incoming.envelope.sender,
            message=type(incoming.envelope.body).__name__,
            fault=refusal.fault,
            expected=refusal.expected,
            got=refusal.got,
        )
        self._answer(incoming, refusal)

    def _answer(self, incoming: Incoming, message: AnyMessage) -> None:
        """Reply once what it speaks of is durable."""
        self._decided.replies.append(lambda: self._bus.reply(incoming, message))

    # --- what time brings ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look at silence, deadlines and waits."""
        now = self._clock.steady()
        self._rendezvous.expire(now)
        for word in self._minter.poll():
            self._take_mint(word)
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

    def _take_mint(self, word: Minted | MintFailed) -> None:
        at, epoch = self._now(), word.epoch
        if isinstance(word, MintFailed):
            log.warning("a mesh has no unique id", epoch=epoch, why=word.cause)
            self._step(MeshIdFailed(at=at, epoch=epoch, cause=word.cause))
        elif word.version != self._minting.get(epoch, word.version):
            cause = (
                f"its members have NCCL {self._minting[epoch]}, the controller has {word.version}: set "
                "weights.nccl_library to one file for all services"
            )
            self._step(MeshIdFailed(at=at, epoch=epoch, cause=cause))
        else:
            first, *further = word.ids
            self._step(MeshIdMinted(at=at, epoch=epoch, unique_id=first, further_ids=further))

    # --- effects ------------------------------------------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Welcome():
                self._welcome(effect)
            case Part():
                self._part(effect)
            case MintMeshId(epoch=epoch, backend="nccl"):
                self._minting[epoch] = effect.nccl
                self._minter.mint(epoch, effect.count)
            case MintMeshId(epoch=epoch):
                self._rendezvous.open(epoch)
                self._step(MeshIdMinted(at=self._now(), epoch=epoch, unique_id=secrets.token_bytes(16)))
            case ForgetMesh(epoch=epoch):
                self._rendezvous.close(epoch)
                self._end_mint(epoch)
            case EndMint(epoch=epoch):
                self._end_mint(epoch)
            case RecordMetrics(line=line):
                self._outputs.metrics(line | self._liveness.take_spent() | {"controller_lag": self._take_lag()})
            case RecordEvaluation(result=result):
                self._outputs.evaluation(result)
                share = f"{result['correct']:g}/{result['n']}"
                log.info(
                    "evaluated",
                    suite=result["suite"],
                    version=result["version"],
                    accuracy=round(result["accuracy"], 4),
                    correct=share,
                )
            case FreeSpool(segment=segment):
                self._spool.free_below(segment)
            case EndRun():
                self.ending = effect

    def _end_mint(self, epoch: int) -> None:
        if self._minting.pop(epoch, None) is not None:
            self._minter.forget(epoch)

    def close(self) -> None:
        """This term is over: leave nothing running."""
        self._minter.close()

    def note_lag(self, seconds: float) -> None:
        """The loop around this shell came `seconds` late to something; the worst goes into the next metrics line."""
        self._lag = max(self._lag, seconds)

    def _take_lag(self) -> float:
        lag, self._lag = self._lag, 0.0
        return round(lag, 6)

    def _send(self, effect: Send) -> None:
        peer = self._peers.get((effect.replica, effect.rank))
        if peer is None:
            return  # it lost its session in this very turn: what is outstanding is derived again when it is back
        frames: list[bytes | memoryview] = []
        for place in effect.payload:
            frames += self._spool.read(place)
        try:
            self._bus.send(peer[1], effect.message, frames)
        except WireFault as fault:
            if fault.fault != "too_large":
                raise
            raise MessageTooLarge(type(effect.message).__name__, fault) from fault

    def _welcome(self, effect: Welcome) -> None:
        incoming = self._registers.pop((effect.replica, effect.rank, effect.nonce), None)
        if incoming is None:
            return
        self._peers[effect.replica, effect.rank] = (effect.incarnation, incoming.peer)
        self._liveness.hear((effect.replica, effect.incarnation, effect.rank), self._clock.steady())
        self._bus.open_session(incoming.peer, effect.replica, effect.rank, effect.incarnation)
        self._bus.reply(incoming, Registered(effect.incarnation, [LeaseRef(*ref) for ref in effect.leases]))
        log.info("replica registered", who=effect.replica, rank=effect.rank, incarnation=effect.incarnation)

    def _part(self, effect: Part) -> None:
        self._liveness.forget(effect.replica, effect.incarnation)
        for key, (incarnation, peer) in list(self._peers.items()):
            if key[0] == effect.replica and incarnation == effect.incarnation:
                self._bus.close_session(peer)
                del self._peers[key]
        log.info("replica gone", who=effect.replica, incarnation=effect.incarnation)
