"""The steps of a batch in a replica of several ranks: the weights and metrics of one process afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import filterfalse
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from services.policy.speed import of_the_machine
from shared.messages import CommitStep, Position

SCRIPT = str(Path(__file__).with_name("one_rank.py"))


@pytest.mark.parametrize(
    ("layout", "groups"),
    [({"replicate": 3}, 1), ({"pp": 2, "fsdp": 2}, 3)],
    ids=["copies, one without a row", "stages of sharded weights"],
)
def test_ranks_hold_the_weights_and_metrics_of_one_process(
    tools: Any, tmp_path: Path, layout: dict[str, int], groups: int
) -> None:
    """Two steps on one batch: the second has the weights before the first, and the reference's, beside its own."""
    recipe = tools.recipe(
        policy__micro_batch_tokens=16, policy__parallel=layout, train__mu=2, train__kl_weight=0.1, train__lr=1e-2
    )
    positions = [Position(0, 0, 0), Position(0, 0, 1)]
    steps = [tools.step(recipe, at, index=at.step, of=2, groups=groups) for at in positions]
    told = msgspec.msgpack.encode(
        {
            "recipe": recipe.model_dump(exclude_none=True),
            "steps": [(step, [bytes(frame) for frame in frames]) for step, frames in steps],
        }
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(tmp_path / "store"), str(tmp_path / f"{rank}")],
            stdin=subprocess.PIPE, env=environment,
        )
        for rank in range(recipe.policy.parallel.ranks)
    ]  # fmt: skip
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write(told)
        process.stdin.close()
    alone = tools.trainer(recipe)
    expected = []
    for step, frames in steps:
        expected.append(alone.compute(step, frames).metrics)
        alone.apply(CommitStep(step.step, step.attempt, 0))
    assert [process.wait(60) for process in ranks] == [0] * len(ranks)
    owned = [load_file(tmp_path / f"{rank}") for rank in range(len(ranks))]
    for name, weight in alone.model.named_parameters():
        whole = torch.stack([part[name] for part in owned]).sum(0)  # each element is some one rank's
        torch.testing.assert_close(
            whole, weight.detach(), rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for rank in range(len(ranks)):
        for own, true in zip(json.loads((tmp_path / f"{rank}.json").read_text()), expected, strict=True):
            for name in filterfalse(of_the_machine, true):
                assert own[name] == pytest.approx(true[name], rel=1e-3, abs=1e-5), name
