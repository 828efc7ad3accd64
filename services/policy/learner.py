"""What one rank of a policy holds: its part of the model, and its trainer. All ranks make the same calls.

Invariant: `trainer` is None while the model holds nothing that could be trained on: before the first load, and until
another policy's state has come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from services.policy import checkpoint, state
from services.policy.batch import BatchError
from services.policy.checkpoint import CheckpointError
from services.policy.device import CPU
from services.policy.heap import bound_kernels
from services.policy.layouts.compose import Layout, load_layout
from services.policy.layouts.grid import Grid
from services.policy.ranks import parcels
from services.policy.ranks.orders import Kind
from services.policy.trainer import Trainer, TrainerError
from shared.config import Recipe
from shared.data.dataset import DataError
from shared.mesh import Mesh, MeshError
from shared.messages import LoadState, Position
from shared.models import ModelError
from shared.telemetry import get_logger
from shared.weights import StagedWeights, TensorSpec, area_bytes, open_shared, tensor_views

FATAL = (ModelError, DataError, CheckpointError, BatchError)
"""Errors that a fresh process would meet again."""


def kind_of(error: Exception) -> Kind:
    """What an error of a learner means, on any rank."""
    if isinstance(error, MeshError):
        return "mesh"
    return "fatal" if isinstance(error, FATAL) else "restart"


def prepare_torch(recipe: Recipe, device: torch.device) -> None:
    """Threads, the device, determinism, memory and silence, the same on every rank."""
    bound_kernels()
    torch.set_num_threads(recipe.policy.threads)
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants one size of workspace for it
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    disable_progress_bar()  # a service's output is its log


class Learner:
    """The layout and trainer of this rank, whose place is `grid`; `meshes` are those of steps with other replicas.

    `device` is where it computes; `far` are the ranks that do not share memory with rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        meshes: Callable[[int], AbstractContextManager[Mesh]],
        grid: Grid,
        far: Collection[int] = (),
        device: torch.device = CPU,
    ) -> None:
        self.layout: Layout | None = None
        self.trainer: Trainer | None = None
        self._recipe, self._run_folder = recipe, run_folder
        self._meshes, self._grid, self._far, self._device = meshes, grid, sorted(far), device

    def load(self, order: LoadState) -> bool:
        """Hold the state that the order names; False, and nothing is held, if it will come from another policy.

        So it does when the checkpoint was deleted because the others have gone on. ModelError, CheckpointError.
        """
        if order.source == "peer":
            self.forget()
            return False
        if self.trainer is not None and self.trainer.position == order.position:
            return True
        started = time.perf_counter()
        trainer = self._trainer(self._lay_out(weights=order.source == "initial"), order.position)
        if order.source == "checkpoint":
            path = self._run_folder / order.path
            try:
                checkpoint.load(trainer, path, order.position)
            except CheckpointError as error:
                if not checkpoint.superseded(path):
                    raise
                get_logger().warning("the others have gone on, and their checkpoints with them", why=str(error))
                self.forget()
                return False
        self.trainer = trainer
        seconds = round(time.perf_counter() - started, 3)
        get_logger().info("model loaded", source=order.source, step=order.position.step, seconds=seconds)
        return True

    def forget(self) -> None:
        """Hold nothing; the model stands, and another policy's state will come into it."""
        self.trainer = None
        if self.layout is None:
            self._lay_out(weights=False)
        get_logger().info("the model stands; its state comes from another policy")

    def take(self, head: state.Head, manifest: list[TensorSpec], memory: str | Tensor) -> Trainer:
        """Hold another policy's state, which lies in `memory` as `manifest` says; WeightsError if it does not fit.

        `memory` is rank 0's, or the path by which the ranks of its node open it.
        """
        self.trainer = None  # what the model held is about to be overwritten
        layout = self.built()
        trainer = self._trainer(layout, head.position)
        if self._is_far:
            parts = parcels.accept(layout, manifest)
        else:
            tensors = _opened(memory, manifest)
            if self._grid.rank == 0:
                for rank in self._far:
                    parcels.hand_out(layout, rank, tensors)
            parts = state.cut(layout, tensors)
        state.restore(trainer, head, parts)
        self.trainer = trainer
        return trainer

    def stage(self, position: Position) -> tuple[StagedWeights, int]:
        """A copy of what this rank owns of the weights, as they are now, and what that adds to their digest."""
        trainer = self.loaded()
        trainer.adopt(position)
        return state.stage(trainer.layout)

    def gather(self, position: Position, manifest: list[TensorSpec], memory: str | Tensor) -> None:
        """Put what this rank owns of the replica's state into `memory`, as `take` reads it."""
        trainer = self.loaded()
        trainer.adopt(position)
        if self._is_far:
            parcels.give(trainer)
            return
        targets = _opened(memory, manifest)
        state.write(trainer, targets)
        if self._grid.rank == 0:
            for rank in self._far:
                parcels.collect(trainer.layout, rank, targets)

    def built(self) -> Layout:
        """The model, whatever it holds; TrainerError before it was made."""
        if self.layout is None:
            raise TrainerError("a command came before the model was made: expected LoadState first")
        return self.layout

    def loaded(self) -> Trainer:
        """The trainer; TrainerError if no state is held."""
        if self.trainer is None:
            raise TrainerError("a command came before the model was loaded: expected LoadState first")
        return self.trainer

    @property
    def _is_far(self) -> bool:
        return self._grid.rank in self._far

    def _lay_out(self, *, weights: bool) -> Layout:
        self.trainer, self.layout = None, None  # give the memory back first
        torch.manual_seed(self._recipe.run.seed)
        self.layout = load_layout(self._recipe, self._grid, self._device, weights=weights)
        return self.layout

    def _trainer(self, layout: Layout, position: Position) -> Trainer:
        return Trainer(layout, self._recipe, position, self._meshes)


def _opened(memory: str | Tensor, manifest: list[TensorSpec]) -> dict[str, Tensor]:
    opened = memory if isinstance(memory, Tensor) else open_shared(memory, area_bytes(manifest))
    return tensor_views(opened, manifest)
