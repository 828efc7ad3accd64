"""A model of the policy service: one order after the other, the trainer's state machine, beside it a publisher and a
checkpoint that is written, and what it sends to its peers.

Its weights are a chain (see payload.py). What the real trainer would refuse with an error is a violation here: the
controller must never give such an order. Handling takes virtual time; a process that dies on the way has done nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shared.bus.wire import Frames
from shared.messages import (
    AbortStep,
    AnyMessage,
    CheckpointFailed,
    CheckpointSaved,
    CheckState,
    CommitStep,
    Drain,
    FormMesh,
    GradientsReady,
    GroupReport,
    Lease,
    LeaseRef,
    Leaving,
    LoadState,
    Position,
    ReceiveState,
    ReplicaFailed,
    RevokeMesh,
    SaveCheckpoint,
    SendState,
    SendWeights,
    Shutdown,
    StateDigest,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    TrainStep,
    WeightsFailed,
    WeightsSent,
)
from tests.simulation import payload
from tests.simulation.membership import Membership
from tests.simulation.meshes import Done
from tests.simulation.process import EXIT_DONE, EXIT_FAILED, Rank


class Policy:
    """The service on rank 0."""

    def __init__(self, process: Rank) -> None:
        self.process, self.fleet = process, process.fleet
        self.meshes = Membership(process)
        self.position: Position | None = None
        self.chain = ""
        self._batch_began: Position | None = None
        self._hand: tuple[TrainStep, str, GradientsReady] | None = None
        self._applied: tuple[CommitStep, StepApplied] | None = None
        self._orders: deque[tuple[AnyMessage, Frames]] = deque()
        self._busy = False
        self._staged: tuple[Position, str] | None = None
        self._transfers: dict[tuple[int, Position], WeightsSent | None] = {}
        self._states: dict[int, StateSent | None] = {}
        self._received: StateReceived | None = None
        self._digests: dict[Position, str] = {}
        self._saving: SaveCheckpoint | None = None  # the last one whose snapshot was taken
        self._saved: CheckpointSaved | CheckpointFailed | None = None  # what became of it; None: it is being written
        self._when_written: Callable[[], object] | None = None
        self._chance = process.world.chance(f"service {process.name}")
        process.on_message = self._take
        process.on_exit = self.meshes.close

    @property
    def _speed(self) -> float:
        """How many times as long as usual everything takes, as of now."""
        return self.fleet.plan.speed.get(self.process.replica, 1.0)

    def terminate(self) -> None:
        """SIGTERM: ask for a Drain, and go without one after a while; before there is a model, at once."""
        if self.position is None:
            self.process.leave(EXIT_DONE, "SIGTERM before there was a model")
            return
        self.process.send(Leaving("SIGTERM"))
        patience = self.fleet.plan.recipe.timeouts.exit_s / 2
        self.process.later(patience, lambda: self._obey(Drain("no Drain came")))

    def _obey(self, order: AnyMessage) -> None:
        self._orders.append((order, ()))
        self._next()

    def _take(self) -> None:
        """The inbox thread: meshes at once, all else in turn."""
        process = self.process
        while process.inbox and process.alive:
            message, frames = process.inbox.popleft()
            match message:
                case FormMesh():
                    self.meshes.form(message)
                case RevokeMesh():
                    self.meshes.revoke(message)
                case _:
                    self._orders.append((message, frames))
        self._next()

    def _next(self) -> None:
        if self._busy or not self._orders or not self.process.alive:
            return
        message, frames = self._orders.popleft()
        self._busy = True
        seconds, done = self._handle(message, frames)

        def finish() -> None:
            if done is None or done() is None:
                self._go_on()

        if seconds == 0.0:
            self.process.world.after(0.0, lambda: self.process.when_awake(finish))
        else:
            self.process.later(seconds * self._speed * (0.5 + self._chance.random()), finish)

    def _go_on(self) -> None:
        self._busy = False
        self._next()

    def _wait(self, begin: Callable[[Done], None], then: Done) -> bool:
        """Begin something on a mesh and take no other order before it has ended; True, for `finish` not to go on."""

        def over(what: str | None, cause: str) -> None:
            then(what, cause)
            self._go_on()

        begin(lambda what, cause: self.process.later(0.0, lambda: over(what, cause)))
        return True

    def _handle(self, message: AnyMessage, frames: Frames) -> tuple[float, Callable[[], object] | None]:
        """How long an order takes, and what happens at its end."""
        match message:
            case LoadState():
                return 1.0, lambda: self._load(message)
            case Lease():
                return 0.02 * len(message.grants), lambda: self._answer_leases(message)
            case TrainStep():
                return 0.5, lambda: self._train(message, frames)
            case CommitStep():
                return 0.05, lambda: self._commit(message)
            case AbortStep():
                return 0.0, lambda: self._drop(message)
            case SaveCheckpoint():
                return 0.1, lambda: self._save(message)
            case SendWeights():
                return 0.05, lambda: self._publish(message)
            case SendState():
                return 0.05, lambda: self._send_state(message)
            case ReceiveState():
                return 0.01, lambda: self._receive_state(message)
            case CheckState():
                return 0.02, lambda: self._check_state(message)
            case Shutdown() | Drain():
                return 0.0, lambda: self._leave(message.cause)
        return 0.0, None

    # --- loading and leases -------------------------------------------------------------------------------------------

    def _load(self, message: LoadState) -> None:
        if message.source == "peer":
            self._forget()
            self.process.send(StateLoaded(None))
            return
        if self.position != message.position:
            if message.source == "initial":
                chain = payload.INITIAL
            else:
                found = self.fleet.folder.load(message.path, message.position)
                if found is None and self.fleet.folder.superseded(message.path):
                    self._forget()
                    self.process.send(StateLoaded(None))
                    return
                if found is None:
                    self.fleet.checks.broken(f"{self.process.name} cannot load {message.path} as {message.position}")
                    return
                chain = found
            self._hold(message.position, chain)
            self._batch_began, self._hand, self._applied, self._staged = None, None, None, None
        self.process.standing.hold(message.position)
        self.process.send(StateLoaded(message.position))

    def _answer_leases(self, message: Lease) -> None:
        for grant in message.grants:
            self.process.standing.take_lease(LeaseRef(grant.group, grant.attempt))
            sampled = payload.Sampled(grant.group, grant.attempt, [], payload.digest(grant.dataset, grant.row))
            headers, frames = payload.encode(sampled)
            report = GroupReport(
                group=grant.group,
                attempt=grant.attempt,
                lineage=grant.lineage,
                rewards=[0.0],
                parts={},
                prompt_length=3,
                lengths=[4],
                truncated=[False],
                oldest=0,
                newest=0,
                seconds=0.0,
                arrays=headers,
            )
            self.process.send(report, frames)
            self.process.standing.drop_lease(LeaseRef(grant.group, grant.attempt))

    # --- steps --------------------------------------------------------------------------------------------------------

    def _train(self, step: TrainStep, frames: Frames) -> bool | None:
        if self._hand is not None and _names(self._hand[0]) == _names(step):
            self.process.send(self._hand[2])
            return None
        if self._applied is not None and self._applied[0] == CommitStep(step.step, step.attempt, step.position.lineage):
            self.process.send(self._applied[1])
            return None
        if self.position is None:
            return None  # its state did not arrive
        if step.index == 0:
            self._adopt(step.position)
        if step.position != self.position:
            self._fail(f"step {step.step} starts from {step.position}, it holds {self.position}")
            return None
        if step.index == 0:
            self._batch_began = self.position
        elif self._batch_began is None:
            self._fail(f"step {step.step} is number {step.index} of a batch whose first it has not seen")
            return None
        sampled = [payload.decode(frame) for frame in frames]
        self.fleet.checks.assigned(self.process.name, step, sampled)
        self._hand = None
        own = payload.gradient(self.chain, step, sampled, finite=not self.fleet.votes_nan())
        if step.mesh is None:
            self._vote(step, payload.combine([own]))
            return None
        mesh = step.mesh

        def reduced(total: str | None, cause: str) -> None:
            if total is not None:
                self._vote(step, total)

        return self._wait(lambda done: self.meshes.add_up(mesh, own, payload.combine, done), reduced)

    def _vote(self, step: TrainStep, total: str) -> None:
        finite = payload.finite(total)
        vote = GradientsReady(step.step, step.attempt, step.position.lineage, finite, {"loss": 1.0})
        self._hand = (step, payload.apply(self.chain, step, total), vote)
        self.process.send(vote)

    def _commit(self, commit: CommitStep) -> None:
        if self._applied is not None and self._applied[0] == commit:
            self.process.send(self._applied[1])
            return
        if self._hand is None or _names(self._hand[0]) != (commit.lineage, commit.step, commit.attempt):
            held = _names(self._hand[0]) if self._hand else None
            self._fail(f"commit of {commit}, in hand is {held}")
            return
        step, chain, vote = self._hand
        if not vote.finite:
            self.fleet.checks.broken(f"{self.process.name} was told to commit {commit}, which it voted against")
        assert self.position is not None
        last = step.index == step.steps_in_batch - 1
        held_now = self.position
        self._hand = None
        if last:
            self._batch_began = None
        self._hold(Position(held_now.lineage, held_now.version + int(last), held_now.step + 1), chain)
        self._applied = (commit, StepApplied(commit.step, self.position, {"lr": 0.1}))
        self.process.standing.hold(self.position)
        self.process.send(self._applied[1])

    def _drop(self, message: AbortStep) -> None:
        if self._hand is not None and _names(self._hand[0]) == (message.lineage, message.step, message.attempt):
            self._hand = None

    def _adopt(self, position: Position) -> None:
        held = self.position
        same = held is not None and (held.lineage, held.step) == (position.lineage, position.step)
        if same and held is not None and held.version < position.version:
            self._hold(position, self.chain)
            self._batch_began = None

    # --- peers --------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.position, self.chain = None, ""
        self._batch_began, self._hand, self._applied, self._staged = None, None, None, None
        self.process.standing.hold(None)

    def _send_state(self, message: SendState) -> None:
        if message.epoch in self._states:
            known = self._states[message.epoch]
            if known is not None:
                self.process.send(known)
            return
        self._adopt(message.position)
        if self.position != message.position:
            self.fleet.checks.broken(f"{self.process.name} was told to send {message.position}, holds {self.position}")
        chain = self.chain
        self._states = {message.epoch: None}

        def done(what: str | None, cause: str) -> None:
            if what is not None:
                sent = StateSent(message.epoch, message.position, chain, 10, 0.1)
                self._states[message.epoch] = sent
                self.process.send(sent)

        self.meshes.send(message.epoch, chain, done)

    def _receive_state(self, message: ReceiveState) -> bool | None:
        known = self._received if self.position is not None else None
        if known is not None and (known.epoch, known.position) == (message.epoch, message.position):
            self.process.send(known)
            return None
        self._forget()

        def done(what: str | None, cause: str) -> None:
            if what is None:
                return
            chain = self.fleet.garble(what)
            if chain == what:
                self._hold(message.position, chain)
            else:
                self.position, self.chain = message.position, chain
            self.process.standing.hold(message.position)
            self._received = StateReceived(message.epoch, message.position, chain, 0.1)
            self.process.send(self._received)

        return self._wait(lambda over: self.meshes.receive(message.epoch, over), done)

    def _check_state(self, message: CheckState) -> None:
        if message.position not in self._digests:
            if self.position is None:
                return
            self._adopt(message.position)
            if self.position != message.position or self._batch_began not in (None, self.position):
                self.process.world.say(f"{self.process.name} is asked about {message.position}, holds {self.position}")
                return
            self._digests[message.position] = self.chain
        self.process.send(StateDigest(message.position, self._digests[message.position]))

    # --- checkpoints and weights --------------------------------------------------------------------------------------

    def _save(self, message: SaveCheckpoint) -> bool | None:
        """Take the snapshot, and have it written while the next orders are carried out."""
        if self.position is None:
            self._fail("was told to save before it was loaded")
            return None
        self._adopt(message.position)
        if self._saving == message:
            if self._saved is None:
                return None  # the answer follows
            if isinstance(self._saved, CheckpointSaved) or self.position != message.position:
                self.process.send(self._saved)
                return None
        if self._writing:
            self._when_written = lambda: self._save_after_all(message)
            return True
        if self.position != message.position:
            self.fleet.checks.broken(f"{self.process.name} was told to save {message.position}, holds {self.position}")
            return None
        self._saving, self._saved = message, None
        position, chain = self.position, self.chain
        took = 5.0 * self._speed * self._chance.random()  # several steps, or none
        self.process.later(took, lambda: self._written(message, position, chain))
        return None

    def _save_after_all(self, message: SaveCheckpoint) -> None:
        self._save(message)
        self._go_on()

    @property
    def _writing(self) -> bool:
        return self._saving is not None and self._saved is None

    def _written(self, message: SaveCheckpoint, position: Position, chain: str) -> None:
        if self.fleet.checkpoint_fails():
            self._saved = CheckpointFailed(message.position, "disk full")
        else:
            path = self.fleet.folder.save(message.folder, position, chain)
            if path is None:
                self._saved = CheckpointFailed(message.position, "a later lineage has a checkpoint of that step")
            else:
                self._saved = CheckpointSaved(message.position, path, chain)
        self.process.send(self._saved)
        then, self._when_written = self._when_written, None
        if then is not None:
            then()

    def _leave(self, cause: str) -> bool:
        """In good order: what is being written is finished first."""
        if self._writing:
            self._when_written = lambda: self.process.leave(EXIT_DONE, cause)
        else:
            self.process.leave(EXIT_DONE, cause)
        return True

    def _publish(self, message: SendWeights) -> None:
        if self.position is None:
            self._fail("was told to send weights before it was loaded")
            return
        self._adopt(message.position)
        key = (message.epoch, message.position)
        if key in self._transfers:
            sent = self._transfers[key]
            if sent is not None:
                self.process.send(sent)
            return
        if self._staged is None or self._staged[0] != message.position:
            if message.position != self.position:
                cause = f"asked for {message.position}, holds {self.position}"
                self.process.world.say(f"{self.process.name} {cause}")
                self.process.send(WeightsFailed(message.epoch, message.position, cause))
                return
            self._staged = (self.position, self.chain)
        self._transfers = {k: v for k, v in self._transfers.items() if k[1] == message.position or v is None}
        self._transfers[key] = None
        chain = self._staged[1]

        def done(what: str | None, cause: str) -> None:
            if what is None:
                self._transfers.pop(key, None)
                self.process.send(WeightsFailed(message.epoch, message.position, cause))
            else:
                sent = WeightsSent(message.epoch, message.position, chain, 10, 0.1)
                self._transfers[key] = sent
                self.process.send(sent)

        self.meshes.send(message.epoch, chain, done)

    def _hold(self, position: Position, chain: str) -> None:
        self.position, self.chain = position, chain
        self.fleet.checks.holds_state(self.process.name, self.process.nonce, position, chain)

    def _fail(self, cause: str) -> None:
        """What the real service ends with: an error of its own, after which a fresh process starts."""
        self.fleet.checks.unwilling(self.process.name, cause)
        self.process.send(ReplicaFailed(cause, False))
        self.process.leave(EXIT_FAILED, cause)


def _names(step: TrainStep) -> tuple[int, int, int]:
    return (step.position.lineage, step.step, step.attempt)
