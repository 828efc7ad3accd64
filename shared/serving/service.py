"""A replica with an engine: one loop over the bus, the engine, the judging and the weights that arrive.

    controller --Lease--> generation --finished group--> judging --scores--> GroupReport --> controller
    policy, or a replica that is done --mesh--> weights receiver --staged--> engine (between two decode steps)
                                                                    `--> publisher --mesh--> the next replicas

This is rank 0 of its replica. The engine starts as soon as the replica is registered, since its worker processes are
the other ranks, without which the replica is not whole (`shared.engines.ranks`).

Each turn of the loop takes what the bus brought, swaps in weights that have arrived, advances the engine by one decode
step, and reports what was judged; with nothing to do it sleeps in `receive`. Invariant: every grant that was taken is
answered once - by a report, or by a return with its cause - unless the controller took it back itself.

Whoever leaves hands over what it samples at once, with the tokens so far: another replica goes on from them. Only what
cannot be handed over, and what is being judged, gets time to be finished (DRAIN_SHARE).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shared.arrays import ArrayError, Frame
from shared.bus import BusClient, BusError, Delivery, Fenced
from shared.config import Recipe
from shared.data.dataset import DataError, Dataset
from shared.data.unusable import UnusableRows
from shared.engines.base import Begun, Engine, EngineDied, EngineError
from shared.engines.load import load_engine
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AnyMessage,
    Drain,
    FormMesh,
    Grant,
    GroupReport,
    Lease,
    LeaseRef,
    LeaseReturned,
    Leaving,
    LoadState,
    MeshMember,
    Partial,
    Position,
    ReceiveWeights,
    Refused,
    Registered,
    ReplicaFailed,
    RevokeLease,
    RevokeMesh,
    SendWeights,
    Shutdown,
    StateLoaded,
    WeightsFailed,
    WeightsLoaded,
)
from shared.models import ModelError
from shared.rewards.score import Score
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, EXIT_RESTART
from shared.serving.generation import Cause, Generation, GrantRejected, Group
from shared.serving.judge import Judge, JudgedGroup
from shared.serving.partial import pack_partial, unpack_partial
from shared.serving.samples import SampleLog, completion_text
from shared.serving.weights_receiver import Arrived, WeightsReceiver
from shared.telemetry import get_logger
from shared.weights import WeightsError
from shared.weights.publisher import Publisher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEGABYTE = 1 << 20
IDLE_S = 0.25
"""Sleep in `receive` with nothing to do; a signal or a judge that broke is noticed after at most this."""
BUSY_S = 0.005
"""Wait for verdicts, or for weights, before looking at the bus again, when the engine has nothing to do."""
DRAIN_SHARE = 0.5
"""Of timeouts.exit_s: how long what is not handed over at once may take before it is; the rest is for the goodbye."""
REMEMBERED = 4096
"""Answered attempts that are remembered, so that a repeated lease on one is ignored."""

LoadEngine = Callable[[Recipe, str, BusClient], "tuple[Engine, PreTrainedTokenizerBase]"]
"""Makes the engine of a replica of that name, whose rank 0 has this client."""
MakeReport = Callable[[Group, Sequence[Score]], tuple[GroupReport, list[Frame]]]


class EngineService:
    """Rank 0 of one replica. `datasets` are those that leases may name; `judge` scores what is generated.

    `report` makes the message of a scored group, and its frames. Errors of the kinds in `fatal` end the run.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        replica: str,
        client: BusClient,
        datasets: Mapping[str, Dataset],
        judge: Judge,
        report: MakeReport,
        *,
        load: LoadEngine = load_engine,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        self._recipe = recipe
        self._replica = replica
        self._client = client
        self._datasets = datasets
        self._load = load
        self._report = report
        self._fatal: tuple[type[Exception], ...] = (ModelError, DataError, EngineError, *fatal)
        self._log = get_logger()
        self._samples = SampleLog(run_folder, replica)
        self._judging = judge
        self._meshes = MeshMembership(
            MeshMember(replica, client.incarnation, 0),
            client.request,
            self._tell,
            interface=recipe.weights.interface,
            operation_timeout_s=recipe.timeouts.transfer_s,
        )
        self._publisher = Publisher(self._meshes, self._tell, recipe.weights.bucket_mb * MEGABYTE)
        self._generation: Generation | None = None
        self._unusable = UnusableRows()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._receiver: WeightsReceiver | None = None
        self._weights: WeightsLoaded | None = None
        self._answered: OrderedDict[LeaseRef, None] = OrderedDict()
        self._drain_until: float | None = None
        self._stops = 0
        self._code: int | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Registered: self._registered,
            Refused: self._refused,
            LoadState: self._load_state,
            RevokeLease: self._revoke_lease,
            FormMesh: self._meshes.form,
            RevokeMesh: self._meshes.revoke,
            ReceiveWeights: self._receive_weights,
            SendWeights: self._publisher.publish,
            Drain: self._drain,
            Shutdown: self._shutdown,
        }

    def run(self) -> int:
        """Serve until the run is over; returns the exit code of the process."""
        try:
            self.start()
            while self._code is None:
                self.turn()
            return self._code
        except Fenced as error:
            self._log.warning("fenced: a newer process has this replica's name", why=str(error))
            return EXIT_FENCED
        except EngineDied as error:
            self._log.error("the engine died", why=str(error))
            self._client.send(ReplicaFailed(str(error), fatal=False))
            return EXIT_RESTART
        except self._fatal as error:
            return self.give_up(error)
        finally:
            if self._generation is not None:
                self._generation.engine.close()
            self._publisher.close()
            self._meshes.close("this replica leaves")
            if self._receiver is not None:
                self._receiver.close()
            self._samples.close()

    def give_up(self, error: Exception) -> int:
        """Tell the controller that no restart will mend this; returns the exit code."""
        self._log.error("this replica cannot go on", why=str(error))
        self._client.send(ReplicaFailed(str(error), fatal=True))
        return EXIT_FATAL

    def start(self) -> None:
        """Make the engine, once; its worker processes register as the other ranks meanwhile."""
        if self._generation is not None:
            return
        self._client.progress("loading", 0)
        started = time.perf_counter()
        engine, self._tokenizer = self._load(self._recipe, self._replica, self._client)
        deterministic = self._recipe.run.deterministic
        self._generation = Generation(engine, self._tokenizer, self._datasets, deterministic=deterministic)
        bucket_bytes = self._recipe.weights.bucket_mb * MEGABYTE
        self._receiver = WeightsReceiver(self._meshes, engine.manifest, bucket_bytes)
        self._log.info("engine ready", engine=type(engine).__name__, seconds=_since(started))

    def leave(self) -> bool:
        """Drain and leave; asked a second time, hand everything over after this turn. Safe in a signal handler."""
        self._stops += 1
        return True

    def turn(self) -> None:
        """One turn of the loop: messages, weights, one decode step, verdicts. Sleeps only if there is nothing to do."""
        generating = self._generation is not None and len(self._generation) > 0
        receiving = self._receiver is not None and self._receiver.busy
        waiting = generating or len(self._judging) > 0
        state = "generating" if generating else "judging" if waiting else "receiving" if receiving else "waiting"
        self._client.progress(state, self._generation.engine.stats().tokens if self._generation is not None else 0)
        self._take_messages(0.0 if waiting else BUSY_S if receiving else IDLE_S)
        if self._receiver is not None and (arrived := self._receiver.take()) is not None:
            self._swap(arrived)
        if self._generation is not None:
            for group in self._generation.advance():
                self._judging.submit(group, self._completions(group))
        generating = self._generation is not None and len(self._generation) > 0
        for judged in self._judging.collect(0.0 if generating else BUSY_S):
            self._answer(judged)
        self._leave_when_asked()

    def _take_messages(self, wait_s: float) -> None:
        delivery: Delivery | None = self._client.receive(wait_s)
        while delivery is not None and self._code is None:
            handler = self._handlers.get(type(delivery.message))
            if isinstance(delivery.message, Lease):
                self._lease(delivery.message, delivery.frames)
            elif handler is None:
                name = type(delivery.message).__name__
                self._log.warning("a message that this role does not handle was ignored", message=name)
            else:
                handler(delivery.message)
            delivery = self._client.receive(0.0)

    # --- the session ------------------------------------------------------------------------------------------------

    def _registered(self, message: Registered) -> None:
        standing = set(message.leases)
        void = [group.ref for group in self._held() if group.ref not in standing]
        self._forget(void)
        self._log.info("registered again", term=self._client.term, incarnation=message.incarnation, void=len(void))

    def _refused(self, message: Refused) -> None:
        self._log.warning("the controller refused a message", **msgspec.structs.asdict(message))

    def _drain(self, message: Drain) -> None:
        self._begin_to_drain(message.cause)

    def _begin_to_drain(self, cause: str) -> None:
        """Take nothing new, hand over what is being sampled; what is left has some time to be finished."""
        if self._drain_until is None:
            self._log.info("draining", why=cause, groups=len(self._held()))
            self._drain_until = time.monotonic() + DRAIN_SHARE * self._recipe.timeouts.exit_s
            groups = self._generation.groups if self._generation is not None else []
            self._hand_over([group for group in groups if self._may_go_on_elsewhere(group.grant)])

    def _shutdown(self, message: Shutdown) -> None:
        self._log.info("the run is over", why=message.cause)
        self._code = EXIT_DONE

    def _leave_when_asked(self) -> None:
        """Leave once a drain has nothing in hand or its time is up; after a second `stop`, at once."""
        if self._stops and self._drain_until is None:
            self._client.send(Leaving("a signal asked it to leave"))
            self._begin_to_drain("a signal asked this replica to leave")
        drained = self._drain_until is not None and (not self._held() or time.monotonic() >= self._drain_until)
        if self._code is None and (self._stops > 1 or drained):
            held = self._held()
            self._hand_over(held)
            self._log.info("leaving", handed_back=len(held))
            self._code = EXIT_DONE

    def _tell(self, message: AnyMessage) -> None:
        """Send from a mesh's thread, which has no caller: an end of the bus is this loop's business."""
        try:
            self._client.send(message)
        except BusError as error:
            self._log.warning("a message could not be sent", message=type(message).__name__, why=str(error))

    # --- model and weights ------------------------------------------------------------------------------------------

    def _load_state(self, message: LoadState) -> None:
        self._client.send(StateLoaded(message.position))

    def _receive_weights(self, message: ReceiveWeights) -> None:
        if self._receiver is None:
            self._client.send(WeightsFailed(message.epoch, message.position, "expected LoadState before any weights"))
        elif self._weights is not None and (self._weights.epoch, self._weights.position) == (
            message.epoch,
            message.position,
        ):
            self._client.send(self._weights)
        else:
            self._receiver.receive(message)

    def _swap(self, arrived: Arrived) -> None:
        """Put weights that have arrived into the engine; what is in flight goes on with them."""
        message, started = arrived.message, time.perf_counter()
        assert self._generation is not None
        cause = arrived.cause
        if arrived.staged is not None:
            engine = self._generation.engine
            self._client.progress("swapping", engine.stats().tokens)
            engine.pause()
            try:
                engine.update(arrived.staged, message.position.version, self._recipe.rollout.in_flight)
            except (EngineError, WeightsError) as error:
                cause = str(error)
            engine.resume()
        if arrived.staged is None or cause:
            self._log.warning("weights not loaded", version=message.position.version, epoch=message.epoch, why=cause)
            self._client.send(WeightsFailed(message.epoch, message.position, cause))
            return
        seconds = arrived.seconds + time.perf_counter() - started
        self._weights = WeightsLoaded(message.epoch, message.position, arrived.staged.digest, seconds)
        self._publisher.offer(message.position, arrived.staged)  # before the controller can ask for it
        self._client.hold(message.position)
        for group in self._held():
            if group.grant.lineage != message.position.lineage:
                self._return(group.grant, "handed_back", f"weights of lineage {message.position.lineage} were loaded")
        self._client.send(self._weights)
        self._log.info(
            "weights loaded",
            lineage=message.position.lineage,
            version=message.position.version,
            digest=arrived.staged.digest,
            seconds=round(seconds, 3),
            in_flight=len(self._generation),
        )

    # --- leases -----------------------------------------------------------------------------------------------------

    def _lease(self, message: Lease, frames: Sequence[Frame]) -> None:
        groups: list[Group] = []
        known = {group.ref for group in self._held()} | self._answered.keys()
        rest = iter(frames)
        for grant in message.grants:
            partial = list(islice(rest, len(grant.partial.arrays))) if grant.partial is not None else []
            ref = LeaseRef(grant.group, grant.attempt)
            if ref in known:
                continue
            self._client.take_lease(ref)
            try:
                groups.append(self._taken(grant, partial))
                self._unusable.used(grant.purpose)
            except GrantRejected as rejected:
                self._return(grant, rejected.cause, str(rejected))
                if rejected.cause != "handed_back":
                    self._unusable.given_up(grant.purpose, grant.dataset, str(rejected))
        if groups and self._generation is not None:
            self._generation.start(groups)

    def _taken(self, grant: Grant, frames: Sequence[Frame]) -> Group:
        """The grant as a group ready to be generated; `frames` are those of its partial. Raises `GrantRejected`."""
        position: Position | None = self._weights.position if self._weights is not None else None
        if self._generation is None or position is None:
            raise GrantRejected("handed_back", "this replica has no weights yet")
        if self._stops or self._drain_until is not None:
            raise GrantRejected("handed_back", "this replica leaves")
        if grant.lineage != position.lineage or grant.version > position.version:
            wanted = f"lineage {grant.lineage}, version {grant.version} or newer"
            raise GrantRejected("handed_back", f"expected to hold {wanted}, but this replica holds {position}")
        begun: list[Begun | None] = []
        if grant.partial is not None:
            try:
                begun = unpack_partial(grant.partial, frames)
            except ArrayError as error:
                raise GrantRejected("handed_back", str(error)) from error
        return self._generation.prepare(grant, begun)

    def _revoke_lease(self, message: RevokeLease) -> None:
        self._log.info("leases revoked", count=len(message.leases), why=message.cause)
        self._forget(message.leases)

    def _completions(self, group: Group) -> list[str]:
        assert self._tokenizer is not None
        return [completion_text(self._tokenizer, s.tokens, s.truncated) for s in group.finished()]

    def _answer(self, judged: JudgedGroup) -> None:
        group = judged.group
        if judged.error:
            self._return(group.grant, "reward_failed", judged.error)
            return
        report, frames = self._report(group, judged.scores)
        self._client.send(msgspec.structs.replace(report, category=self._category(group.grant)), frames)
        self._remember(group.ref)
        assert self._tokenizer is not None
        prompt = str(self._tokenizer.decode(group.prompt, skip_special_tokens=False))
        self._samples.write(group, prompt, judged.completions, judged.scores)

    def _category(self, grant: Grant) -> str:
        """The value that a held-out row has in its suite's category column; "" for other rows."""
        evaluation = self._recipe.evaluation
        suite = evaluation.suites.get(grant.suite) if evaluation is not None else None
        if suite is None or suite.category is None:
            return ""
        return self._datasets[grant.dataset].category(grant.row, suite.category)

    def _may_go_on_elsewhere(self, grant: Grant) -> bool:
        """Whether another replica may go on from the tokens of a group.

        Not a judge's: a verdict is on one version. Not in a deterministic run, nor where an update has samples begin
        again: there, each is of one version.
        """
        recipe = self._recipe
        mixes = not recipe.run.deterministic and recipe.rollout.in_flight != "abort"
        return mixes and grant.purpose == "train"

    def _hand_over(self, groups: Sequence[Group]) -> None:
        """Return groups in hand, with the tokens so far where another replica may go on from them."""
        so_far = {group.ref: group.so_far() for group in groups}
        if self._generation is not None:
            inside = {group.ref for group in self._generation.groups}
            for group in reversed(groups):  # so that none of them takes a slot that another one has left
                if group.ref in inside:
                    so_far[group.ref] = self._generation.interrupt(group)
        for group in groups:
            packed = None
            if self._may_go_on_elsewhere(group.grant):
                packed = pack_partial(so_far[group.ref], group.begun)
            partial, frames = packed if packed is not None else (None, [])
            self._return(group.grant, "handed_back", "this replica leaves", partial, frames)

    def _return(
        self, grant: Grant, cause: Cause, detail: str, partial: Partial | None = None, frames: Sequence[Frame] = ()
    ) -> None:
        ref = LeaseRef(grant.group, grant.attempt)
        if cause != "handed_back":
            self._log.warning("a group was given up", group=grant.group, cause=cause, why=detail)
        self._client.send(LeaseReturned(grant.group, grant.attempt, grant.lineage, cause, detail, partial), frames)
        self._forget([ref])
        self._remember(ref)

    def _held(self) -> list[Group]:
        generating = self._generation.groups if self._generation is not None else []
        return [*generating, *self._judging.groups]

    def _forget(self, refs: Iterable[LeaseRef]) -> None:
        refs = list(refs)
        if self._generation is not None:
            self._generation.revoke(refs)
        self._judging.revoke(refs)
        for ref in refs:
            self._client.drop_lease(ref)

    def _remember(self, ref: LeaseRef) -> None:
        """The attempt is answered: `Register` names it until the answer is acknowledged, and no longer."""
        self._client.drop_lease(ref)
        self._answered[ref] = None
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
