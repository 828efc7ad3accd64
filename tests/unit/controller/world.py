"""A small world for tests of the core: model replicas that answer orders as docs/protocol.md says, and a virtual clock.

Every event is stepped, and after each one the world proves that a twin which replays the journal has the same facts and
the same snapshot, and that the books balance.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from services.controller.audit import Audit, audit_run
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
    Spooled,
    StopRequested,
    TermBegan,
)
from services.controller.core.outcome import (
    AnyFact,
    Effect,
    EndRun,
    MintMeshId,
    RecordEvaluation,
    RecordMetrics,
    Send,
    Welcome,
)
from services.controller.journal import Journal
from shared.config import Recipe
from shared.messages import (
    AbortStep,
    AnyMessage,
    ArrayHeader,
    CheckpointFailed,
    CheckpointSaved,
    CheckState,
    CommitStep,
    DatasetIdentity,
    Device,
    FormMesh,
    GradientsReady,
    Grant,
    GroupReport,
    Lease,
    LeaseRef,
    LeaseReturned,
    LoadState,
    MeshFormed,
    Partial,
    Position,
    ReceiveState,
    ReceiveWeights,
    Refused,
    Register,
    RevokeLease,
    SaveCheckpoint,
    SendState,
    SendWeights,
    StateDigest,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    TrainStep,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)
from tests.unit.controller.disks import MemoryDisk

RECIPE = {
    "run": {"seed": 7},
    "model": {"build": {}},
    "data": {
        "train": {"kind": "reasoning_gym", "task": "chain_sum"},
        "heldout": {"kind": "reasoning_gym", "task": "chain_sum", "seed": 1},
    },
    "train": {"dataset": "train", "batches": 3, "batch_size": 4, "lr": 1e-4, "samples": 2, "max_staleness": 1},
}


def recipe(**tables: dict[str, object] | None) -> Recipe:
    """A small RL recipe; keyword tables are merged over it, None removes one."""
    tree = {name: dict(table) for name, table in RECIPE.items()}
    for name, table in tables.items():
        if table is None:
            tree.pop(name, None)
        else:
            tree[name] = {**tree.get(name, {}), **table}
    return Recipe.model_validate(tree)


DATASETS = [DatasetIdentity("train", 1000, "aa"), DatasetIdentity("heldout", 20, "bb")]
Key = tuple[int, int]


def differing_rewards(group: int, samples: int) -> list[float]:
    """Rewards that the equal-reward filter keeps."""
    return [float(i % 2) for i in range(samples)]


@dataclass(eq=False)
class Model:
    """A replica that obeys.

    `holds` are its weights. `silent` names messages that it takes but doesn't answer. A `slow` one keeps its leases in
    `working`, with the version that began each, until `World.finish`.
    """

    world: World
    name: str
    role: str
    nonce: int
    incarnation: int = 0
    alive: bool = True
    holds: Position | None = None
    in_hand: TrainStep | None = None
    applied: tuple[CommitStep, StepApplied] | None = None
    staged: Position | None = None
    silent: set[type] = field(default_factory=set)
    slow: bool = False
    working: dict[Key, tuple[Grant, int]] = field(default_factory=dict)
    answered: set[Key] = field(default_factory=set)
    seen: list[AnyMessage] = field(default_factory=list)
    rewards: Callable[[int, int], list[float]] = differing_rewards
    finite: Callable[[TrainStep], bool] = lambda step: True
    disk_full: Callable[[], bool] = lambda: False
    digest: str = "same"
    wrong: str = ""
    datasets: list[DatasetIdentity] = field(default_factory=lambda: list(DATASETS))
    ranks: int = 1
    devices: dict[int, Device] = field(default_factory=dict)

    def register(self, rank: int = 0) -> Register:
        """The introduction of a rank: leases in hand, and those whose report is still on its way."""
        unsent = self.world.under_way(self, GroupReport, LeaseReturned)
        keys = {*self.working, *((message.group, message.attempt) for message in unsent)}
        return Register(
            role=self.role,  # type: ignore[arg-type]
            replica=self.name,
            rank=rank,
            world=self.ranks,
            nonce=self.nonce,
            pid=10 * self.nonce + rank,
            host="here",
            holds=self.holds if rank == 0 else None,
            leases=[LeaseRef(*key) for key in sorted(keys)] if rank == 0 else [],
            datasets=self.datasets,
            device=self.devices.get(rank),
        )

    def take(self, message: AnyMessage) -> list[ReplicaMessage]:
        """What it answers."""
        self.seen.append(message)
        if type(message) in self.silent:
            return []
        match message:
            case LoadState(source="peer"):
                self.holds, self.in_hand = None, None
                return [StateLoaded(None)]
            case LoadState(position=position):
                if self.role == "policy":
                    self.holds, self.in_hand = position, None
                return [StateLoaded(position)]
            case Lease(grants=grants):
                return [answer for grant in grants for answer in self._begin(grant)]
            case RevokeLease(leases=leases):
                for ref in leases:
                    self.working.pop((ref.group, ref.attempt), None)
            case SendState(epoch=epoch, position=position):
                assert self.holds == position, f"{self.name} is to send {position}, it holds {self.holds}"
                return [StateSent(epoch, position, f"state {position.step}", 10, 0.1)]
            case ReceiveState(epoch=epoch, position=position):
                self.holds = position
                return [StateReceived(epoch, position, f"{self.wrong}state {position.step}", 0.1)]
            case CheckState(position=position):
                return [StateDigest(position, f"{self.wrong}state {position.step}")]
            case TrainStep(position=position):
                self._adopt(position)
                assert position == self.holds, f"the step starts from {position}, {self.name} holds {self.holds}"
                self.in_hand = message
                return [
                    GradientsReady(message.step, message.attempt, position.lineage, self.finite(message), {"loss": 1.0})
                ]
            case AbortStep(attempt=attempt):
                if self.in_hand is not None and self.in_hand.attempt == attempt:
                    self.in_hand = None
            case CommitStep():
                return [self._apply(message)]
            case SaveCheckpoint(position=position):
                self._adopt(position)
                if position != self.holds or self.disk_full():
                    return [CheckpointFailed(position, f"{self.name} holds {self.holds}, or its disk is full")]
                return [CheckpointSaved(position, f"checkpoints/{position.step}", "d")]
            case FormMesh(identity=identity):
                return [MeshFormed(identity.epoch)]
            case SendWeights(epoch=epoch, position=position):
                self._adopt(position)
                if position not in (self.holds, self.staged):
                    return [WeightsFailed(epoch, position, f"{self.name} holds {self.holds}")]
                self.staged = position
                return [WeightsSent(epoch, position, "same", 10, 0.1)]
            case ReceiveWeights(epoch=epoch, position=position):
                self.holds = position
                return [WeightsLoaded(epoch, position, self.digest, 0.1)]
        return []

    def _begin(self, grant: Grant) -> list[ReplicaMessage]:
        key = (grant.group, grant.attempt)
        if key in self.answered or key in self.working:
            return []
        if grant.purpose == "sft":
            version = 0
        else:
            held = self.holds
            if held is None or held.lineage != grant.lineage or held.version < grant.version:
                self.answered.add(key)
                return [LeaseReturned(*key, grant.lineage, "handed_back", f"{self.name} holds {held}")]
            version = held.version
        self.working[key] = (grant, version)
        return [] if self.slow else [self.report(key)]

    def report(self, key: Key) -> GroupReport:
        """End the work on a lease."""
        grant, oldest = self.working.pop(key)
        self.answered.add(key)
        if grant.partial is not None:
            oldest = min(oldest, grant.partial.oldest)
        newest = self.holds.version if self.holds is not None and grant.purpose != "sft" else 0
        return GroupReport(
            group=grant.group,
            attempt=grant.attempt,
            lineage=grant.lineage,
            rewards=self.rewards(grant.group, grant.samples),
            parts={},
            prompt_length=3,
            lengths=[2] * grant.samples,
            truncated=[False] * grant.samples,
            oldest=oldest,
            newest=newest,
            seconds=0.1,
            arrays=[] if grant.purpose == "eval" else [ArrayHeader("tokens", "int32", [2 * grant.samples])],
        )

    def hand_over(self, key: Key) -> LeaseReturned:
        """Leave a lease part-way: each sample has a token more than it came with."""
        grant, oldest = self.working.pop(key)
        self.answered.add(key)
        before = grant.partial.lengths if grant.partial is not None else [0] * grant.samples
        lengths = [count + 1 for count in before]
        if grant.partial is not None:
            oldest = min(oldest, grant.partial.oldest)
        assert self.holds is not None
        partial = Partial(lengths, oldest, self.holds.version, [ArrayHeader("tokens", "int32", [sum(lengths)])])
        return LeaseReturned(*key, grant.lineage, "handed_back", "it leaves", partial)

    def _apply(self, commit: CommitStep) -> StepApplied:
        if self.applied is not None and self.applied[0] == commit:
            return self.applied[1]
        step = self.in_hand
        assert step is not None and (step.step, step.attempt) == (commit.step, commit.attempt), "nothing to commit"
        assert self.holds is not None
        last = step.index + 1 == step.steps_in_batch
        self.holds = Position(self.holds.lineage, self.holds.version + int(last), step.step + 1)
        self.in_hand = None
        self.applied = (commit, StepApplied(step.step, self.holds, {}))
        return self.applied[1]

    def _adopt(self, position: Position) -> None:
        """The same weights under a newer version: the rest of a batch was struck off."""
        held = self.holds
        if held is not None and (held.lineage, held.step) == (position.lineage, position.step):
            self.holds = max(held, position, key=lambda p: p.version)

    def told(self, kind: type) -> list[AnyMessage]:
        """The orders of a kind that it was given."""
        return [message for message in self.seen if isinstance(message, kind)]


class World:
    """The core, the models, and a queue of what is under way between them."""

    def __init__(self, recipe: Recipe, *, check_replay: bool = True) -> None:
        self.recipe = recipe
        self.core = Core(recipe)
        self.now = 1000.0
        self.models: dict[str, Model] = {}
        self.everyone: list[Model] = []
        self.events: list[AnyEvent] = []
        self.records: list[tuple[int, AnyEvent, list[AnyFact]]] = []
        self.facts: list[AnyFact] = []
        self.effects: list[Effect] = []
        self.metrics: list[dict[str, object]] = []
        self.evaluations: list[dict[str, object]] = []
        self.ended: EndRun | None = None
        self.refused: list[Refused] = []
        self.repeated = 0
        self._queue: deque[tuple[Model, ReplicaMessage]] = deque()
        self._nonces = 0
        self._spooled = 0
        self.handed: dict[int, tuple[int, Partial]] = {}
        self._check_replay = check_replay
        self._shadow = Core(recipe)
        self.step(RunBegan(at=self.now, run="test", recipe=""))
        self.step(TermBegan(at=self.now, term=1))

    # -- events ---

    def step(self, event: AnyEvent) -> None:
        """Step the core and carry out its effects; a replayed twin must agree after every single event."""
        outcome = self.core.step(event)
        self.events.append(event)
        self.records.append((self.core.state.term, event, outcome.facts))
        self.facts += outcome.facts
        self.effects += outcome.effects
        if self._check_replay:
            stored = msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=AnyEvent)
            replayed = self._shadow.step(stored)
            assert replayed.facts == outcome.facts
            assert self._shadow.snapshot() == self.core.snapshot()
            self._shadow = Core.restore(self.recipe, self._shadow.snapshot())
        self.check_books()
        for effect in outcome.effects:
            self._do(effect)

    def join(
        self,
        name: str,
        role: str,
        *,
        holds: Position | None = None,
        slow: bool = False,
        silent: set[type] | None = None,
        **named: object,
    ) -> Model:
        """A new process registers, as rank 0 of its replica."""
        self._nonces += 1
        model = Model(self, name, role, self._nonces, holds=holds, slow=slow, silent=silent or set(), **named)  # type: ignore[arg-type]
        if name in self.models:
            self.models[name].alive = False
        self.models[name] = model
        self.everyone.append(model)
        self.register(model)
        return model

    def register(self, model: Model, rank: int = 0) -> Refused | None:
        """Register a rank (again), with the same nonce."""
        refusal = self.core.judge_registration(model.register(rank))
        if refusal is None:
            self.step(ReplicaRegistered(at=self.now, register=model.register(rank)))
        else:
            self.refused.append(refusal)
        return refusal

    def lose(self, name: str, *, dead: bool = True) -> None:
        """The shell notices that a process is gone; one that isn't `dead` lives on, and keeps what it has to say."""
        model = self.models[name]
        if dead:
            model.alive = False
            self._queue = deque(entry for entry in self._queue if entry[0] is not model)
        self.step(ReplicaLost(at=self.now, replica=name, incarnation=model.incarnation, cause="test"))

    def replace(self, name: str, **named: object) -> Model:
        """A process is killed, and a new one takes its name."""
        role = self.models[name].role
        self.lose(name)
        return self.join(name, role, **named)  # type: ignore[arg-type]

    def say(self, model: Model, message: ReplicaMessage) -> str:
        """A replica's message arrives: "fresh", "duplicate", or the fault it is refused with."""
        verdict = self.core.judge(model.name, model.incarnation, message)
        if isinstance(verdict, Refused):
            self.refused.append(verdict)
            return verdict.fault
        if verdict == "duplicate":
            self.repeated += 1
            return verdict
        place = None
        partial = message.partial if isinstance(message, LeaseReturned) else None
        if (isinstance(message, GroupReport) and message.arrays) or partial is not None:
            self._spooled += 1
            place = Spooled(self._spooled, 0, [8], 1)
        if isinstance(message, LeaseReturned) and partial is not None:
            self.handed[self._spooled] = (message.group, partial)
        self.step(
            MessageReceived(
                at=self.now, replica=model.name, incarnation=model.incarnation, rank=0, body=message, spooled=place
            )
        )
        return verdict

    def send(self, model: Model, message: ReplicaMessage) -> None:
        """Put a message on its way."""
        self._queue.append((model, message))

    def finish(self, model: Model, key: Key | None = None) -> None:
        """A slow model ends its work on a lease (the oldest one), and its report is on its way."""
        self.send(model, model.report(key if key is not None else next(iter(model.working))))

    def change(self, changes: dict[str, object], at_step: int | None = None) -> None:
        """A person changes hyper-parameters."""
        self.step(HyperparametersRequested(at=self.now, changes=changes, at_step=at_step))  # type: ignore[arg-type]

    def stop(self, cause: str = "enough") -> None:
        """A person ends the run."""
        self.step(StopRequested(at=self.now, cause=cause))

    def crash(self, *, rejoin: bool = True) -> None:
        """The controller dies and a new term replays the journal. The models live on, and register again.

        What they had to say is still theirs to say: it was not acknowledged.
        """
        core = Core.restore(self.recipe, self.core.snapshot())
        if self._check_replay:
            core = Core(self.recipe)
            for event in self.events:
                core.step(event)
            assert core.snapshot() == self.core.snapshot()
        self.core = core
        self.ended = None
        self.step(TermBegan(at=self.now, term=core.state.term + 1))
        for model in [model for model in self.models.values() if model.alive and rejoin]:
            self.register(model)

    def deliver(
        self,
        limit: int = 1_000_000,
        until: Callable[[], bool] | None = None,
        pick: Callable[[list[Model]], Model] | None = None,
    ) -> int:
        """Deliver what is under way, one message after the other, until nothing is (or `until` holds).

        `pick` chooses whose oldest message is next. How many were delivered.
        """
        for count in range(limit):
            if not self._queue or (until is not None and until()):
                return count
            chosen = 0
            if pick is not None:
                speaker = pick(list(dict.fromkeys(model for model, _ in self._queue)))
                chosen = next(i for i, (model, _) in enumerate(self._queue) if model is speaker)
            model, message = self._queue[chosen]
            del self._queue[chosen]
            self.now += 0.01
            self.say(model, message)
        return limit

    def run(self, until: Callable[[], bool]) -> None:
        """Deliver until something holds; it must come to hold."""
        self.deliver(until=until)
        assert until(), "never came to hold"

    def pass_time(self, seconds: float) -> None:
        """Let the clock run, waking the core at its deadlines."""
        end = self.now + seconds
        while self.core.next_deadline() <= end and self.ended is None:
            self.now = max(self.now, self.core.next_deadline())
            self.step(DeadlinePassed(at=self.now))
            self.deliver()
        self.now = max(self.now, end)

    # -- looking ---

    def of(self, kind: type) -> list[AnyFact]:
        """The facts of a kind so far."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def state_of(self, name: str) -> str:
        """A replica's state, as the core sees it."""
        return self.core.state.fleet.replicas[name].state

    def under_way(self, model: Model, *kinds: type) -> list[ReplicaMessage]:
        """What a model has said (of these kinds) that has not arrived."""
        return [m for sender, m in self._queue if sender is model and (not kinds or isinstance(m, kinds))]

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._queue

    def check_books(self) -> None:
        """Per lineage: ids issued = consumed + discarded + open, and only the lineage in force has open ones."""
        state = self.core.state
        for lineage, book in state.ledger.books.items():
            still = sum(group.state != "consumed" for group in state.ledger.groups.values())
            expected = still if lineage == state.lineage else 0
            assert book.issued == book.consumed + sum(book.discarded.values()) + expected, (lineage, book, expected)
            assert book.settled <= book.consumed
        for name in ("queued", "leased", "reported", "assigned", "consumed"):
            assert [g.id for g in state.ledger.having(name)] == [  # type: ignore[arg-type]
                g.id for g in state.ledger.groups.values() if g.state == name
            ]

    def audit(self, folder: Path, records: list[tuple[int, AnyEvent, list[AnyFact]]] | None = None) -> Audit:
        """What the audit says of this run's journal, written to `folder`."""
        disk = MemoryDisk()
        journal = Journal(disk, 1 << 20)
        for record in records if records is not None else self.records:
            journal.append(*record)
        journal.sync()
        disk.dump(folder / "journal")
        return audit_run(folder)

    # -- effects ---

    def _do(self, effect: Effect) -> None:
        match effect:
            case Welcome():
                model = self.models[effect.replica]
                model.incarnation = effect.incarnation
                if effect.rank != 0:
                    return
                for key in [key for key in model.working if key not in effect.leases]:
                    del model.working[key]
            case Send():
                model = self.models[effect.replica]
                assert effect.rank == 0, (
                    f"{effect.message} is for rank {effect.rank}, which leases and votes for nobody"
                )
                if isinstance(effect.message, TrainStep):
                    assert len(effect.payload) == len(effect.message.groups)
                elif isinstance(effect.message, Lease):
                    begun = [(g.group, g.partial) for g in effect.message.grants if g.partial is not None]
                    assert [self.handed[place.segment] for place in effect.payload] == begun
                for answer in model.take(effect.message):
                    self.send(model, answer)
            case MintMeshId():
                first, *further = (b"id %d" % effect.epoch + b"/%d" % rank * (rank > 0) for rank in range(effect.count))
                self.step(MeshIdMinted(at=self.now, epoch=effect.epoch, unique_id=first, further_ids=further))
            case RecordMetrics():
                self.metrics.append(effect.line)
            case RecordEvaluation():
                self.evaluations.append(effect.result)
            case EndRun():
                self.ended = effect


def small_world(*, check_replay: bool = True, rollouts: int = 1, **tables: dict[str, object] | None) -> World:
    """A world of some rollouts and one policy that have registered, in this order; nothing is delivered yet."""
    world = World(recipe(**tables), check_replay=check_replay)
    for number in range(rollouts):
        world.join(f"rollout-{number}", "rollout")
    world.join("policy-0", "policy")
    return world


def ready_at_once(world: World) -> None:
    """Deliver until every rollout waits for the source's digest only, then let it tell. `weights.fanout` must do."""
    policy = world.models["policy-0"]
    policy.silent = {SendWeights}
    world.deliver()
    policy.silent = set()
    for order in policy.told(SendWeights):
        for answer in policy.take(order):
            world.send(policy, answer)
    world.deliver()


def picker(seed: int) -> Callable[[list[Model]], Model]:
    """A choice of whose message comes next, the same for the same seed."""
    chance = random.Random(seed)
    return lambda models: models[chance.randrange(len(models))]
