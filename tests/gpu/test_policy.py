"""Policies that compute on GPUs: the losses of those on CPUs, in whole runs, in a step alone, and by several ranks.

The engine of these runs is transformers', which computes on the CPU.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.gpus import VISIBLE, identities
from tests.integration.run import SUPERVISOR, Run, write_recipe

pytestmark = pytest.mark.gpu
SETS = ("run.deterministic=true", "train.max_staleness=0", "sft.batches=12", "train.batches=3", "checkpoint.every=4")
HEADS = "model.build.kv_heads=2"
LAYOUTS = {"shards": "policy.parallel.fsdp=2", "tensors": "policy.parallel.tp=2", "stages": "policy.parallel.pp=2"}
SAME = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far losses may be apart, relatively."""
EXIT_INTERRUPTED = 130

Begin = Callable[..., Run]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Begins a run by name, on the GPUs or, "cpu", without any."""
    runs: list[Run] = []
    visible = os.environ.get(VISIBLE)

    def up(name: str, *sets: str) -> Run:
        if name == "cpu":
            monkeypatch.setenv(VISIBLE, "")
        elif visible is not None:
            monkeypatch.setenv(VISIBLE, visible)
        else:
            monkeypatch.delenv(VISIBLE, raising=False)
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name / "run"))
        return runs[-1].up(write_recipe(tmp_path / name), *SETS, *sets)

    yield up
    for run in runs:
        run.close()


def on_gpus(run: Run) -> bool:
    return "this replica computes on GPUs" in (run.folder / "logs" / "policy-0.jsonl").read_text()


def losses(run: Run) -> list[float]:
    """Of the stage whose rows are the same whatever a model makes of them."""
    return [line["loss"] for line in run.metrics() if line["stage"] == "sft"]


def two_gpus() -> None:
    if len(identities()) < 2:
        pytest.skip("wants two GPUs")


@pytest.mark.parametrize("dtype", SAME)
def test_a_policy_on_a_gpu_learns_what_one_on_a_cpu_does(begin: Begin, dtype: str) -> None:
    told = {}
    for name in ("gpu", "cpu"):
        run = begin(name, f"model.dtype={dtype}")
        assert run.wait() == 0, run.story()
        run.assert_complete()
        assert on_gpus(run) == (name == "gpu")
        told[name] = losses(run)
    assert told["gpu"] == pytest.approx(told["cpu"], rel=SAME[dtype])


def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(begin: Begin) -> None:
    whole = begin("whole")
    assert whole.wait() == 0, whole.story()
    run = begin("stopped")
    run.wait_for_steps(5, "sft")
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == EXIT_INTERRUPTED, run.story()
    assert run.resume().wait() == 0, run.story()
    assert run.assert_complete().rollbacks == []
    assert on_gpus(run)
    assert losses(run) == pytest.approx(losses(whole), rel=SAME["float32"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_ranks_with_a_gpu_each_learn_what_one_on_a_cpu_does(begin: Begin, layout: str) -> None:
    two_gpus()
    told = {}
    for name, sets in (("gpu", (HEADS, layout)), ("cpu", (HEADS,))):
        run = begin(name, *sets)
        assert run.wait() == 0, run.story()
        run.assert_complete()
        assert on_gpus(run) == (name == "gpu")
        told[name] = losses(run)
    assert told["gpu"] == pytest.approx(told["cpu"], rel=SAME["float32"])


def test_a_rank_that_is_killed_in_mid_step_takes_its_sibling_along_and_the_step_is_done_again(begin: Begin) -> None:
    """The sibling waits in a collective of NCCL, which nothing but the end of its process gets it out of."""
    two_gpus()
    run = begin("gpu", HEADS, LAYOUTS["tensors"], "sft.batches=40")
    run.wait_for_steps(5, "sft")
    both = [pid for pid, command in run.commands() if command[-1] in ("policy-0", "policy-0.1")]
    assert len(both) == 2, run.story()
    (member,) = [pid for pid, command in run.commands() if command[-1] == "policy-0.1"]
    run.signal(member, signal.SIGKILL)
    run.wait_for(lambda: not {pid for pid, _ in run.commands()} & set(both), "the end of both ranks", timeout_s=30.0)
    assert run.wait() == 0, run.story()
    run.assert_complete()


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_a_step_on_a_gpu_has_the_metrics_of_one_on_a_cpu(family: str, dtype: str) -> None:
    """With the weights before and the reference beside its own, and with the optimizer's state in the host's memory."""
    from services.policy.device import CPU, GPU
    from services.policy.layouts.compose import layout_of
    from services.policy.speed import of_the_machine
    from services.policy.trainer import Trainer
    from shared.messages import CommitStep, Position
    from shared.models import load_model
    from tests.unit.policy.conftest import make_recipe, make_step, no_mesh

    def metrics(device: Any, offload: bool) -> list[dict[str, float]]:
        recipe = make_recipe(family, model__dtype=dtype, train__mu=2, policy__optimizer_offload=offload)
        layout = layout_of(load_model(recipe.model, 0, weights=True), recipe, device=device)
        trainer = Trainer(layout, recipe, Position(0, 0, 0), no_mesh)
        found = []
        for index in range(2):
            step, frames = make_step(recipe, Position(0, 0, index), index=index, of=2, groups=5, samples=3)
            found.append(dict(trainer.compute(step, frames).metrics))
            trainer.apply(CommitStep(step.step, step.attempt, 0))
        return found

    for true, *others in zip(metrics(CPU, False), metrics(GPU, False), metrics(GPU, True), strict=True):
        for own in others:
            for name in true:
                if not of_the_machine(name):
                    assert own[name] == pytest.approx(true[name], rel=SAME[dtype], abs=1e-3), name
