"""A scripted controller at the BusClient boundary, and a rollout service on a tiny model behind it."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from services.rollout.process import dataset_names
from services.rollout.rewards_pool import RewardsPool
from services.rollout.service import RolloutService
from shared.bus import Delivery, Fenced
from shared.config import Recipe
from shared.mesh import Mesh, form_mesh
from shared.messages import (
    FormMesh,
    Grant,
    LeaseRef,
    LoadState,
    MeshFormed,
    MeshIdentity,
    MeshMember,
    Message,
    Position,
    Purpose,
    ReceiveWeights,
    Sampling,
    WeightsLoaded,
)
from shared.models import load_model
from shared.serving.process import open_datasets
from shared.weights import StagedWeights, manifest_of, receive_weights, send_weights
from tests.staged import stage
from tests.unit.mesh.threads import Rendezvous

Sent = TypeVar("Sent", bound=Message)
PATIENCE_S = 60.0


def recipe_of(folder: Path, **rollout: Any) -> Recipe:
    """Sums in a JSON lines file, and a model of two small layers."""
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)]
    rows.append({"prompt": "x" * 300, "answer": "long"})
    rows.append({"prompt": 5, "answer": "bad"})
    path = folder / "sums.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Recipe.model_validate(
        {
            "run": {"deterministic": rollout.pop("deterministic", False)},
            "model": {
                "build": {
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "layers": 2,
                    "heads": 2,
                    "kv_heads": 1,
                    "head_dim": 16,
                    "context": 256,
                }
            },
            "data": {"sums": {"kind": "jsonl", "path": str(path)}},
            "train": {"dataset": "sums", "batches": 1, "batch_size": 4, "lr": 1e-3, "max_staleness": 0},
            "evaluation": {"suites": {"sums": {"problems": 4}}},
            "rewards": {"parts": [{"kind": "verifier"}, {"kind": "format", "weight": 0.5}]},
            "rollout": {"slots": 8, **rollout},
        }
    )


class ScriptedBus:
    """What the service sees of a BusClient: an inbox that the test fills, an outbox that it reads."""

    term, incarnation = 1, 1

    def __init__(self) -> None:
        self.inbox: deque[Message | Delivery] = deque()
        self.sent: list[tuple[Message, Sequence[Any]]] = []
        self.leases: set[LeaseRef] = set()
        self.held: Position | None = None
        self.state = ""
        self.fenced = False
        self.waits: list[float] = []
        self.rendezvous = Rendezvous()
        self._lock = threading.Lock()
        self.request = self.rendezvous.request

    def send(self, message: Message, frames: Sequence[Any] = ()) -> None:
        with self._lock:
            self.sent.append((message, [bytes(frame) for frame in frames]))

    def receive(self, timeout_s: float) -> Delivery | None:
        self.waits.append(timeout_s)
        if self.fenced:
            raise Fenced("incarnation", "2", "1", "end")
        if not self.inbox:
            return None
        first = self.inbox.popleft()
        return first if isinstance(first, Delivery) else Delivery(first)  # type: ignore[arg-type]

    def hold(self, position: Position | None) -> None:
        self.held = position

    def take_lease(self, ref: LeaseRef) -> None:
        self.leases.add(ref)

    def drop_lease(self, ref: LeaseRef) -> None:
        self.leases.discard(ref)

    def progress(self, state: str, count: int) -> None:
        self.state = state

    def of(self, kind: type[Sent]) -> list[Sent]:
        """The messages of one kind that were sent so far."""
        with self._lock:
            return [message for message, _ in self.sent if isinstance(message, kind)]

    def frames_of(self, wanted: Message) -> Sequence[bytes]:
        return next(frames for message, frames in self.sent if message is wanted)


class Rig:
    """A service, its scripted controller, and a policy at the other end of a real Gloo mesh."""

    def __init__(self, folder: Path, **rollout: Any) -> None:
        self.folder = folder
        self.recipe = recipe_of(folder, **rollout)
        self.datasets = open_datasets(self.recipe, dataset_names(self.recipe))
        self.bus = ScriptedBus()
        self.pool = RewardsPool(
            self.recipe.data, self.recipe.rewards.parts, workers=1, timeout_s=30.0, memory_mb=2048, start_timeout_s=60.0
        )
        self.service = RolloutService(
            self.recipe, folder / "run", "rollout-0", self.bus, self.datasets, self.pool  # type: ignore[arg-type]
        )  # fmt: skip
        self._policies = ThreadPoolExecutor(max_workers=1)
        self._policy_meshes: list[Mesh] = []
        self._epoch = 0
        self.sums = self.datasets["sums"].identity

    def close(self) -> None:
        self.service._meshes.close("the test is over")
        for mesh in self._policy_meshes:
            mesh.abort("the test is over")
        self._policies.shutdown(wait=True)
        self.pool.close()

    def tell(self, *messages: Message) -> None:
        """Have the service take these messages in one turn of its loop."""
        self.bus.inbox.extend(messages)
        self.service.turn()

    def until(self, done: Callable[[], bool]) -> None:
        """Turn the service's loop until `done()`."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, f"nothing came of it; sent: {[m for m, _ in self.bus.sent]}"
            self.service.turn()

    def sync(self, version: int, *, lineage: int = 0, seed: int | None = None) -> tuple[PreTrainedModel, WeightsLoaded]:
        """Send weights made from `seed` over a new mesh until the service has loaded them."""
        model = load_model(self.recipe.model, version if seed is None else seed, weights=True)
        message, sending = self.begin_sync(model, version, lineage=lineage)
        before = len(self.bus.of(WeightsLoaded))
        self.tell(message)
        self.until(lambda: len(self.bus.of(WeightsLoaded)) > before)
        sending.result(PATIENCE_S)
        return model, self.bus.of(WeightsLoaded)[-1]

    def begin_sync(
        self, model: torch.nn.Module, version: int, *, lineage: int = 0
    ) -> tuple[ReceiveWeights, Future[None]]:
        """Form a mesh and start to send; the message to give to the service, and the sender's end."""
        self._epoch += 1
        members = [MeshMember("policy-0", 1, 0), MeshMember("rollout-0", 1, 0)]
        identity = MeshIdentity("weights", self._epoch, "gloo", f"id{self._epoch}".encode(), members)

        def policy() -> None:
            mesh = form_mesh(
                identity, 0, self.bus.request, interface="lo", form_timeout_s=30.0, operation_timeout_s=30.0
            )
            self._policy_meshes.append(mesh)
            send_weights(stage(model), mesh, self.recipe.weights.bucket_mb << 20)

        sending = self._policies.submit(policy)
        self.tell(FormMesh(identity, 30.0))
        self.until(lambda: any(formed.epoch == self._epoch for formed in self.bus.of(MeshFormed)))
        return ReceiveWeights(self._epoch, Position(lineage, version, version)), sending

    def begin_relay(self, model: torch.nn.Module) -> tuple[int, Future[StagedWeights]]:
        """Form a mesh whose source is the service; its epoch, and what another replica receives over it."""
        self._epoch += 1
        members = [MeshMember("rollout-0", 1, 0), MeshMember("rollout-1", 1, 0)]
        identity = MeshIdentity("weights", self._epoch, "gloo", f"id{self._epoch}".encode(), members)

        def receiver() -> StagedWeights:
            mesh = form_mesh(
                identity, 1, self.bus.request, interface="lo", form_timeout_s=30.0, operation_timeout_s=30.0
            )
            self._policy_meshes.append(mesh)
            return receive_weights(manifest_of(model), mesh, self.recipe.weights.bucket_mb << 20)

        received = self._policies.submit(receiver)
        self.tell(FormMesh(identity, 30.0))
        self.until(lambda: any(formed.epoch == self._epoch for formed in self.bus.of(MeshFormed)))
        return self._epoch, received

    def ready(self, version: int = 1) -> PreTrainedModel:
        """Make the engine and give it its first weights."""
        self.service.start()
        self.tell(LoadState("initial", Position(0, 0, 0), ""))
        return self.sync(version)[0]

    def grant(self, group: int, *, purpose: Purpose = "train", row: int = 0, attempt: int = 1, **other: Any) -> Grant:
        fields: dict[str, Any] = {
            "lineage": 0,
            "dataset": "sums",
            "fingerprint": self.sums.fingerprint,
            "epoch": 0,
            "seed": group,
            "samples": 1 if purpose == "eval" else 3,
            "sampling": Sampling(0.0 if purpose == "eval" else 1.0, 1.0, 0, 10),
            "revision": 0,
            "version": 0,
            "deadline_s": 60.0,
        }
        return Grant(group=group, attempt=attempt, purpose=purpose, row=row, **(fields | other))
