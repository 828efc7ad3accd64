"""Ranks that hold whole copies and share a step's rows: they end with the gradients of one process, and equal bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from services.policy.ranks.group import check_built
from shared.config import RecipeError
from shared.config.schema import PolicyParallelTable

SCRIPT = str(Path(__file__).with_name("copies.py"))


@pytest.mark.parametrize(("world", "groups"), [(2, 3), (3, 1)])
def test_the_ranks_hold_the_gradients_and_metrics_of_one_process(
    tools: Any, tmp_path: Path, world: int, groups: int
) -> None:
    """With one group of two samples, the third rank has no row at all."""
    recipe = tools.recipe(policy__micro_batch_tokens=16)
    step, frames = tools.step(recipe, groups=groups)
    told = msgspec.msgpack.encode(
        {"recipe": recipe.model_dump(exclude_none=True), "step": step, "frames": [bytes(frame) for frame in frames]}
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world), str(tmp_path / "store"), str(tmp_path / f"{rank}")],
            stdin=subprocess.PIPE, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write(told)
        process.stdin.close()
    alone = tools.trainer(recipe)
    expected = alone.compute(step, frames)
    gradients = tools.gradients(alone)
    assert [process.wait(60) for process in ranks] == [0] * world
    metrics = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    held = [load_file(tmp_path / f"{rank}") for rank in range(world)]
    for name, gradient in gradients.items():
        torch.testing.assert_close(held[0][f"gradient/{name}"], gradient, rtol=1e-4, atol=1e-6)
    for other in held[1:]:
        assert other.keys() == held[0].keys()
        assert all(torch.equal(tensor, held[0][name]) for name, tensor in other.items())
    for own in metrics:
        for name, value in expected.metrics.items():
            if name != "train_seconds":
                assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("axis", ["pp", "fsdp", "ep", "cp", "tp"])
def test_axes_that_are_not_built_are_refused_by_name(axis: str) -> None:
    with pytest.raises(RecipeError, match=rf"policy\.parallel\.{axis} = 2: not built yet"):
        check_built(PolicyParallelTable.model_validate({axis: 2}))


def test_copies_are_built() -> None:
    check_built(PolicyParallelTable(replicate=4))
