"""One launch plan for every launcher: what each process of a recipe needs, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli.app import app
from deploy.local.plan import check_gpus, own_gpus, start_of
from deploy.plan import Place, launch_plan
from shared.config import Recipe, RecipeError
from shared.gpus import VISIBLE

BASE = {
    "model": {"build": {}},
    "data": {"a": {"kind": "jsonl", "path": "a.jsonl"}},
    "sft": {"dataset": "a", "batches": 1, "batch_size": 1, "lr": 1e-3},
    "evaluation": {"suites": {"a": {}}},
}


def recipe(**tables: object) -> Recipe:
    return Recipe.model_validate({**BASE, **tables})


def test_the_plan_begins_with_the_controller_and_the_replicas_of_the_recipe() -> None:
    plan = launch_plan(recipe(policy={"replicas": 2}, evaluator={"engine": "own"}))
    assert [p.name for p in plan.processes] == ["controller", "policy-0", "policy-1", "rollout-0", "evaluator-0"]
    assert [p.name for p in launch_plan(recipe()).processes] == ["controller", "policy-0", "rollout-0"]


def test_a_policy_has_the_ranks_of_its_layout_and_an_engine_has_one_more_than_holds_the_model() -> None:
    parallel = {"tp": 2, "fsdp": 4}
    plan = launch_plan(
        recipe(
            policy={"parallel": parallel, "threads": 3}, rollout={"engine": ["vllm", "sglang"], "parallel": {"tp": 2}}
        )
    )
    assert (plan.replica("policy-0").ranks, plan.replica("policy-0").cpus) == (8, 24)
    assert [plan.replica(f"rollout-{n}").environment for n in range(3)] == ["vllm", "sglang", "vllm"]
    assert plan.replica("rollout-0").ranks == 3


def test_without_nccl_nobody_is_given_a_gpu() -> None:
    assert {process.gpus for process in launch_plan(recipe()).processes} == {0}


def test_every_launcher_gets_the_same_arguments_but_for_the_place() -> None:
    plan = launch_plan(recipe())
    there = Place("/run/config.toml", "/run", "tcp://h:1", "/run/controller.address")
    assert plan.controller.arguments(there)[-4:] == ("--bind", "tcp://h:1", "--replica", "controller")
    rollout = plan.replica("rollout-7")
    assert rollout.arguments(there)[-4:] == ("--controller", "/run/controller.address", "--replica", "rollout-7")
    assert start_of(rollout, there).command[1:] == rollout.arguments(there)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(
        '[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n'
        '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
    )
    return path


def test_orrery_plan_prints_every_process_as_json(file: Path) -> None:
    shown = CliRunner().invoke(app, ["plan", str(file), "--json", "--set", "rollout.replicas=2"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert [each["name"] for each in told] == ["controller", "policy-0", "rollout-0", "rollout-1"]
    assert told[3]["command"] == ["python", *launch_plan(recipe()).replica("rollout-1").arguments(Place())]


def test_orrery_plan_prints_a_line_for_replicas_that_are_alike(file: Path) -> None:
    shown = CliRunner().invoke(app, ["plan", str(file), "--set", "rollout.replicas=3"])
    assert shown.exit_code == 0, shown.output
    assert "rollout-0, rollout-1, rollout-2" in shown.stdout
    assert "in all: 5 processes, 5 ranks, 0 GPUs" in shown.stdout


def test_each_replica_here_has_gpus_of_its_own_or_shares_those_that_are_there() -> None:
    plan = launch_plan(recipe(policy={"parallel": {"fsdp": 2}}, rollout={"replicas": 2}))
    names = ("policy-0", "rollout-0", "rollout-1")
    seen = {
        count: [own_gpus(plan, name, [f"g{n}" for n in range(count)]).get(VISIBLE) for name in names]
        for count in (0, 1, 2, 4)
    }
    assert seen == {
        0: [None, None, None],
        1: ["g0", "g0", "g0"],
        2: ["g0,g1", "g0", "g1"],
        4: ["g0,g1", "g2", "g3"],
    }


def test_a_machine_with_too_few_gpus_is_refused_with_who_wants_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.local.plan.names", lambda: ["0"])
    check_gpus(recipe())
    wants = recipe(weights={"backend": "nccl"}, policy={"parallel": {"fsdp": 2}})
    with pytest.raises(RecipeError, match="expected 3 GPUs on this machine .*2 for policy-0, 1 for rollout-0.*found 1"):
        check_gpus(wants)
    monkeypatch.setattr("deploy.local.plan.names", lambda: ["0", "1", "2"])
    check_gpus(wants)
