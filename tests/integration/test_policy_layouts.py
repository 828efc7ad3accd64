"""Runs whose policy is cut over several ranks, each of which has a part of the model."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from services.policy import checkpoint
from services.policy.layouts.compose import layout_of
from services.policy.state import head_of, tensors_of
from services.policy.trainer import Trainer
from shared.config import load_recipe
from shared.messages import Position
from shared.models import load_model
from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run

pytestmark = pytest.mark.integration

TWO_HEADS = "model.build.kv_heads=2"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] % 11).logits


def assert_export_is_the_last_checkpoint(run: Run) -> None:
    recipe = load_recipe(run.folder / "config.toml")
    newest = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None
    model = load_model(recipe.model, 1, weights=False)
    model.load_state_dict(load_file(newest / checkpoint.MODEL), strict=False)
    model.tie_weights()
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)
    torch.testing.assert_close(logits_of(exported), logits_of(model), atol=1e-5, rtol=0)


def test_a_policy_of_four_ranks_trains_and_feeds_its_rollout(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.parallel.fsdp=2", "policy.parallel.tp=2", TWO_HEADS, "checkpoint.every=10")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    assert_export_is_the_last_checkpoint(run)
    for rank in (1, 2, 3):
        log = (run.folder / "logs" / f"policy-0.{rank}.jsonl").read_text()
        assert "model loaded" in log, "each rank has a log of its own"


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_goes_on_in_another_and_in_one_process(new_run: NewRun, recipe: Path) -> None:
    pipeline = ("policy.parallel.pp=2", "policy.parallel.tp=2")
    run = new_run().up(recipe, *pipeline, TWO_HEADS, "checkpoint.every=5", "sft.batches=60")
    sharded = ("policy.parallel.pp=1", "policy.parallel.tp=1", "policy.parallel.fsdp=4")
    for layout in (sharded, ("policy.parallel.fsdp=1",)):
        run.wait_for_steps(len(run.metrics()) + 5, "sft")
        run.kill(SUPERVISOR, signal.SIGINT)
        assert run.wait() == 130, run.story()
        run.resume(*layout)
    assert run.wait() == 0, run.story()
    assert run.assert_complete().rollbacks == []
    assert_export_is_the_last_checkpoint(run)


def test_wherever_a_writer_is_killed_the_newest_complete_checkpoint_loads(tmp_path: Path, recipe: Path) -> None:
    made = load_recipe(recipe)
    layout = layout_of(load_model(made.model, 1, weights=True), made)

    def written(step: int) -> None:
        trainer = Trainer(layout, made, Position(1, step, step), lambda epoch: pytest.fail("there is one member"))
        trainer.begin_stage("train")
        checkpoint.save(head_of(trainer), tensors_of(trainer), tmp_path / "checkpoints", "run", "recipe", 2)

    draw = random.Random(7)
    started = time.perf_counter()
    written(1)
    takes_s = time.perf_counter() - started
    finished = killed = 0
    for step in range(2, 52):
        before = checkpoint.newest(tmp_path / "checkpoints")
        assert before is not None
        child = os.fork()
        if child == 0:  # nothing of the parent's may run to its end here
            written(step)
            os._exit(0)
        writer = os.pidfd_open(child)
        ended, _, _ = select.select([writer], [], [], draw.uniform(0.0, takes_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        finished, killed = finished + bool(ended), killed + (not ended)
        newest = checkpoint.newest(tmp_path / "checkpoints")
        assert newest is not None and int(newest.name) in (step, int(before.name))
        assert int(newest.name) == step or not ended
        position = checkpoint.read_state(newest).position
        again = Trainer(layout, made, position, lambda epoch: pytest.fail("there is one member"))
        checkpoint.load(again, newest, position)
        assert again.position == position
    assert killed >= 10, f"{finished} of 50 writers had finished before they were killed: the instants were no test"
