"""Checkpoints beside training: whole copies, one at a time, and said to be saved when they are."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.policy import checkpoint, saving
from services.policy.copies import Copies
from services.policy.layouts.grid import Grid
from services.policy.learner import Learner
from services.policy.saving import Saver
from services.policy.trainer import Trainer
from shared.messages import CheckpointFailed, CheckpointSaved, CommitStep, LoadState, Position, SaveCheckpoint


class Disk:
    """Writes checkpoints as the real one, each when it is let, or raises what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: queue.Queue[Position] = queue.Queue()
        self.lets = threading.Semaphore(0)
        self.fails: Exception | None = None
        self._save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self._save_when_let)

    def _save_when_let(self, head: Any, *rest: Any) -> Any:
        self.begun.put(head.position)
        assert self.lets.acquire(timeout=20), "the test let nobody write"
        if self.fails is not None:
            raise self.fails
        return self._save(head, *rest)


class Policy:
    """A trainer, its saver, and what that said."""

    def __init__(self, tools: Any, folder: Path, **options: Any) -> None:
        self.tools, self.folder = tools, folder / "run-1"
        self.recipe = tools.recipe(**options)
        learner = Learner(self.recipe, self.folder, lambda epoch: pytest.fail("no mesh"), Grid.alone())
        learner.load(LoadState("initial", tools.start, ""))
        self.said: queue.Queue[Any] = queue.Queue()
        self.trainer: Trainer = learner.loaded()
        self.saver = Saver(self.recipe, self.folder, self.said.put, Copies(learner, self._alone).take)

    @staticmethod
    def _alone(_order: Any) -> Any:
        return nullcontext([])

    def train(self, of: int = 1, batches: int = 1) -> None:
        for _ in range(batches):
            here = self.trainer.position
            step, frames = self.tools.step(self.recipe, here, stage="sft", of=of, seed=here.step)
            self.trainer.compute(step, frames)
            self.trainer.apply(CommitStep(step.step, step.attempt, here.lineage))

    def save(self) -> SaveCheckpoint:
        order = SaveCheckpoint(self.trainer.position, "checkpoints", False)
        self.saver.save(order, self.trainer, None)
        return order

    def hear(self) -> Any:
        return self.said.get(timeout=20)


@pytest.fixture
def policy(tools: Any, tmp_path: Path) -> Policy:
    return Policy(tools, tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.lets.release(10)


def test_steps_beside_the_writing_change_nothing_of_what_is_written(policy: Policy, disk: Disk) -> None:
    policy.train()
    before = policy.tools.weights(policy.trainer)
    order = policy.save()
    disk.begun.get(timeout=20)
    policy.train(batches=2)
    assert policy.said.empty(), "nothing is durable yet"
    disk.lets.release()
    saved = policy.hear()
    assert saved == CheckpointSaved(order.position, "checkpoints/1", saved.digest)
    written = load_file(policy.folder / saved.path / checkpoint.MODEL)
    assert all(torch.equal(written[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(written[name], tensor) for name, tensor in policy.tools.weights(policy.trainer).items())
    assert checkpoint.verify(policy.folder / saved.path).position == order.position


def test_an_order_that_comes_again_is_answered_once_by_its_writing_and_again_after_it(
    policy: Policy, disk: Disk
) -> None:
    order = policy.save()
    policy.train()
    policy.saver.save(order, policy.trainer, None)
    disk.lets.release()
    saved = policy.hear()
    assert isinstance(saved, CheckpointSaved) and policy.said.empty()
    policy.saver.save(order, policy.trainer, None)
    assert policy.hear() == saved, "though the trainer has gone on since"
    assert disk.begun.qsize() == 1


def test_the_next_snapshot_waits_for_the_write_under_way(
    policy: Policy, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, wait = policy.saver._copy, policy.saver.wait
    waits = threading.Event()
    ended_before: list[bool] = []

    def copy_and_note(*asked: Any) -> Any:
        ended_before.append(policy.said.qsize() == 1)
        return copy(*asked)

    def wait_and_note() -> bool:
        waits.set()
        return wait()

    policy.save()
    policy.train()
    monkeypatch.setattr(policy.saver, "_copy", copy_and_note)
    monkeypatch.setattr(policy.saver, "wait", wait_and_note)
    second = threading.Thread(target=policy.save)
    second.start()
    assert waits.wait(20)
    assert not ended_before
    disk.lets.release(2)
    second.join(20)
    assert ended_before == [True]
    assert [policy.hear().position.step for _ in range(2)] == [0, 1]


def test_one_that_is_written_for_too_long_fails_the_next_by_name(tools: Any, tmp_path: Path, disk: Disk) -> None:
    policy = Policy(tools, tmp_path, timeouts__checkpoint_s=0.01)
    policy.save()
    policy.train()
    policy.save()
    failed = policy.hear()
    assert failed.position.step == 1 and "timeouts.checkpoint_s" in failed.cause
    disk.lets.release()
    assert isinstance(policy.hear(), CheckpointSaved), "the one before is none the worse"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no header")])
def test_whatever_goes_wrong_in_the_thread_is_told_and_the_same_order_is_tried_again(
    policy: Policy, disk: Disk, error: Exception
) -> None:
    disk.fails = error
    disk.lets.release(2)
    order = policy.save()
    failed = policy.hear()
    assert isinstance(failed, CheckpointFailed) and str(error) in failed.cause
    assert policy.saver.wait()
    disk.fails = None
    policy.saver.save(order, policy.trainer, None)
    assert isinstance(policy.hear(), CheckpointSaved)


def test_one_that_failed_and_cannot_be_tried_again_fails_for_the_same_reason(policy: Policy, disk: Disk) -> None:
    disk.fails = OSError(28, "No space left on device")
    disk.lets.release()
    order = policy.save()
    failed = policy.hear()
    policy.train()
    policy.saver.save(order, policy.trainer, None)
    assert policy.hear() == failed


def test_the_middle_of_a_batch_is_not_saved(policy: Policy, disk: Disk) -> None:
    policy.train(of=2)
    policy.save()
    assert "between two batches" in policy.hear().cause and disk.begun.empty()


def test_without_memory_for_the_snapshot_it_fails_and_training_goes_on(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(policy.saver, "_copy", none)
    policy.save()
    assert "Cannot allocate memory" in policy.hear().cause
    policy.train()


def test_snapshots_of_the_same_tensors_take_over_their_memory(policy: Policy) -> None:
    """Before the first step there are no moments: that copy has no room for the next one."""
    memory = []
    for _ in range(3):
        policy.save()
        assert isinstance(policy.hear(), CheckpointSaved)
        assert policy.saver._area is not None
        memory.append(policy.saver._area.memory.data_ptr())
        assert checkpoint.verify(policy.folder / "checkpoints" / str(policy.trainer.position.step))
        written = load_file(policy.folder / "checkpoints" / str(policy.trainer.position.step) / checkpoint.MODEL)
        held = policy.tools.weights(policy.trainer)
        assert all(torch.equal(written[name], tensor) for name, tensor in held.items())
        policy.train()
    assert memory[1] == memory[2]


def test_the_fingerprint_names_a_recipe(tools: Any) -> None:
    assert saving.fingerprint(tools.recipe()) == saving.fingerprint(tools.recipe())
    assert saving.fingerprint(tools.recipe()) != saving.fingerprint(tools.recipe(run__seed=3))
