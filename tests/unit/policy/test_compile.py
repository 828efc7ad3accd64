"""`policy.compile`: layers compiled once for all lengths give what they gave before; what cannot be is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from deploy.checks.recipe import look
from services.policy.layouts.compose import load_layout
from services.policy.trainer import Trainer
from shared import compiler
from shared.messages import GradientsReady, Position
from shared.models import ModelError


def step(trainer: Trainer, tools: Any, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    order, frames = tools.step(trainer.recipe, Position(0, 0, 0), seed=seed, attempt=1 + seed)
    vote = trainer.compute(order, frames)
    assert isinstance(vote, GradientsReady) and vote.finite
    return vote.metrics["loss"], tools.gradients(trainer)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    "options",
    [{"family": "qwen3"}, {"family": "qwen3_moe", "policy__gradient_checkpointing": True}],
    ids=["qwen3", "experts, layers computed again"],
)
def test_compiled_layers_give_the_loss_and_gradients_of_others_at_any_length(tools: Any, options: Any) -> None:
    torch.compiler.reset()
    counters.clear()
    plain, fast = (
        tools.trainer(tools.recipe(**options, policy__compile=c, policy__micro_batch_tokens=24)) for c in (False, True)
    )
    graphs = []
    for seed in range(6):
        (loss, gradients), (true_loss, truth) = step(fast, tools, seed), step(plain, tools, seed)
        assert loss == pytest.approx(true_loss, rel=1e-5, abs=1e-7)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 24, "layers share their graphs"
    assert graphs[2] == graphs[-1], f"compiled again for every length: {graphs}"
    assert not counters["recompile_limit"]


@pytest.mark.parametrize("lacks", ["compiler", "headers"])
def test_without_what_builds_code_it_is_refused_by_the_policy_and_before_a_run(
    tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: str
) -> None:
    if lacks == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler -O3")
        said = r"policy\.compile: expected a C\+\+ compiler, got no 'no-such-compiler' in PATH"
    else:
        monkeypatch.setattr(compiler.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
        said = r"policy\.compile: expected the headers of Python, got no Python\.h"
    recipe = tools.recipe(policy__compile=True)
    with pytest.raises(ModelError, match=said):
        load_layout(recipe, weights=True)
    assert any(fault.startswith("policy.compile: expected") for fault in look(recipe).faults)
