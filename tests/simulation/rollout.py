"""A model of the rollout service: takes weights over meshes, passes them on, samples leased groups with them, reports.

Sampling goes on while weights are swapped, so a group may be of several versions. Weights are chains (see payload.py).
Whoever leaves hands over what it has sampled, and whoever is leased such a group goes on from there. An evaluator is a
rollout that is leased nothing but rows to judge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from shared.messages import (
    Drain,
    FormMesh,
    Grant,
    GroupReport,
    Lease,
    LeaseRef,
    LeaseReturned,
    Leaving,
    LoadState,
    Partial,
    Position,
    ReceiveWeights,
    Registered,
    RevokeLease,
    RevokeMesh,
    SendWeights,
    Shutdown,
    StateLoaded,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)
from tests.simulation import payload
from tests.simulation.membership import Membership
from tests.simulation.payload import Stretch
from tests.simulation.process import EXIT_DONE, Rank

Frames = Sequence[bytes | memoryview]
Key = tuple[int, int]
Cause = Literal["handed_back", "row_invalid", "prompt_too_long", "reward_failed"]


class _Group:
    """A group in hand: `begun` are the tokens that it came with, `chains` the weights that sample it here."""

    def __init__(self, grant: Grant, composition: tuple[Key, ...], begun: list[Stretch]) -> None:
        self.grant, self.composition, self.begun = grant, composition, begun
        self.chains: dict[int, str] = {}

    @property
    def stretches(self) -> list[Stretch]:
        """What has been sampled of it so far."""
        return [*self.begun, *(Stretch(self.grant.attempt, version, chain) for version, chain in self.chains.items())]


class Rollout:
    """The service on rank 0."""

    def __init__(self, process: Rank) -> None:
        self.process, self.fleet = process, process.fleet
        self.meshes = Membership(process)
        self.loaded = False
        self.weights: WeightsLoaded | None = None
        self.chain = ""
        self._groups: dict[Key, _Group] = {}
        self._waiting: deque[list[Key]] = deque()
        self._inside: dict[Key, None] = {}
        self._answered: dict[Key, None] = {}
        self._asked: dict[tuple[int, Position], None] = {}
        self._to_receive: deque[ReceiveWeights] = deque()
        self._receiving = False
        self._copy: tuple[Position, str] | None = None
        self._sends: dict[tuple[int, Position], WeightsSent | None] = {}
        self._leaving = False
        self._chance = process.world.chance(f"service {process.name}")
        self._deterministic = self.fleet.plan.recipe.run.deterministic
        process.on_welcome = self._start_engine
        process.on_message = self._take
        process.on_exit = self.meshes.close

    @property
    def _speed(self) -> float:
        """How many times as long as usual everything takes, as of now."""
        return self.fleet.plan.speed.get(self.process.replica, 1.0)

    def drain(self, cause: str) -> None:
        """Hand over what is in hand and leave."""
        if self._leaving:
            return
        self._leaving = True
        for group in list(self._groups.values()):
            self._hand_over(group, cause)
        self.process.leave(EXIT_DONE, cause)

    def terminate(self) -> None:
        """SIGTERM: say so, and hand back a little later what is not finished by then."""
        self.process.send(Leaving("SIGTERM"))
        self.process.later(2.0 * self._chance.random(), lambda: self.drain("SIGTERM"))

    def _start_engine(self) -> None:
        """Its workers are the other ranks of the replica."""
        if self.process.ranks > 1:
            seconds = 0.8 * self._speed * self._chance.random()
            self.process.later(seconds, lambda: self.fleet.start_workers(self.process))

    def _take(self) -> None:
        process = self.process
        while process.inbox and process.alive:
            message, frames = process.inbox.popleft()
            match message:
                case Registered(leases=leases):
                    standing = {(ref.group, ref.attempt): None for ref in leases}
                    self._forget([key for key in self._groups if key not in standing])
                case LoadState():
                    seconds = 0.0 if self.loaded else 0.8 * self._speed * (0.5 + self._chance.random())
                    process.later(seconds, lambda message=message: self._load(message))  # type: ignore[misc]
                case Lease():
                    self._lease(message, frames)
                case RevokeLease(leases=leases):
                    self._forget([(ref.group, ref.attempt) for ref in leases])
                case FormMesh():
                    self.meshes.form(message)
                case RevokeMesh():
                    self.meshes.revoke(message)
                case ReceiveWeights():
                    self._receive(message)
                case SendWeights():
                    self._pass_on(message)
                case Drain(cause=cause):
                    self.drain(cause)
                case Shutdown(cause=cause):
                    process.leave(EXIT_DONE, cause)

    def _load(self, message: LoadState) -> None:
        self.loaded = True
        self.process.send(StateLoaded(message.position))

    # --- weights ------------------------------------------------------------------------------------------------------

    def _receive(self, message: ReceiveWeights) -> None:
        key = (message.epoch, message.position)
        if not self.loaded:
            self.process.send(WeightsFailed(*key, "expected LoadState first"))
        elif self.weights is not None and (self.weights.epoch, self.weights.position) == key:
            self.process.send(self.weights)
        elif key not in self._asked:
            self._asked[key] = None
            self._to_receive.append(message)
            self._transfer()

    def _transfer(self) -> None:
        """The receiver's thread: one transfer after the other."""
        if self._receiving or not self._to_receive:
            return
        message = self._to_receive.popleft()
        self._receiving = True

        def done(what: str | None, cause: str) -> None:
            self._receiving = False
            self._asked.pop((message.epoch, message.position), None)
            if what is None:
                self.process.send(WeightsFailed(message.epoch, message.position, cause))
            else:
                self._swap(message, what)
            self._transfer()

        self.meshes.receive(message.epoch, done)

    def _swap(self, message: ReceiveWeights, chain: str) -> None:
        chain = self.fleet.corrupt(chain)
        self.chain = chain
        self._copy = (message.position, self.fleet.spoil(chain))
        self._sends = {key: sent for key, sent in self._sends.items() if key[1] == message.position or sent is None}
        self.weights = WeightsLoaded(message.epoch, message.position, chain, 0.1)
        self.process.standing.hold(message.position)
        self.fleet.checks.loaded_weights(self.process.nonce, message.position, chain)
        for key, group in list(self._groups.items()):
            if group.grant.lineage != message.position.lineage:
                self._return(group.grant, "handed_back", "weights of another lineage were loaded")
            elif key in self._inside:
                group.chains[message.position.version] = chain
        self.process.send(self.weights)

    def _pass_on(self, message: SendWeights) -> None:
        """Send the copy that was received, whatever is under way beside it."""
        key = (message.epoch, message.position)
        if key in self._sends:
            known = self._sends[key]
            if known is not None:
                self.process.send(known)
            return
        if self._copy is None or self._copy[0] != message.position or self.weights is None:
            self.process.send(WeightsFailed(*key, f"asked for {message.position}, has {self._copy}"))
            return
        self._sends[key] = None
        digest, chain = self.weights.digest, self._copy[1]

        def done(what: str | None, cause: str) -> None:
            if what is None:
                self._sends.pop(key, None)
                self.process.send(WeightsFailed(*key, cause))
            else:
                self._sends[key] = WeightsSent(*key, digest, 10, 0.1)
                self.process.send(WeightsSent(*key, digest, 10, 0.1))

        self.meshes.send(message.epoch, chain, done)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease(self, message: Lease, frames: Frames) -> None:
        begun = self._begun(message, iter(frames))
        fresh = [g for g in message.grants if (g.group, g.attempt) not in self._groups | self._answered]
        composition = tuple((g.row, g.seed) for g in fresh) if self._deterministic else ()
        taken: list[Key] = []
        for grant in fresh:
            key = (grant.group, grant.attempt)
            self.process.standing.take_lease(LeaseRef(*key))
            held = self.weights.position if self.weights is not None else None
            if held is None or self._leaving or grant.lineage != held.lineage or grant.version > held.version:
                self._return(grant, "handed_back", f"holds {held}")
            elif self._chance.random() < 0.01 * self.fleet.mischief and not self._deterministic:
                self._return(grant, "reward_failed", "a reward worker died")
            else:
                self._groups[key] = _Group(grant, composition, begun.get(key, []))
                taken.append(key)
        if taken:
            self._waiting.append(taken)
        self._submit()

    def _begun(self, message: Lease, frames: Iterator[bytes | memoryview]) -> dict[Key, list[Stretch]]:
        """What others have sampled of these groups: the frames lie in the order of the grants."""
        begun: dict[Key, list[Stretch]] = {}
        for grant in message.grants:
            if grant.partial is not None:
                (frame,) = (next(frames) for _ in grant.partial.arrays)
                handed = payload.decode(frame)
                self.fleet.checks.continued(self.process.name, grant, handed)
                begun[grant.group, grant.attempt] = handed.stretches
        return begun

    def _hand_over(self, group: _Group, cause: str) -> None:
        """Return a group with its tokens so far, if it has any of its own that are not judged."""
        grant = group.grant
        if self._deterministic or grant.purpose != "train" or not group.chains:
            self._return(grant, "handed_back", cause)
            return
        handed = payload.Sampled(grant.group, grant.attempt, group.stretches, "")
        headers, frames = payload.encode(handed)
        lengths = [min(len(group.stretches), 3)] * grant.samples
        self.fleet.checks.handed_over(handed)
        self._return(grant, "handed_back", cause, Partial(lengths, handed.oldest, max(group.chains), headers), frames)

    def _submit(self) -> None:
        """Sequences enter free slots in order; in a deterministic run one `Lease` message's groups at a time."""
        recipe = self.fleet.plan.recipe
        slots = (recipe.evaluator if self.process.role == "evaluator" else recipe.rollout).slots
        while self._waiting:
            first = [key for key in self._waiting[0] if key in self._groups and key not in self._inside]
            room = not self._inside if self._deterministic else len(self._inside) * 2 < slots
            if first and not room:
                return
            for key in first if self._deterministic else first[:1]:
                self._begin(key)
            if self._deterministic or len(first) <= 1:
                self._waiting.popleft()

    def _begin(self, key: Key) -> None:
        assert self.weights is not None
        self._inside[key] = None
        group = self._groups[key]
        group.chains = {self.weights.position.version: self.chain}
        seconds = (0.2 + 1.2 * self._chance.random()) * self._speed * (0.5 if group.begun else 1.0)
        if self._chance.random() < 0.05 * self.fleet.mischief:
            seconds *= 8.0  # a straggler
        self.process.later(seconds, lambda: self._finish(key, group))

    def _finish(self, key: Key, group: _Group) -> None:
        if self._groups.get(key) is not group:
            return
        grant = group.grant
        sampled = payload.sample(grant, group.stretches, group.composition)
        headers, frames = payload.encode(sampled) if grant.purpose != "eval" else ([], [])
        report = GroupReport(
            group=grant.group,
            attempt=grant.attempt,
            lineage=grant.lineage,
            rewards=payload.rewards(sampled.content, grant.samples),
            parts={"verifier": payload.rewards(sampled.content, grant.samples)},
            prompt_length=3,
            lengths=[4] * grant.samples,
            truncated=[False] * grant.samples,
            oldest=sampled.oldest,
            newest=max(group.chains),
            seconds=0.5,
            arrays=headers,
            category="odd" if grant.purpose == "eval" and grant.row % 2 else "",
        )
        if grant.purpose == "eval":
            self.fleet.checks.answered(grant, group.chains)
        self.process.send(report, frames)
        self._forget([key])
        self._answered[key] = None

    def _return(
        self, grant: Grant, cause: Cause, detail: str, partial: Partial | None = None, frames: Frames = ()
    ) -> None:
        key = (grant.group, grant.attempt)
        self.process.send(LeaseReturned(*key, grant.lineage, cause, detail, partial), frames)
        self._forget([key])
        self.process.standing.drop_lease(LeaseRef(*key))
        self._answered[key] = None

    def _forget(self, keys: list[Key]) -> None:
        for key in keys:
            self._groups.pop(key, None)
            self._inside.pop(key, None)
            self.process.standing.drop_lease(LeaseRef(*key))
        self._submit()
