"""A small world for tests of the core: model replicas that answer orders as docs/protocol.md says, and a virtual clock.

Every event is stepped, and after each one the world proves that replaying the journal so far gives the same state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from services.controller.core.core import Core
from services.controller.core.events import (
    AnyEvent,
    DeadlinePassed,
    MeshIdMinted,
    MessageReceived,
    ReplicaLost,
    ReplicaMessage,
    ReplicaRegistered,
    RunBegan,
    Spooled,
    TermBegan,
)
from services.controller.core.outcome import AnyFact, Effect, EndRun, MintMeshId, RecordMetrics, Send, Welcome
from shared.config import Recipe
from shared.messages import (
    AnyMessage,
    ArrayHeader,
    CheckpointSaved,
    CommitStep,
    DatasetIdentity,
    FormMesh,
    GradientsReady,
    GroupReport,
    Lease,
    LoadState,
    MeshFormed,
    Position,
    ReceiveWeights,
    Refused,
    Register,
    RevokeLease,
    SaveCheckpoint,
    SendWeights,
    Shutdown,
    StateLoaded,
    StepApplied,
    TrainStep,
    WeightsLoaded,
    WeightsSent,
)

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


@dataclass
class Model:
    """A replica that obeys. `holds` are the weights; `silent` names messages that it takes but doesn't answer."""

    world: World
    name: str
    role: str
    nonce: int
    incarnation: int = 0
    holds: Position | None = None
    gradients: tuple[int, int] | None = None
    silent: set[type] = field(default_factory=set)
    leases: dict[int, object] = field(default_factory=dict)
    held_back: list[GroupReport] = field(default_factory=list)
    seen: list[AnyMessage] = field(default_factory=list)
    rewards: Callable[[int], list[float]] | None = None
    finite: bool = True
    digest: str = "same"

    def register(self) -> Register:
        """Its introduction."""
        return Register(
            role=self.role,  # type: ignore[arg-type]
            replica=self.name,
            rank=0,
            world=1,
            nonce=self.nonce,
            pid=self.nonce,
            host="here",
            holds=self.holds,
            leases=[],
            datasets=DATASETS,
        )

    def take(self, message: AnyMessage) -> list[ReplicaMessage]:
        """What it answers."""
        self.seen.append(message)
        if type(message) in self.silent:
            return []
        match message:
            case LoadState(position=position):
                if self.role == "policy":
                    self.holds = position
                return [StateLoaded(position)]
            case Lease(grants=grants):
                self.leases |= {grant.group: grant for grant in grants}
                return [self.report(grant) for grant in grants]
            case RevokeLease(leases=leases):
                for ref in leases:
                    self.leases.pop(ref.group, None)
            case TrainStep():
                self.gradients = (message.step, message.attempt)
                return [GradientsReady(message.step, message.attempt, message.position.lineage, self.finite, {"loss": 1.0})]
            case CommitStep(step=step):
                assert self.holds is not None
                committed = self.world.core.state.lineages.committed
                self.holds = Position(self.holds.lineage, committed.version, step + 1)
                return [StepApplied(step, self.holds, {})]
            case SaveCheckpoint(position=position):
                return [CheckpointSaved(position, f"checkpoints/{position.step}", "d")]
            case FormMesh(identity=identity):
                return [MeshFormed(identity.epoch)]
            case SendWeights(epoch=epoch, position=position):
                assert position == self.holds, (position, self.holds)
                return [WeightsSent(epoch, position, "same", 10, 0.1)]
            case ReceiveWeights(epoch=epoch, position=position):
                self.holds = position
                return [WeightsLoaded(epoch, position, self.digest, 0.1)]
        return []

    def report(self, grant: object) -> GroupReport:
        """A group's report, with rewards that differ unless told otherwise."""
        rewards = self.rewards(grant.group) if self.rewards else [float(i % 2) for i in range(grant.samples)]  # type: ignore[attr-defined]
        version = self.holds.version if self.holds and grant.purpose != "sft" else 0  # type: ignore[attr-defined]
        arrays = [] if grant.purpose == "eval" else [ArrayHeader("tokens", "int32", [2 * grant.samples])]  # type: ignore[attr-defined]
        return GroupReport(
            group=grant.group,  # type: ignore[attr-defined]
            attempt=grant.attempt,  # type: ignore[attr-defined]
            lineage=grant.lineage,  # type: ignore[attr-defined]
            rewards=rewards[: grant.samples],  # type: ignore[attr-defined]
            parts={},
            prompt_length=3,
            lengths=[2] * grant.samples,  # type: ignore[attr-defined]
            truncated=[False] * grant.samples,  # type: ignore[attr-defined]
            oldest=version,
            newest=version,
            seconds=0.1,
            arrays=arrays,
        )


class World:
    """The core, the models, and a queue of what is under way between them."""

    def __init__(self, recipe: Recipe, *, check_replay: bool = True) -> None:
        self.recipe = recipe
        self.core = Core(recipe)
        self.now = 1000.0
        self.models: dict[str, Model] = {}
        self.events: list[AnyEvent] = []
        self.facts: list[AnyFact] = []
        self.metrics: list[dict[str, object]] = []
        self.ended: EndRun | None = None
        self.refused: list[Refused] = []
        self._queue: deque[tuple[str, int, ReplicaMessage]] = deque()
        self._nonces = 0
        self._spooled = 0
        self._check_replay = check_replay
        self._shadow = Core(recipe)
        self.step(RunBegan(at=self.now, run="test", recipe=""))
        self.step(TermBegan(at=self.now, term=1))

    # -- events ---

    def step(self, event: AnyEvent) -> None:
        """Step the core and carry out its effects; a replayed twin must agree after every single event."""
        outcome = self.core.step(event)
        self.events.append(event)
        self.facts += outcome.facts
        if self._check_replay:
            stored = msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=AnyEvent)
            replayed = self._shadow.step(stored)
            assert replayed.facts == outcome.facts
            assert self._shadow.snapshot() == self.core.snapshot()
            self._shadow = Core.restore(self.recipe, self._shadow.snapshot())
        for effect in outcome.effects:
            self._do(effect)

    def join(self, name: str, role: str, *, holds: Position | None = None) -> Model:
        """A new process registers."""
        self._nonces += 1
        model = Model(self, name, role, self._nonces, holds=holds)
        self.models[name] = model
        self.register(model)
        return model

    def register(self, model: Model) -> None:
        """Register (again), with the same nonce."""
        refusal = self.core.judge_registration(model.register())
        if refusal is not None:
            self.refused.append(refusal)
            return
        self.step(ReplicaRegistered(at=self.now, register=model.register()))

    def lose(self, name: str) -> None:
        """The shell notices that a process is gone."""
        model = self.models[name]
        self._queue = deque(entry for entry in self._queue if entry[0] != name)
        self.step(ReplicaLost(at=self.now, replica=name, incarnation=model.incarnation, cause="test"))

    def say(self, model: Model, message: ReplicaMessage) -> str:
        """A replica's message arrives: "fresh", "duplicate", or the fault it is refused with."""
        verdict = self.core.judge(model.name, model.incarnation, message)
        if isinstance(verdict, Refused):
            self.refused.append(verdict)
            return verdict.fault
        if verdict == "fresh":
            place = None
            if isinstance(message, GroupReport) and message.arrays:
                self._spooled += 1
                place = Spooled(self._spooled, 0, [8], 1)
            self.step(
                MessageReceived(
                    at=self.now, replica=model.name, incarnation=model.incarnation, rank=0, body=message, spooled=place
                )
            )
        return verdict

    def crash(self) -> None:
        """The controller dies and a new term replays the journal; what was under way is lost, the models are not."""
        core = Core(self.recipe)
        for event in self.events:
            core.step(event)
        assert core.snapshot() == self.core.snapshot()
        self.core = core
        self._queue.clear()
        self.ended = None
        self.step(TermBegan(at=self.now, term=core.state.term + 1))

    def deliver(self, limit: int = 1_000_000, until: Callable[[], bool] | None = None) -> None:
        """Deliver what is under way, one message after the other, until nothing is (or `until` holds)."""
        for _ in range(limit):
            if not self._queue or (until is not None and until()):
                return
            name, nonce, message = self._queue.popleft()
            model = self.models.get(name)
            if model is not None and model.nonce == nonce:
                self.now += 0.01
                self.say(model, message)

    def pass_time(self, seconds: float) -> None:
        """Let the clock run, waking the core at its deadlines."""
        end = self.now + seconds
        while self.core.next_deadline() <= end and self.ended is None:
            self.now = max(self.now, self.core.next_deadline())
            self.step(DeadlinePassed(at=self.now))
            self.deliver()
        self.now = max(self.now, end)

    def of(self, kind: type) -> list[AnyFact]:
        """The facts of a kind so far."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    # -- effects ---

    def _do(self, effect: Effect) -> None:
        match effect:
            case Welcome():
                self.models[effect.replica].incarnation = effect.incarnation
            case Send():
                model = self.models[effect.replica]
                if isinstance(effect.message, Shutdown):
                    model.seen.append(effect.message)
                    return
                for answer in model.take(effect.message):
                    self._queue.append((model.name, model.nonce, answer))
            case MintMeshId():
                self.step(MeshIdMinted(at=self.now, epoch=effect.epoch, unique_id=b"id"))
            case RecordMetrics():
                self.metrics.append(effect.line)
            case EndRun():
                self.ended = effect
