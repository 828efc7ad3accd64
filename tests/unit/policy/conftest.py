"""Tiny real models of every family, recipes for them, and steps with random payloads."""

from __future__ import annotations

import queue
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from services.policy.layouts.compose import layout_of
from services.policy.trainer import Trainer
from shared.arrays import Frame, pack
from shared.config import Recipe, live_values
from shared.mesh import Mesh
from shared.mesh.membership import MeshMembership
from shared.messages import (
    AssignedGroup,
    FormMesh,
    MeshFormed,
    MeshIdentity,
    MeshMember,
    Position,
    StoreGet,
    StoreSet,
    StoreValue,
    TrainStep,
)
from shared.models import load_model

START = Position(lineage=0, version=0, step=0)

Steps = Callable[..., tuple[TrainStep, list[Frame]]]


def make_recipe(family: str = "qwen3", **changes: Any) -> Recipe:
    """A recipe for a model of a few thousand parameters; keys are "table.key"."""
    tree: dict[str, Any] = {
        "model": {
            "build": {
                "family": family, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "kv_heads": 1,
                "head_dim": 8, "context": 64,
            }
        },
        "data": {"rows": {"kind": "reasoning_gym", "task": "chain_sum"}},
        "sft": {"dataset": "rows", "batches": 4, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
        "train": {"dataset": "rows", "batches": 4, "batch_size": 4, "lr": 1e-3, "kl_weight": 0.05},
    }  # fmt: skip
    for dotted, value in changes.items():
        table, key = dotted.split("__")
        tree.setdefault(table, {})[key] = value
    return Recipe.model_validate(tree)


def no_mesh(epoch: int) -> AbstractContextManager[Mesh]:
    raise AssertionError(f"a step of one member asked for the mesh of epoch {epoch}")


def make_trainer(recipe: Recipe, position: Position = START, meshes: Any = no_mesh) -> Trainer:
    return Trainer(layout_of(load_model(recipe.model, 0, weights=True), recipe), recipe, position, meshes)


def make_step(
    recipe: Recipe, position: Position = START, *, stage: str = "train", index: int = 0, of: int = 1, attempt: int = 1,
    groups: int = 3, samples: int = 2, seed: int = 0, keep: slice = slice(None), mesh: int | None = None,
    hyperparameters: dict[str, Any] | None = None, empty: bool = False, temperature: float = 1.0,
) -> tuple[TrainStep, list[Frame]]:  # fmt: skip
    """A step of random groups and its frames; `keep` gives a member's share, while the denominators stay global."""
    draw = np.random.default_rng(seed)
    assigned, payload = [], []
    tokens = 0
    for number in range(groups):
        lengths = [0 if empty else int(n) for n in draw.integers(1, 9, size=samples)]
        prompt = int(draw.integers(2, 7))
        total = sum(lengths)
        tokens += total
        headers, frames = pack(
            {
                "prompt": draw.integers(8, 120, prompt).astype(np.int32),
                "tokens": draw.integers(8, 120, total).astype(np.int32),
                "logprobs": (-5.0 + 0.3 * draw.standard_normal(total)).astype(np.float32),
                "versions": np.zeros(total, dtype=np.int32),
            }
        )
        advantages = draw.standard_normal(samples).tolist()
        assigned.append(AssignedGroup(number, 1, stage, prompt, lengths, advantages, temperature, headers))
        payload.append(frames)
    step = TrainStep(
        step=position.step, attempt=attempt, stage=stage, position=position, index=index, steps_in_batch=of, members=[],
        mesh=mesh, groups=assigned[keep], tokens=tokens, sequences=groups * samples, revision=0,
        hyperparameters={**live_values(recipe), **(hyperparameters or {})},
    )  # fmt: skip
    return step, [frame for frames in payload[keep] for frame in frames]


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    if not found and trainer.optimizer is not None:
        found = trainer.optimizer.gradients()
    return {name: gradient.clone() for name, gradient in found.items()}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(name="tools", scope="session")
def _tools() -> Any:
    """The functions of this file, for tests that cannot import it."""
    return types.SimpleNamespace(
        recipe=make_recipe,
        trainer=make_trainer,
        step=make_step,
        gradients=gradients,
        weights=weights,
        start=START,
        member=Member,
        rendezvous=Rendezvous,
        identity=identity,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Rendezvous:
    """Answers the questions of forming meshes as the controller does, for members in threads of one process."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], bytes] = {}
        self._changed = threading.Condition()

    def request(self, message: Any, timeout_s: float) -> StoreValue:
        with self._changed:
            key = (message.epoch, message.key)
            if isinstance(message, StoreSet):
                self._values[key] = message.value
                self._changed.notify_all()
            else:
                assert isinstance(message, StoreGet)
                self._changed.wait_for(lambda: key in self._values, min(timeout_s, message.timeout_s))
            return StoreValue(message.epoch, message.key, self._values.get(key))


class Member:
    """One member's membership, and the messages that it sent to the controller."""

    def __init__(self, name: str, rendezvous: Rendezvous) -> None:
        self.sent: queue.Queue[Any] = queue.Queue()
        self.meshes = MeshMembership(
            MeshMember(name, 1, 0), rendezvous.request, self.sent.put, interface="lo", operation_timeout_s=10.0
        )

    def next(self) -> Any:
        return self.sent.get(timeout=20)


def identity(epoch: int, *names: str) -> MeshIdentity:
    members = [MeshMember(name, 1, 0) for name in names]
    return MeshIdentity("weights", epoch, "gloo", f"id-{epoch}".encode(), members)


@pytest.fixture
def pair() -> Iterator[tuple[Member, Member]]:
    """Two members with a formed mesh of epoch 1: "a" is rank 0, "b" is rank 1."""
    rendezvous = Rendezvous()
    members = Member("a", rendezvous), Member("b", rendezvous)
    for member in members:
        member.meshes.form(FormMesh(identity(1, "a", "b"), 20.0))
    for member in members:
        assert member.next() == MeshFormed(1)
    yield members
    for member in members:
        member.meshes.close("the test is over")
