"""The policy service: one loop over the bus that obeys the controller, message by message, in order.

    bus thread -> inbox thread -+- FormMesh, RevokeMesh -> mesh membership (at once, even while a step is computed)
                                +- everything else -----> main thread: the table of handlers below

Invariant: commands take effect in the order in which they arrive, each at most once; a repeated one is answered again.
"""

from __future__ import annotations

import hashlib
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from services.policy import checkpoint
from services.policy.batch import BatchError, Frame
from services.policy.checkpoint import CheckpointError
from services.policy.export import export
from services.policy.peers import Peers
from services.policy.sft_rows import SftRows
from services.policy.trainer import MEGABYTE, Trainer, TrainerError
from shared.bus import BusClient, BusError, Delivery, Fenced, Refusal
from shared.config import Recipe, dump_recipe
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset
from shared.data.unusable import UnusableRows
from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AbortStep,
    AnyMessage,
    CheckpointFailed,
    CheckpointSaved,
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
from shared.models import ModelError, load_model, load_tokenizer
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, ServiceArguments
from shared.telemetry import get_logger
from shared.weights import stage
from shared.weights.publisher import Publisher

EXIT_RESTART = 1
RECEIVE_S = 0.25  # how long the inbox thread may sleep before it looks whether the service has ended, or shall leave
DRAIN_SHARE = 0.5  # of timeouts.exit_s: how long a policy that was asked to leave waits for its Drain
INBOX = 1024  # deliveries that may wait for the main thread before the bus is held back


class Stopped(BaseException):
    """SIGTERM or SIGINT came before there was a model, or for the second time: leave whatever is under way."""


class PolicyService:
    """One policy replica of one rank. `datasets` are those that SFT leases may name."""

    def __init__(self, arguments: ServiceArguments, client: BusClient, datasets: dict[str, Dataset]) -> None:
        recipe = arguments.recipe
        self._recipe, self._run_folder = recipe, arguments.run_folder
        self._client, self._datasets = client, datasets
        self._log = get_logger()
        self._meshes = MeshMembership(
            MeshMember(arguments.replica, client.incarnation, 0),
            client.request,
            self._tell,
            interface=recipe.weights.interface,
            operation_timeout_s=recipe.timeouts.transfer_s,
            reduction_timeout_s=recipe.timeouts.step_s / 2,  # so that a member says so before the step has run out
        )
        self._peers = Peers(self._meshes, self._tell, recipe.weights.bucket_mb * MEGABYTE)
        self._publisher = Publisher(self._meshes, self._tell, recipe.weights.bucket_mb * MEGABYTE)
        self._trainer: Trainer | None = None
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: SftRows | None = None
        self._unusable = UnusableRows()
        self._done = 0
        self._inbox: queue.Queue[Delivery | Exception] = queue.Queue(maxsize=INBOX)
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
        if self._asked_to_leave or self._trainer is None:
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
        except (ModelError, DataError, CheckpointError, BatchError) as error:
            return self.give_up(error, fatal=True)
        except TrainerError as error:
            return self.give_up(error, fatal=False)
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

    # --- handlers: None goes on, a number ends the process with that code --------------------------------------------

    def _registered(self, message: Registered, _frames: Sequence[Frame]) -> None:
        self._log.info("registered again", term=self._client.term, incarnation=message.incarnation)

    def _refused(self, message: Refused, _frames: Sequence[Frame]) -> None:
        self._log.warning("the controller refused a message", **msgspec.structs.asdict(message))

    def _load_state(self, message: LoadState, _frames: Sequence[Frame]) -> None:
        if message.source == "peer":
            self._await_state()
            return
        if self._trainer is None or self._trainer.position != message.position:
            started = time.perf_counter()
            model = self._make_model(weights=message.source == "initial")
            trainer = Trainer(model, self._recipe, message.position, self._meshes.using)
            if message.source == "checkpoint":
                path = self._run_folder / message.path
                try:
                    checkpoint.load(trainer, path, message.position)
                except CheckpointError as error:
                    if not checkpoint.superseded(path):
                        raise
                    self._log.warning("the others have gone on, and their checkpoints with them", why=str(error))
                    self._await_state()
                    return
            self._trainer = trainer
            seconds = round(time.perf_counter() - started, 3)
            self._log.info("model loaded", source=message.source, step=message.position.step, seconds=seconds)
        self._client.hold(message.position)
        self._client.send(StateLoaded(message.position))

    def _await_state(self) -> None:
        """Forget what is held; the model stands, and another policy's state will come into it."""
        self._trainer = None
        self._client.hold(None)
        if self._model is None:
            self._make_model(weights=False)
        self._log.info("the model stands; its state comes from another policy")
        self._client.send(StateLoaded(None))

    def _make_model(self, *, weights: bool) -> PreTrainedModel:
        self._trainer, self._model, self._rows = None, None, None  # give the memory back first
        torch.manual_seed(self._recipe.run.seed)
        self._model = load_model(self._recipe.model, self._recipe.run.seed, weights=weights)
        self._tokenizer = load_tokenizer(self._recipe.model)
        context = int(self._model.config.get_text_config().max_position_embeddings)
        self._rows = SftRows(self._datasets, self._tokenizer, context)
        return self._model

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
        if self._trainer is None:  # its state did not arrive: the controller was told, and takes the attempt back
            self._log.warning("a step came, but no state to start it from", step=message.step, attempt=message.attempt)
            return
        with suppress(MeshError):  # the controller was told as MeshFailed and takes the attempt back
            self._client.send(self._trainer.compute(message, frames))

    def _commit_step(self, message: CommitStep, _frames: Sequence[Frame]) -> None:
        applied = self._loaded().apply(message)
        self._client.hold(applied.position)
        self._client.send(applied)

    def _abort_step(self, message: AbortStep, _frames: Sequence[Frame]) -> None:
        self._log.info("step aborted", step=message.step, attempt=message.attempt, why=message.cause)
        if self._trainer is not None:
            self._trainer.drop(message.step, message.attempt, message.lineage)

    def _save_checkpoint(self, message: SaveCheckpoint, _frames: Sequence[Frame]) -> None:
        trainer = self._loaded()
        trainer.adopt(message.position)
        started = time.perf_counter()
        try:
            if trainer.position != message.position:
                raise CheckpointError(self._run_folder / message.folder, str(message.position), str(trainer.position),
                                      "ask the replica that holds that state")  # fmt: skip
            recipe = fingerprint(self._recipe)
            keep = self._recipe.checkpoint.keep
            folder = self._run_folder / message.folder
            path, digest = checkpoint.save(trainer, folder, self._run_folder.name, recipe, keep)
            if message.export and self._model is not None and self._tokenizer is not None:
                export(self._model, self._tokenizer, self._run_folder / "export")
        except (CheckpointError, OSError) as error:
            self._log.error("checkpoint not written", step=message.position.step, why=str(error))
            self._client.send(CheckpointFailed(message.position, str(error)))
            return
        self._log.info("checkpoint written", path=str(path), seconds=round(time.perf_counter() - started, 3))
        # relative to the run folder, as the order was, so that the folder may be moved
        self._client.send(CheckpointSaved(message.position, f"{message.folder}/{path.name}", digest))

    def _send_weights(self, message: SendWeights, _frames: Sequence[Frame]) -> None:
        trainer = self._loaded()
        trainer.adopt(message.position)
        if self._publisher.offered != message.position:
            if trainer.position != message.position:
                cause = f"expected to hold {message.position}, but this replica holds {trainer.position}"
                self._client.send(WeightsFailed(message.epoch, message.position, cause))
                return
            self._publisher.offer(message.position, stage(trainer.model))
        self._publisher.publish(message)

    def _send_state(self, message: SendState, _frames: Sequence[Frame]) -> None:
        trainer = self._loaded()
        trainer.adopt(message.position)
        self._peers.send(message, trainer)

    def _receive_state(self, message: ReceiveState, _frames: Sequence[Frame]) -> None:
        if self._model is None:
            raise TrainerError("a state came before the model was made: expected LoadState first")
        if self._peers.answer_again(message, self._trainer):
            return
        self._trainer = None  # what the model held is about to be overwritten
        self._client.hold(None)
        started = time.perf_counter()
        trainer = self._peers.receive(message, lambda at: Trainer(self._built(), self._recipe, at, self._meshes.using))
        if trainer is None:
            return
        self._trainer = trainer
        self._client.hold(trainer.position)
        seconds = round(time.perf_counter() - started, 3)
        self._log.info("state received", step=trainer.position.step, version=trainer.position.version, seconds=seconds)

    def _check_state(self, message: CheckState, _frames: Sequence[Frame]) -> None:
        trainer = self._loaded()
        trainer.adopt(message.position)
        self._peers.check(message, trainer)

    def _drain(self, message: Drain, _frames: Sequence[Frame]) -> int:
        self._log.info("drained", why=message.cause)  # leases are answered at once: nothing is to be handed back
        return EXIT_DONE

    def _shutdown(self, message: Shutdown, _frames: Sequence[Frame]) -> int:
        self._log.info("the run is over", why=message.cause)
        return EXIT_DONE

    def _built(self) -> PreTrainedModel:
        assert self._model is not None
        return self._model

    def _loaded(self) -> Trainer:
        if self._trainer is None:
            raise TrainerError("a command came before the model was loaded: expected LoadState first")
        return self._trainer


def fingerprint(recipe: Recipe) -> str:
    """A short name for a resolved recipe, kept in checkpoints."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]


class _Signals:
    """SIGTERM and SIGINT: ask the service to leave in good order, or, where that is not to be had, interrupt it."""

    def __init__(self) -> None:
        self.service: PolicyService | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.service is None or not self.service.leave():
            raise Stopped

    def ignore(self) -> None:
        """A further signal must not tear the goodbye."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def main(arguments: ServiceArguments) -> int:
    """Run one policy process until its exit code is known; see shared.service for what the codes mean."""
    log = get_logger()
    signals = _Signals()
    try:
        return _serve(arguments, signals)
    except Fenced as error:
        log.warning("fenced: a newer process has this replica's name", why=str(error))
        return EXIT_FENCED
    except Refusal as error:
        log.error("the controller does not want this replica", why=str(error))
        return EXIT_RESTART
    except Stopped:
        log.info("stopped by a signal")
        return EXIT_DONE


def _serve(arguments: ServiceArguments, signals: _Signals) -> int:
    recipe = arguments.recipe
    torch.set_num_threads(recipe.policy.threads)
    if recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)
    disable_progress_bar()  # a service's output is its log
    datasets, problem = _open_datasets(recipe)
    identities = [dataset.identity for dataset in datasets.values()]
    client = BusClient(
        arguments.controller, role="policy", replica=arguments.replica, settings=recipe.bus, datasets=identities
    )
    goodbye: str | None = None
    try:
        client.start(recipe.timeouts.register_s)
        service = signals.service = PolicyService(arguments, client, datasets)
        code = service.run() if problem is None else service.give_up(problem)
        if code != EXIT_FENCED:
            goodbye = f"this replica ends with code {code}"  # said last: all that was sent before it has arrived
        return code
    except Stopped:
        goodbye = "this replica was stopped by a signal"
        raise
    finally:
        signals.ignore()
        client.close(goodbye)


def _open_datasets(recipe: Recipe) -> tuple[dict[str, Dataset], DataError | None]:
    """The data set whose rows SFT leases name, or why it cannot be opened: the controller has to hear of that."""
    if recipe.sft is None:
        return {}, None
    name = recipe.sft.dataset
    try:
        return {name: open_dataset(name, recipe.data[name])}, None
    except DataError as error:
        return {}, error
