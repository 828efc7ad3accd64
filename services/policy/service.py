"""The policy service: one loop over the bus that obeys the controller, message by message, in order.

    bus thread -> inbox thread -+- FormMesh, RevokeMesh -> mesh membership (at once, even while a step is computed)
                                +- everything else -----> main thread: the table of handlers below

Of a replica of several ranks this is rank 0, which alone leases, reports and votes; whatever it does to its trainer the
others do too, at the same time, by its orders (`services/policy/ranks`).

Invariant: commands take effect in the order in which they arrive, each at most once; a repeated one is answered again.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from services.policy.batch import Frame
from services.policy.copies import Copies
from services.policy.device import CPU
from services.policy.layouts.grid import Grid
from services.policy.learner import FATAL, Learner
from services.policy.peers import Peers
from services.policy.ranks.crew import Crew
from services.policy.ranks.meshes import ReplicaMeshes, bounds
from services.policy.ranks.orders import (
    Abort,
    AnyOrder,
    Commit,
    Done,
    Forget,
    Load,
    RanksError,
    Send,
    Stage,
    Take,
    Train,
)
from services.policy.saving import Saver
from services.policy.sft_rows import SftRows
from services.policy.state import Head
from services.policy.trainer import MEGABYTE, Trainer, TrainerError
from shared.bus import BusClient, BusError, Delivery, Fenced
from shared.data.dataset import Dataset
from shared.data.unusable import UnusableRows
from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AbortStep,
    AnyMessage,
    CheckState,
    CommitStep,
    Drain,
    FormMesh,
    Lease,
    LeaseRef,
    LeaseReturned,
    Leaving,
    LoadState,
    MeshMember,
    Position,
    ReceiveState,
    Refused,
    Registered,
    ReplicaFailed,
    RevokeLease,
    RevokeMesh,
    SaveCheckpoint,
    SendState,
    SendWeights,
    Shutdown,
    StateLoaded,
    TrainStep,
    WeightsFailed,
)
from shared.models import load_tokenizer
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, EXIT_RESTART, ServiceArguments
from shared.telemetry import get_logger
from shared.weights.digest import hexadecimal
from shared.weights.publisher import Publisher
from shared.weights.staging import Area

RECEIVE_S = 0.25  # how long the inbox thread may sleep before it looks whether the service has ended, or shall leave
DRAIN_SHARE = 0.5  # of timeouts.exit_s: how long a policy that was asked to leave waits for its Drain
INBOX = 1024  # deliveries that may wait for the main thread before the bus is held back


class PolicyService:
    """One policy replica. `datasets` are those that SFT leases may name; `crew` are the other ranks, if it
    has some, and `grid` this one's place among them; `device` is where it computes."""

    def __init__(
        self,
        arguments: ServiceArguments,
        client: BusClient,
        datasets: dict[str, Dataset],
        crew: Crew | None = None,
        grid: Grid | None = None,
        device: torch.device = CPU,
    ) -> None:
        recipe = arguments.recipe
        self._recipe = recipe
        self._client, self._datasets, self._crew = client, datasets, crew
        self._log = get_logger()
        self._inbox: queue.Queue[Delivery | Exception] = queue.Queue(maxsize=INBOX)
        member = MeshMember(arguments.replica, client.incarnation, 0)
        if crew is None:
            self._meshes = MeshMembership(member, client.request, self._tell, **bounds(recipe))
        else:
            meshes = ReplicaMeshes(member, client.request, self._tell, recipe, crew, crew.world)
            self._meshes = meshes
            crew.listen(meshes.hear, self._over)
        far = crew.nodes.far if crew is not None else ()
        self._learner = Learner(recipe, arguments.run_folder, self._meshes.using, grid or Grid.alone(), far, device)
        self._copies = Copies(self._learner, self._together)
        self._saver = Saver(recipe, arguments.run_folder, self._tell, self._copies.take)
        self._peers = Peers(self._meshes, self._tell, recipe.weights.bucket_mb * MEGABYTE, self._copies.take)
        self._publisher = Publisher(self._meshes, self._tell, recipe.weights.bucket_mb * MEGABYTE)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: SftRows | None = None
        self._unusable = UnusableRows()
        self._done = 0
        self._ended = threading.Event()
        self._asked_to_leave = False
        self._leave_at: float | None = None
        self._handlers: dict[type, tuple[str, Callable[[Any, Sequence[Frame]], int | None]]] = {
            Registered: ("waiting", self._registered),
            Refused: ("waiting", self._refused),
            LoadState: ("loading", self._load_state),
            Lease: ("encoding", self._lease),
            RevokeLease: ("waiting", self._revoke_lease),
            TrainStep: ("training", self._train_step),
            CommitStep: ("applying", self._commit_step),
            AbortStep: ("waiting", self._abort_step),
            SaveCheckpoint: ("saving", self._save_checkpoint),
            SendWeights: ("staging", self._send_weights),
            SendState: ("staging", self._send_state),
            ReceiveState: ("receiving", self._receive_state),
            CheckState: ("checking", self._check_state),
            Drain: ("draining", self._drain),
            Shutdown: ("leaving", self._shutdown),
        }

    def run(self) -> int:
        """Obey until the run is over; returns the exit code of the process."""
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()
        try:
            while True:
                self._client.progress("waiting", self._done)
                item = self._inbox.get()
                if isinstance(item, Fenced):
                    self._log.warning("fenced: a newer process has this replica's name", why=str(item))
                    return EXIT_FENCED
                if isinstance(item, RanksError):
                    return self.give_up(item, fatal=item.fatal)
                if isinstance(item, Exception):
                    raise item
                code = self._handle(item)
                if code is not None:
                    return code
        finally:
            self._ended.set()
            self._publisher.close()
            self._peers.close()
            self._meshes.close("this replica leaves")

    def leave(self) -> bool:
        """Ask the controller for a `Drain`; safe in a signal handler. False if there is nothing to wait for."""
        if self._asked_to_leave or self._learner.trainer is None:
            return False
        self._asked_to_leave = True
        return True

    def _receive(self) -> None:
        """Inbox thread: meshes are formed and revoked while a step is computed, all else waits its turn."""
        while not self._ended.is_set():
            try:
                self._leave_when_asked()
                delivery = self._client.receive(RECEIVE_S)
            except Exception as error:  # the main thread decides what an end of the bus means
                if self._crew is not None and isinstance(error, Fenced):
                    self._crew.end(f"fenced: {error}", EXIT_FENCED)  # whatever hangs: one of the ranks may be silent
                self._inbox.put(error)
                return
            if delivery is None:
                continue
            if isinstance(delivery.message, FormMesh):
                self._meshes.form(delivery.message)
            elif isinstance(delivery.message, RevokeMesh):
                self._meshes.revoke(delivery.message)
            else:
                self._inbox.put(delivery)

    def _over(self, error: RanksError) -> None:
        """Wake the main thread; one that has so much to do hears of it from the crew."""
        with suppress(queue.Full):
            self._inbox.put_nowait(error)

    def _leave_when_asked(self) -> None:
        """The step in hand is finished, and a checkpoint written if nobody else can: the controller tells when to go.

        It may be gone itself: then this replica leaves without its word.
        """
        if self._asked_to_leave and self._leave_at is None:
            self._leave_at = time.monotonic() + DRAIN_SHARE * self._recipe.timeouts.exit_s
            self._client.send(Leaving("a signal asked it to leave"))
        elif self._leave_at is not None and time.monotonic() >= self._leave_at:
            self._leave_at = math.inf
            self._inbox.put(Delivery(Drain("no Drain came within half of timeouts.exit_s"), ()))

    def _handle(self, delivery: Delivery) -> int | None:
        known = self._handlers.get(type(delivery.message))
        if known is None:
            self._log.warning("a message that no policy handles was ignored", message=type(delivery.message).__name__)
            return None
        state, handler = known
        self._client.progress(state, self._done)
        try:
            code = handler(delivery.message, delivery.frames)
        except Fenced as error:
            self._log.warning("fenced: a newer process has this replica's name", why=str(error))
            return EXIT_FENCED
        except FATAL as error:
            return self.give_up(error, fatal=True)
        except TrainerError as error:
            return self.give_up(error, fatal=False)
        except RanksError as error:
            return self.give_up(error, fatal=error.fatal)
        self._done += 1
        return code

    def give_up(self, error: Exception, *, fatal: bool = True) -> int:
        """Tell the controller why this replica ends; returns the exit code."""
        self._log.error("this replica cannot go on", why=str(error), fatal=fatal)
        self._client.send(ReplicaFailed(str(error), fatal))
        return EXIT_FATAL if fatal else EXIT_RESTART

    def _tell(self, message: AnyMessage) -> None:
        """Send from a thread without a caller: an end of the bus is the main thread's business."""
        try:
            self._client.send(message)
        except BusError as error:
            self._log.warning("a message could not be sent", message=type(message).__name__, why=str(error))

    def _together(self, order: AnyOrder, frames: Sequence[Frame] = ()) -> AbstractContextManager[list[Done]]:
        """What this rank does within, all ranks of the replica do; the list has their answers at the end."""
        return self._crew.together(order, frames) if self._crew is not None else nullcontext([])

    # --- handlers: None goes on, a number ends the process with that code --------------------------------------------

    def _registered(self, message: Registered, _frames: Sequence[Frame]) -> None:
        self._log.info("registered again", term=self._client.term, incarnation=message.incarnation)

    def _refused(self, message: Refused, _frames: Sequence[Frame]) -> None:
        self._log.warning("the controller refused a message", **msgspec.structs.asdict(message))

    def _load_state(self, message: LoadState, _frames: Sequence[Frame]) -> None:
        with self._together(Load(message)) as others:
            holds = self._learner.load(message)
        if holds and not all(done.holds for done in others):  # the checkpoint went while the ranks were reading it
            with self._together(Forget()):
                self._learner.forget()
            holds = False
        if self._rows is None:
            self._tokenizer = load_tokenizer(self._recipe.model)
            context = int(self._learner.built().model.config.get_text_config().max_position_embeddings)
            self._rows = SftRows(self._datasets, self._tokenizer, context)
        held = message.position if holds else None
        self._client.hold(held)
        self._client.send(StateLoaded(held))

    def _lease(self, message: Lease, _frames: Sequence[Frame]) -> None:
        if self._rows is None:
            raise TrainerError("a lease came before the model was loaded")
        for grant in message.grants:
            lease = LeaseRef(grant.group, grant.attempt)
            self._client.take_lease(lease)
            answer, frames = self._rows.answer(grant)
            self._client.send(answer, frames)
            self._client.drop_lease(lease)
            if isinstance(answer, LeaseReturned):
                self._log.warning("a row was given up", group=grant.group, cause=answer.cause, why=answer.detail)
                self._unusable.given_up(grant.purpose, grant.dataset, answer.detail)
            else:
                self._unusable.used(grant.purpose)

    def _revoke_lease(self, message: RevokeLease, _frames: Sequence[Frame]) -> None:
        # leases are answered in the order of messages, so all of these have been answered: their reports are refused
        self._log.info("leases revoked", count=len(message.leases), why=message.cause)

    def _train_step(self, message: TrainStep, frames: Sequence[Frame]) -> None:
        trainer = self._learner.trainer
        if trainer is None:  # its state did not arrive: the controller was told, and takes the attempt back
            self._log.warning("a step came, but no state to start it from", step=message.step, attempt=message.attempt)
            return
        with suppress(MeshError):  # the controller was told as MeshFailed and takes the attempt back
            with self._together(Train(message), frames):
                vote = trainer.compute(message, frames)
            self._client.send(vote)

    def _commit_step(self, message: CommitStep, _frames: Sequence[Frame]) -> None:
        trainer = self._learner.loaded()
        with self._together(Commit(message)):
            applied = trainer.apply(message)
        self._client.hold(applied.position)
        self._client.send(applied)

    def _abort_step(self, message: AbortStep, _frames: Sequence[Frame]) -> None:
        self._log.info("step aborted", step=message.step, attempt=message.attempt, why=message.cause)
        trainer = self._learner.trainer
        if trainer is not None:
            with self._together(Abort(message.step, message.attempt, message.lineage)):
                trainer.drop(message.step, message.attempt, message.lineage)

    def _save_checkpoint(self, message: SaveCheckpoint, _frames: Sequence[Frame]) -> None:
        self._saver.save(message, self._adopted(message.position), self._tokenizer)

    def _send_weights(self, message: SendWeights, _frames: Sequence[Frame]) -> None:
        trainer = self._adopted(message.position)
        if self._publisher.offered != message.position:
            if trainer.position != message.position:
                cause = f"expected to hold {message.position}, but this replica holds {trainer.position}"
                self._client.send(WeightsFailed(message.epoch, message.position, cause))
                return
            with self._together(Stage(message.position)) as others:
                staged, total = self._learner.stage(message.position)
            digest = hexadecimal(total + sum(done.total for done in others))
            self._publisher.offer(message.position, replace(staged, digest=digest))
        with self._together(Send(message)):
            self._publisher.publish(message)

    def _send_state(self, message: SendState, _frames: Sequence[Frame]) -> None:
        self._peers.send(message, self._adopted(message.position))

    def _receive_state(self, message: ReceiveState, _frames: Sequence[Frame]) -> None:
        layout = self._learner.built()
        if self._peers.answer_again(message, self._learner.trainer):
            return
        self._learner.trainer = None  # what the model held is about to be overwritten
        self._client.hold(None)
        started = time.perf_counter()
        trainer = self._peers.receive(message, layout, self._take)
        if trainer is None:
            return
        self._client.hold(trainer.position)
        seconds = round(time.perf_counter() - started, 3)
        self._log.info("state received", step=trainer.position.step, version=trainer.position.version, seconds=seconds)

    def _take(self, head: Head, area: Area) -> Trainer:
        encode = msgspec.msgpack.encode
        with self._together(Take(encode(head), encode(area.manifest), area.path)):
            return self._learner.take(head, area.manifest, area.memory)

    def _check_state(self, message: CheckState, _frames: Sequence[Frame]) -> None:
        self._peers.check(message, self._adopted(message.position))

    def _drain(self, message: Drain, _frames: Sequence[Frame]) -> int:
        self._log.info("drained", why=message.cause)  # leases are answered at once: nothing is to be handed back
        self._saver.wait()
        return EXIT_DONE

    def _shutdown(self, message: Shutdown, _frames: Sequence[Frame]) -> int:
        self._log.info("the run is over", why=message.cause)
        self._saver.wait()
        return EXIT_DONE

    def _adopted(self, position: Position) -> Trainer:
        """The trainer, with what it holds named as `position` where that is its own."""
        trainer = self._learner.loaded()
        trainer.adopt(position)
        return trainer
