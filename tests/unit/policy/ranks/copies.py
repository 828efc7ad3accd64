"""One of several ranks that hold whole copies, for test_copies.py: forms the world, computes, applies.

`python copies.py RANK WORLD STORE OUT`: on standard input the recipe, step and frames; OUT gets weights and gradients,
OUT.json the metrics.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from services.policy.ranks.group import Ranks, form_world, leave_world
from services.policy.trainer import Trainer
from shared.config import Recipe
from shared.messages import CommitStep, GradientsReady, TrainStep
from shared.models import load_model
from shared.weights.staging import named_weights


def no_mesh(epoch: int) -> None:
    raise AssertionError(f"no mesh of epoch {epoch}")


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    told = msgspec.msgpack.decode(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(told["recipe"])
    step = msgspec.convert(told["step"], TrainStep)
    form_world(rank, world, store, interface="lo", timeout_s=60.0)
    ranks = Ranks(1 << 12)
    trainer = Trainer(load_model(recipe.model, 0, weights=True), recipe, step.position, no_mesh, ranks)  # type: ignore[arg-type]  # never called
    vote = trainer.compute(step, told["frames"])
    assert isinstance(vote, GradientsReady)
    gradients = {f"gradient/{n}": p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    trainer.apply(CommitStep(step.step, step.attempt, step.position.lineage))
    save_file({**{n: t.detach() for n, t in named_weights(trainer.model).items()}, **gradients}, out)
    Path(out + ".json").write_bytes(msgspec.json.encode(vote.metrics))
    leave_world()


main()
