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
PATIENCE_S = 150.0
"""For steps of a moment, in processes that import for most of it; the machine may be busy with other things."""


MODEL = {"hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "head_dim": 8, "context": 64}


@pytest.mark.parametrize(
    ("layout", "groups"),
    [({"replicate": 3}, 1), ({"pp": 2, "fsdp": 2}, 3)],
    ids=["copies, one without a row", "stages of sharded weights"],
)
def test_ranks_hold_the_weights_and_metrics_of_one_process(
    tools: Any, tmp_path: Path, layout: dict[str, int], groups: int
) -> None:
    """Two steps on one batch: the second has the weights before the first, and the reference's, beside its own."""
    compare(tools, tmp_path, {"family": "qwen3", "kv_heads": 1}, layout, groups, apart=False)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {}),
        ("qwen3", {"tp": 2, "sequence": True}),
        ("qwen3", {"pp": 2, "cp": 2}),
        ("qwen3_moe", {"ep": 2}),
        ("qwen3", {"fsdp": 2}),
    ],
    ids=["alone", "tensors", "stages and context", "experts", "shards"],
)
def test_a_model_on_a_device_apart_never_meets_a_tensor_that_was_left_on_the_cpu(
    tools: Any, tmp_path: Path, family: str, layout: dict[str, Any]
) -> None:
    """The same steps where only copies pass between the model's device and the CPU's memory, as on a GPU."""
    compare(tools, tmp_path, {"family": family, "kv_heads": 2}, layout, 4, apart=True)


def test_a_tensor_that_was_left_on_the_cpu_is_refused_there() -> None:
    """What the test above relies on."""
    script = """
import torch
from pretended import pretended
with pretended() as device:
    weight = torch.ones(3, device=device)
    assert float((weight * 2.0 + torch.ones(3).to(device)).cpu().sum()) == 9.0
    for wrong in (lambda: weight + torch.ones(3), lambda: weight.numpy(), lambda: torch.stack([weight, torch.ones(3)])):
        try:
            wrong()
        except RuntimeError:
            continue
        raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(SCRIPT).parent)


def compare(
    tools: Any, tmp_path: Path, model: dict[str, Any], layout: dict[str, Any], groups: int, *, apart: bool
) -> None:
    """Ranks, and one process: weights and metrics after two steps."""
    recipe = tools.recipe(
        model__build={**MODEL, **model},
        policy__micro_batch_tokens=16, policy__parallel=layout, train__mu=2, train__kl_weight=0.1, train__lr=1e-2,
    )  # fmt: skip
    positions = [Position(0, 0, 0), Position(0, 0, 1)]
    steps = [tools.step(recipe, at, index=at.step, of=2, groups=groups) for at in positions]
    told = msgspec.msgpack.encode(
        {
            "recipe": recipe.model_dump(exclude_none=True),
            "steps": [(step, [bytes(frame) for frame in frames]) for step, frames in steps],
            "apart": apart,
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
    assert [process.wait(PATIENCE_S) for process in ranks] == [0] * len(ranks)
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
