"""The service as a whole: a real bus client on one side, this test as the controller on the other."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from services.policy import checkpoint
from services.policy.service import PolicyService
from shared.bus import BusClient, Incoming, RouterBus
from shared.config.schema import BusTable, DataTable
from shared.data import open_dataset
from shared.data.dataset import Dataset
from shared.messages import (
    AbortStep,
    AnyMessage,
    CheckpointFailed,
    CheckpointSaved,
    CheckState,
    CommitStep,
    Drain,
    GradientsReady,
    Grant,
    GroupReport,
    Lease,
    Leaving,
    LoadState,
    MeshFailed,
    Position,
    ReceiveState,
    Register,
    Registered,
    ReplicaFailed,
    RevokeMesh,
    Sampling,
    SaveCheckpoint,
    SendWeights,
    Shutdown,
    StateDigest,
    StateLoaded,
    StepApplied,
    WeightsFailed,
)
from shared.service import EXIT_DONE, EXIT_FATAL, ServiceArguments

QUICK = BusTable(heartbeat_s=0.05, resend_s=0.05, lost_after_s=5.0)
START = Position(0, 0, 0)


class Controller:
    """The controller's end of the bus in a thread: welcomes, acknowledges, and keeps what it is told."""

    def __init__(self, context: zmq.Context) -> None:
        self.told: queue.Queue[Any] = queue.Queue()
        self._context = context
        self._ready = threading.Event()
        self._peer = b""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bus = RouterBus("inproc://policy-test", term=1, settings=QUICK, context=self._context)
        await self._bus.start()
        self._ending = asyncio.Event()
        self._ready.set()
        receiving = asyncio.create_task(self._receive())
        await self._ending.wait()
        receiving.cancel()
        await self._bus.close()

    async def _receive(self) -> None:
        while True:
            incoming = await self._bus.recv()
            self._take(incoming)

    def _take(self, incoming: Incoming) -> None:
        body, envelope = incoming.envelope.body, incoming.envelope
        if isinstance(body, Register):
            self._peer = incoming.peer
            self._bus.open_session(incoming.peer, envelope.sender, envelope.rank, 1)
            self._bus.reply(incoming, Registered(1, body.leases))
        elif body.reliable:
            self._bus.durable(incoming.peer, envelope.sequence)
            self.told.put(body)

    def tell(self, message: AnyMessage, frames: Sequence[Any] = ()) -> None:
        self._loop.call_soon_threadsafe(self._bus.send, self._peer, message, tuple(frames))

    def hear(self, kind: type) -> Any:
        found = self.told.get(timeout=30)
        assert isinstance(found, kind), found
        return found

    def ask(self, message: AnyMessage, kind: type, frames: Sequence[Any] = ()) -> Any:
        self.tell(message, frames)
        return self.hear(kind)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)


class Running:
    """A policy service in a thread, and the controller that it obeys."""

    def __init__(self, recipe: Any, folder: Path, datasets: dict[str, Dataset]) -> None:
        context = zmq.Context()
        self.recipe, self.folder = recipe, folder
        self.controller = Controller(context)
        self.client = BusClient(
            "inproc://policy-test", role="policy", replica="policy-0", settings=QUICK, context=context
        )
        self.client.start(10.0)
        arguments = ServiceArguments(recipe, folder, "inproc://policy-test", None, "policy-0")
        self.service = PolicyService(arguments, self.client, datasets)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.service.run()

    def wait(self) -> int | None:
        self._thread.join(30)
        return self.code

    def end(self) -> None:
        if self.code is None:
            self.controller.tell(Shutdown("the test is over"))
            self.wait()
        self.client.close()
        self.controller.end()


@pytest.fixture
def running(tools: Any, tmp_path: Path) -> Iterator[Running]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2 + 2?", "answer": "4", "response": "<answer>4</answer>"}) + "\n")
    dataset = open_dataset("rows", DataTable(kind="jsonl", path=str(rows)))
    started = Running(tools.recipe(), tmp_path / "run-1", {"rows": dataset})
    yield started
    started.end()


def load(running: Running) -> Any:
    return running.controller.ask(LoadState("initial", START, ""), StateLoaded)


def test_the_model_is_loaded_once_and_a_repeated_order_answered_again(running: Running) -> None:
    assert load(running) == StateLoaded(START)
    trainer = running.service._learner.trainer
    assert load(running) == StateLoaded(START)
    assert running.service._learner.trainer is trainer


def test_an_sft_lease_is_reported_at_once(running: Running) -> None:
    load(running)
    identity = running.service._datasets["rows"].identity
    grant = Grant(3, 1, 0, "sft", "rows", identity.fingerprint, 0, 0, 5, 1, Sampling(1.0, 1.0, 0, 16), 0, 0, 60.0)
    report = running.controller.ask(Lease([grant]), GroupReport)
    assert (report.group, report.attempt, len(report.arrays)) == (3, 1, 4)


def test_a_step_is_computed_committed_saved_and_loaded_again(running: Running, tools: Any) -> None:
    controller = running.controller
    load(running)
    step, frames = tools.step(running.recipe)
    vote = controller.ask(step, GradientsReady, frames)
    assert vote.finite
    assert controller.ask(step, GradientsReady, frames) == vote
    applied = controller.ask(CommitStep(0, 1, 0), StepApplied)
    assert applied.position == Position(0, 1, 1)
    assert controller.ask(CommitStep(0, 1, 0), StepApplied) == applied
    save = SaveCheckpoint(applied.position, "checkpoints", True)
    saved = controller.ask(save, CheckpointSaved)
    assert saved.path == "checkpoints/1"
    assert controller.ask(save, CheckpointSaved) == saved
    assert checkpoint.read_state(running.folder / saved.path).digest == saved.digest
    assert (running.folder / "export" / "model.safetensors").is_file()
    # a new lineage starts from it
    assert controller.ask(LoadState("checkpoint", Position(1, 1, 1), saved.path), StateLoaded).position.lineage == 1


def test_whoever_waits_for_anothers_state_forgets_its_own_and_takes_no_step(running: Running, tools: Any) -> None:
    controller = running.controller
    load(running)
    assert controller.ask(CheckState(START), StateDigest).position == START
    assert controller.ask(LoadState("peer", START, ""), StateLoaded) == StateLoaded(None)
    step, frames = tools.step(running.recipe)
    controller.tell(step, frames)
    controller.tell(AbortStep(0, 1, 0, "its state did not arrive"))
    assert load(running) == StateLoaded(START), "it has said nothing else, and lives"


def test_a_checkpoint_that_later_ones_have_replaced_is_no_error_but_a_state_to_be_received(running: Running) -> None:
    controller = running.controller
    (running.folder / "checkpoints" / "7").mkdir(parents=True)
    order = LoadState("checkpoint", Position(0, 3, 3), "checkpoints/3")
    assert controller.ask(order, StateLoaded) == StateLoaded(None)
    failed = controller.ask(LoadState("checkpoint", Position(0, 9, 9), "checkpoints/9"), ReplicaFailed)
    assert failed.fatal, "nobody has gone on: it should be there"
    assert running.wait() == EXIT_FATAL


def test_a_state_that_does_not_come_is_told_as_a_mesh_that_failed(running: Running) -> None:
    controller = running.controller
    controller.ask(LoadState("peer", START, ""), StateLoaded)
    controller.tell(ReceiveState(4, START))
    assert controller.ask(LoadState("initial", START, ""), StateLoaded) == StateLoaded(START)


def test_an_aborted_step_leaves_nothing_to_commit(running: Running, tools: Any) -> None:
    load(running)
    step, frames = tools.step(running.recipe)
    running.controller.ask(step, GradientsReady, frames)
    running.controller.tell(AbortStep(0, 1, 0, "a member was lost"))
    failed = running.controller.ask(CommitStep(0, 1, 0), ReplicaFailed)
    assert not failed.fatal and "gradients in hand" in failed.cause
    assert running.wait() == 1


def test_a_checkpoint_of_a_state_that_is_not_held_fails_without_ending_the_replica(running: Running) -> None:
    load(running)
    failed = running.controller.ask(SaveCheckpoint(Position(0, 4, 4), "checkpoints", False), CheckpointFailed)
    assert "version=4" in failed.cause
    load(running)


def test_a_payload_that_does_not_fit_is_fatal_by_name(running: Running, tools: Any) -> None:
    load(running)
    step, frames = tools.step(running.recipe)
    group = msgspec.structs.replace(step.groups[0], lengths=[1000])
    step = msgspec.structs.replace(step, groups=[group, *step.groups[1:]])
    failed = running.controller.ask(step, ReplicaFailed, frames)
    assert failed.fatal and "'tokens' should have shape (1000,)" in failed.cause
    assert running.wait() == EXIT_FATAL


def test_a_checkpoint_that_is_not_there_is_fatal_by_name(running: Running) -> None:
    failed = running.controller.ask(LoadState("checkpoint", Position(0, 9, 9), "checkpoints/9"), ReplicaFailed)
    assert failed.fatal and "checkpoints/9" in failed.cause
    assert running.wait() == EXIT_FATAL


def test_a_command_before_the_model_is_loaded_ends_the_replica_for_a_restart(running: Running, tools: Any) -> None:
    failed = running.controller.ask(CommitStep(0, 1, 0), ReplicaFailed)
    assert not failed.fatal and "LoadState" in failed.cause
    assert running.wait() == 1


def test_weights_over_a_mesh_that_does_not_stand_fail_and_training_goes_on(running: Running, tools: Any) -> None:
    load(running)
    failed = running.controller.ask(SendWeights(5, START), WeightsFailed)
    assert "epoch 5" in failed.cause
    step, frames = tools.step(running.recipe)
    assert running.controller.ask(step, GradientsReady, frames).finite


def test_a_step_over_a_revoked_mesh_is_not_voted_on_and_can_be_assigned_anew(running: Running, tools: Any) -> None:
    load(running)
    running.controller.tell(RevokeMesh(5, "policy-1 was lost"))
    step, frames = tools.step(running.recipe, mesh=5)
    running.controller.tell(step, frames)
    running.controller.tell(AbortStep(0, 1, 0, "policy-1 was lost"))
    again = msgspec.structs.replace(step, attempt=2, mesh=None)
    assert running.controller.ask(again, GradientsReady, frames).attempt == 2


def test_a_mesh_that_this_replica_does_not_belong_to_is_answered_even_before_loading(
    running: Running, tools: Any
) -> None:
    from shared.messages import FormMesh

    assert running.controller.ask(FormMesh(tools.identity(4, "a", "b"), 1.0), MeshFailed).epoch == 4


@pytest.mark.parametrize("order", [Shutdown("done"), Drain("scaled down")])
def test_the_end_of_the_run_and_a_drain_end_the_process_with_code_0(running: Running, order: AnyMessage) -> None:
    running.controller.tell(order)
    assert running.wait() == EXIT_DONE


@pytest.mark.parametrize("order", [Shutdown("done"), Drain("scaled down")])
def test_whoever_ends_in_good_order_finishes_the_checkpoint_under_way(running: Running, order: AnyMessage) -> None:
    load(running)
    running.controller.tell(SaveCheckpoint(START, "checkpoints", False))
    running.controller.tell(order)
    assert running.wait() == EXIT_DONE
    assert checkpoint.verify(running.folder / "checkpoints" / "0").position == START
    assert running.controller.hear(CheckpointSaved).position == START


def test_asked_to_leave_it_tells_so_and_goes_when_it_is_drained(running: Running) -> None:
    load(running)
    assert running.service.leave()
    running.controller.hear(Leaving)
    assert running.code is None
    running.controller.tell(Drain("nobody needs it"))
    assert running.wait() == EXIT_DONE


def test_before_there_is_a_model_or_asked_again_it_need_not_wait(running: Running) -> None:
    assert not running.service.leave()
    load(running)
    assert running.service.leave()
    assert not running.service.leave()
