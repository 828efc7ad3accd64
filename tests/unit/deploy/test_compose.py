"""Which container is which replica, and what a run adds to the description of its containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.compose import docker as docker_module
from deploy.compose.container import ContainerProcess
from deploy.compose.docker import DockerError, docker
from deploy.compose.project import additions, check_images, project_name, reads
from deploy.container.entry import NamelessError, own_number
from deploy.container.names import Container, container_of, replica_of
from deploy.plan import launch_plan
from shared.config import Recipe, RecipeError
from shared.config.schema import WeightsTable

BASE: dict[str, Any] = {
    "model": {"build": {}},
    "data": {"a": {"kind": "jsonl", "path": "a.jsonl"}},
    "sft": {"dataset": "a", "batches": 1, "batch_size": 1, "lr": 1e-3},
    "evaluation": {"suites": {"a": {}}},
}
RUN = Path("/runs/it")


def recipe(**tables: object) -> Recipe:
    return Recipe.model_validate({**BASE, **tables})


MIXED = recipe(rollout={"engine": ["vllm", "transformers", "vllm"], "replicas": 3}, evaluator={"engine": "own"})


def test_names_and_containers_are_each_others_inverse() -> None:
    for each in (recipe(), recipe(rollout={"engine": "sglang"}), MIXED):
        names = [f"{role}-{number}" for role in ("policy", "rollout", "evaluator") for number in range(7)]
        containers = [container_of(each, name) for name in names]
        assert len(set(containers)) == len(names)
        assert [replica_of(each, container) for container in containers] == names


def test_replicas_of_an_engine_are_a_service_which_compose_counts_from_one() -> None:
    assert [container_of(MIXED, f"rollout-{number}") for number in range(4)] == [
        Container("rollout-vllm", 1),
        Container("rollout", 1),
        Container("rollout-vllm", 2),
        Container("rollout-vllm", 3),
    ]
    assert container_of(recipe(), "rollout-2") == Container("rollout", 3)


def test_a_container_of_an_engine_that_the_recipe_does_not_have_is_no_replica() -> None:
    with pytest.raises(ValueError, match=r"service rollout-sglang: expected one .*\(rollout, rollout-vllm\)"):
        replica_of(MIXED, Container("rollout-sglang", 1))
    with pytest.raises(ValueError, match="'by-hand': expected the name of a replica"):
        container_of(recipe(), "by-hand")


def test_a_container_learns_its_number_once_the_name_server_knows_it() -> None:
    answers = iter(["", "10.79.0.3  a1b2c3", "10.79.0.3       orrery-x-rollout-12.orrery-x_default\n"])
    assert own_number("orrery-x", "rollout", lambda: next(answers)) == 12


def test_a_container_that_has_no_number_says_what_it_is_called() -> None:
    with pytest.raises(NamelessError, match=r"got '10.1.1.1 orrery-x-rollout-vllm-1.net'"):
        own_number("orrery-x", "rollout", lambda: "10.1.1.1 orrery-x-rollout-vllm-1.net", patience_s=0.0)


def test_each_replica_of_a_recipe_has_gpus_of_its_own_and_added_ones_have_the_next() -> None:
    weights = WeightsTable.model_construct(**{**WeightsTable().model_dump(), "backend": "nccl"})
    on_gpus = recipe(policy={"parallel": {"tp": 2}}, rollout={"replicas": 2}).model_copy(update={"weights": weights})
    plan = launch_plan(on_gpus)
    assert [[*plan.gpus_of(name)] for name in ("policy-0", "rollout-0", "rollout-1")] == [[0, 1], [2], [3]]
    assert [[*plan.gpus_of(name)] for name in ("rollout-2", "rollout-3")] == [[4], [5]]


def added(each: Recipe, keys: Path = Path("/keys")) -> dict[str, Any]:
    services = additions(launch_plan(each), RUN, keys, 5001, Path("/here"))["services"]
    assert isinstance(services, dict)
    return services


def test_a_services_command_is_that_of_the_launch_plan_but_for_the_name() -> None:
    services = added(recipe(rollout={"replicas": 2, "threads": 3}))
    assert services["controller"]["command"][-4:] == ["--bind", "tcp://0.0.0.0:5001", "--replica", "controller"]
    command = services["rollout"]["command"]
    assert command[:4] == ["python", "-m", "deploy.container.entry", "-m"]
    assert command[4:6] == ["services.rollout", "--recipe"] and "--replica" not in command
    assert command[-4:] == ["--controller", "tcp://controller:5001", "--set", "weights.interface=eth0"]
    assert services["rollout"]["scale"] == 2 and services["rollout"]["environment"]["OMP_NUM_THREADS"] == "3"


def test_services_of_engines_that_the_recipe_does_not_use_have_no_containers() -> None:
    services = added(recipe(rollout={"engine": "vllm"}))
    assert {name: service.get("scale") for name, service in services.items()} == {
        "controller": None, "policy": 1, "rollout-vllm": 1, "rollout": 0, "evaluator": 0, "evaluator-vllm": 0,
    }  # fmt: skip


def test_an_engine_that_only_a_scaled_run_comes_to_is_described() -> None:
    services = added(recipe(rollout={"engine": ["transformers", "vllm"], "replicas": 1}))
    assert (services["rollout"]["scale"], services["rollout-vllm"]["scale"]) == (1, 0)
    assert services["rollout-vllm"]["command"]


def test_keys_in_the_run_folder_are_covered_in_every_container() -> None:
    inside = added(recipe(), RUN / "keys")
    for name in ("controller", "policy", "rollout"):
        assert inside[name]["tmpfs"] == ["/runs/it/keys"]
    assert added(recipe())["policy"]["tmpfs"] == []


def test_what_the_recipe_reads_from_this_machine_is_there_under_the_same_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "m.py").touch()
    rewards = {"parts": [{"kind": "python", "path": str(tmp_path), "function": "m:f"}]}
    hub = {"h": {"kind": "huggingface", "path": "owner/set"}}
    assert reads(recipe(data={**BASE["data"], **hub}, rewards=rewards), tmp_path) == [tmp_path, tmp_path / "a.jsonl"]


def test_runs_of_the_same_name_in_two_places_are_two_projects() -> None:
    first, second = (project_name(Path(place) / "Quick.start-1") for place in ("/a", "/b"))
    assert first != second
    assert first.startswith("orrery-quick-start-1-")


def test_a_container_killed_by_a_signal_is_told_as_a_process_is() -> None:
    child = ContainerProcess.__new__(ContainerProcess)
    assert [child._code(status) for status in (0, 3, 137, 143, -9)] == [0, 3, -9, -15, -9]


def test_without_docker_a_person_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DockerError, match="expected the command 'docker', found none; install Docker with its Compose"):
        docker("version")


def test_a_missing_image_is_named_with_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = "orrery/controller:latest\norrery/policy:latest\n"
    monkeypatch.setattr("deploy.compose.project.docker", lambda *arguments: there)
    check_images(recipe())
    with pytest.raises(RecipeError, match='make images IMAGES="rollout-vllm"'):
        check_images(recipe(rollout={"engine": "vllm"}))


def test_what_a_shell_has_set_for_compose_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSE_FILE", "/elsewhere.yaml")
    monkeypatch.setenv("ORRERY_PORT", "1")
    seen: dict[str, str] = {}

    def run(command: object, *, env: dict[str, str], **options: object) -> Any:
        seen.update(env)
        raise FileNotFoundError

    monkeypatch.setattr(docker_module.subprocess, "run", run)
    with pytest.raises(DockerError):
        docker("version")
    assert "PATH" in seen and not {"COMPOSE_FILE", "ORRERY_PORT"} & seen.keys()
