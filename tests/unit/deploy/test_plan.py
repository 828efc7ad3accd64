"""Which processes a recipe asks for, and how restarts are paced."""

from __future__ import annotations

import os
from pathlib import Path

from deploy.local.plan import plan_run
from deploy.local.supervisor import RestartRules
from shared.config import Recipe
from shared.service import PARENT_VARIABLE, parse_arguments

BASE = {
    "model": {"build": {}},
    "data": {"a": {"kind": "jsonl", "path": "a.jsonl"}},
    "sft": {"dataset": "a", "batches": 1, "batch_size": 1, "lr": 1e-3},
}


def recipe(**tables: object) -> Recipe:
    return Recipe.model_validate({**BASE, **tables})


def test_processes_have_the_role_of_their_name_and_the_threads_of_the_recipe(tmp_path: Path) -> None:
    plan = plan_run(recipe(rollout={"replicas": 2, "threads": 3}), tmp_path)
    for each, role, threads in ((plan.controller, "controller", "1"), (plan.replica("rollout-7"), "rollout", "3")):
        assert each.role == role
        assert each.environment["OMP_NUM_THREADS"] == threads
        assert each.environment[PARENT_VARIABLE] == str(os.getpid())


def test_everybody_gets_the_port_that_the_controller_binds(tmp_path: Path) -> None:
    plan = plan_run(recipe(), tmp_path)
    assert plan.address.startswith("tcp://127.0.0.1:")
    assert plan.address.rpartition(":")[2].isdigit()
    assert plan.address in plan.controller.command
    assert plan.address in plan.replica("policy-0").command


def test_a_port_that_the_recipe_names_is_kept(tmp_path: Path) -> None:
    assert plan_run(recipe(bus={"bind": "tcp://127.0.0.1:4321"}), tmp_path).address == "tcp://127.0.0.1:4321"
    plan = plan_run(recipe(bus={"bind": "tcp://0.0.0.0:4321"}), tmp_path)
    assert plan.address == "tcp://127.0.0.1:4321"
    assert "tcp://0.0.0.0:4321" in plan.controller.command


def test_services_understand_the_commands_that_are_planned(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n'
        '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
    )
    plan = plan_run(recipe(), tmp_path)
    for replica in (plan.controller, *map(plan.replica, ("policy-0", "rollout-1", "evaluator-0"))):
        understood = parse_arguments(replica.role, replica.command[3:])
        assert understood.replica == replica.replica
        assert understood.run_folder == tmp_path
        assert (understood.bind or understood.controller) == plan.address


def test_a_service_alone_needs_only_a_recipe_and_an_address(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[run]\nname = "solo"\n[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n'
        '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
    )
    alone = parse_arguments("rollout", ["--recipe", str(file), "--controller", "tcp://h:1", "--set", "run.seed=4"])
    controller = parse_arguments("controller", ["--recipe", str(file)])
    assert (alone.replica, alone.recipe.run.seed, alone.bind) == ("rollout-0", 4, None)
    assert controller.bind == "tcp://127.0.0.1:*"
    assert controller.run_folder == alone.run_folder == Path("runs/solo").absolute()


def test_pauses_between_restarts_grow_up_to_a_bound() -> None:
    rules = RestartRules(first_s=0.2, most_s=1.0)
    assert [rules.pause(count) for count in (1, 2, 3, 4, 50)] == [0.2, 0.4, 0.8, 1.0, 1.0]
