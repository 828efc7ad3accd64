"""One rank of a replica, for test_steps.py: forms the world, computes and applies the steps of a batch.

`python one_rank.py RANK STORE OUT`: on standard input the recipe and the steps with their frames, and whether they are
computed on a device apart; OUT gets those of the whole weights that this rank owns, zeros elsewhere, OUT.json the
metrics of each step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from services.policy import checkpoint, state
from services.policy.device import CPU
from services.policy.layouts.compose import layout_of
from services.policy.layouts.grid import Grid
from services.policy.ranks.group import form_world, leave_world, store_at
from services.policy.trainer import Trainer
from shared.config import Recipe
from shared.messages import CommitStep, GradientsReady, TrainStep
from shared.models import load_model
from shared.weights.slices import Box, Parallel


def no_mesh(epoch: int) -> None:
    raise AssertionError(f"no mesh of epoch {epoch}")


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    told = msgspec.msgpack.decode(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    if told["apart"]:
        from pretended import pretended

        with pretended() as device:
            work(rank, store, out, told, device)
    else:
        work(rank, store, out, told, CPU)


def work(rank: int, store: str, out: str, told: dict[str, Any], device: torch.device) -> None:
    recipe = Recipe.model_validate(told["recipe"])
    world = recipe.policy.parallel.ranks
    form_world(rank, world, store_at(store, world), interface="lo", timeout_s=60.0)
    grid = Grid.form(Parallel.of(recipe.policy.parallel), rank, 60.0)
    layout = layout_of(load_model(recipe.model, 0, weights=True), recipe, grid, device)
    assert {tensor.device for tensor in (*layout.model.parameters(), *layout.model.buffers())} == {device}
    steps = [(msgspec.convert(step, TrainStep), frames) for step, frames in told["steps"]]
    trainer = Trainer(layout, recipe, steps[0][0].position, no_mesh)  # type: ignore[arg-type]  # never called
    metrics = []
    for step, frames in steps:
        vote = trainer.compute(step, frames)
        assert isinstance(vote, GradientsReady)
        metrics.append(vote.metrics)
        trainer.apply(CommitStep(step.step, step.attempt, step.position.lineage))
    staged, _ = state.stage(layout)
    boxes = layout.shared.owned()[rank]
    whole = {spec.name: torch.zeros(spec.shape) for spec in layout.manifest}
    for name, part in staged.tensors.items():
        whole[name][boxes[name].within(Box.whole(whole[name].shape))] = part
    save_file(whole, out)
    Path(out + ".json").write_bytes(msgspec.json.encode(metrics))
    if layout.whole:
        go_on(trainer, recipe, Path(out).parent, device)
    leave_world()


def go_on(trainer: Trainer, recipe: Recipe, folder: Path, device: torch.device) -> None:
    """A checkpoint of the state, and a trainer that it is loaded into, which then holds the same."""
    whole = {name: tensor.cpu().clone() for name, tensor in state.tensors_of(trainer).items()}
    head = state.head_of(trainer)
    path, _ = checkpoint.save(head, whole, folder / "checkpoints", "run", "recipe", 1)
    again = Trainer(
        layout_of(load_model(recipe.model, 1, weights=True), recipe, device=device), recipe, head.position, no_mesh
    )  # type: ignore[arg-type]
    checkpoint.load(again, path, head.position)
    assert state.state_digest(head, state.tensors_of(again)) == state.state_digest(head, whole)


main()
