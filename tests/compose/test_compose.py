"""A run in real containers: it scales and fails as on this machine, and outlives its launcher."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from deploy.compose.project import ORDINARY_USER
from deploy.keys import renew_key
from deploy.local.folder import holder
from tests.compose.conftest import NewRun
from tests.compose.engine import KEPT, ROOT, Engine, run

pytestmark = pytest.mark.compose
HERE = ROOT / "deploy" / "compose"


def test_the_description_and_the_dockerfile_are_sound(engine: Engine) -> None:
    files = ["--file", str(HERE / "compose.yaml"), "--file", str(HERE / "gpu.yaml")]
    shown = json.loads(engine.docker("compose", *files, "--profile", "*", "config", "--format", "json"))
    for name, service in shown["services"].items():
        assert service["user"] == "10001:10001" and service["read_only"] and service["healthcheck"]["test"], name
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert bool(devices) == (name != "controller"), name
    silent = ["docker", "compose", *files, "--profile", "*", "config", "--quiet"]
    assert run(["sh", "-c", f"{shlex.join(silent)} 2>&1"], engine.environment) == ""
    assert run([str(KEPT / "tools" / "bin" / "hadolint"), str(HERE / "Dockerfile")]) == ""


def foreign_keys(keys: Path, folder: Path) -> Path:
    """The keys of a run that were renewed since: the right controller's, and one of a rollout that is of no use."""
    foreign = folder / "foreign"
    shutil.copytree(keys, foreign, ignore=shutil.ignore_patterns("containers"))
    renew_key(foreign, "rollout")
    for path in (foreign, *foreign.iterdir()):
        os.chown(path, ORDINARY_USER, ORDINARY_USER)
    return foreign


def test_a_run_does_all_its_steps_though_containers_are_killed(
    new_run: NewRun, recipe: Path, tmp_path: Path, engine: Engine
) -> None:
    run = new_run().up(recipe, "rollout.replicas=2", "train.batches=150")
    run.wait_for_steps(4, "train")
    run.docker_kill("controller")
    run.wait_for_steps(12, "train")
    run.docker_kill("rollout-1")
    # the killed one must be back before the run is over, however fast the others are
    run.orrery("pause", str(run.folder))
    foreign = foreign_keys(run.folder / "keys", tmp_path)
    strangers = run.stranger("rollout-7", recipe, None), run.stranger("rollout-8", recipe, foreign)
    run.wait_for(lambda: run.incarnations().get("rollout-1") == 2, "the killed rollout to come back")
    run.orrery("scale", "rollout=3", "--run", str(run.folder))
    run.wait_for(lambda: "rollout-2" in run.incarnations(), "a third rollout")
    everybody = ("controller", "policy-0", "rollout-0", "rollout-1", "rollout-2")
    run.wait_for(lambda: run.healthy(*everybody), "every container to be healthy")

    assert run.inside("rollout-2", "id", "-u") == "10001"
    assert run.inside("rollout-2", "ls", "/run/secrets") == "rollout.key"
    # the run's keys lie below an empty file system
    assert run.inside("rollout-2", "grep", "--count", f"^tmpfs {run.folder}/keys ", "/proc/mounts") == "1"
    found = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
    assert [run.inside(each, "python", "-c", found) for each in ("controller", "policy-0")] == ["False", "True"]
    assert "rollout-2" in run.orrery("status", str(run.folder))

    causes = {
        "rollout-7": "one side has keys, the other has none",
        "rollout-8": "its key is not on the controller's list",
    }
    for replica, cause in causes.items():
        told = run.folder / "logs" / f"{replica}.jsonl"
        run.wait_for(lambda told=told, cause=cause: cause in told.read_text(), f"{replica} to be refused")
    assert run.refused("handshake") and run.refused("key")
    engine.docker("rm", "--force", *strangers)
    run.orrery("scale", "rollout=2", "--run", str(run.folder))
    run.wait_for(lambda: run.left() == ["rollout-2"], "the third rollout to leave")

    run.orrery("resume", str(run.folder))
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert audit.terms == 2
    assert run.incarnations() == {"policy-0": 1, "rollout-0": 1, "rollout-1": 2, "rollout-2": 1}
    assert run.containers() == {}
    volumes = engine.docker("volume", "ls", "--quiet").split()
    assert "orrery-huggingface" in volumes and not [name for name in volumes if name.startswith(run.project)]
    told = run.orrery("logs", str(run.folder))
    assert "rollout-1 ended (killed by SIGKILL)" in told and "controller ended (killed by SIGKILL)" in told


def test_containers_outlive_their_launcher_and_are_scaled_by_compose(
    new_run: NewRun, recipe: Path, engine: Engine
) -> None:
    run = new_run().up(recipe, "train.batches=3000")
    run.wait_for_steps(2, "train")
    run.kill_launcher()
    done = len(run.steps("train", 1))
    run.wait_for(lambda: len(run.steps("train", 1)) >= done + 5, "steps without a launcher")

    environment = ["--env-file", str(run.folder / "compose.env")]
    engine.docker("compose", *environment, "up", "--detach", "--no-recreate", "--scale", "rollout=3")
    run.wait_for(lambda: {"rollout-1", "rollout-2"} <= run.incarnations().keys(), "the rollouts that Compose added")

    engine.docker("compose", *environment, "up", "--detach", "--no-recreate", "--scale", "rollout=1")
    run.wait_for(
        lambda: sorted(run.left()) == ["rollout-1", "rollout-2"], "the rollouts that Compose took away to leave"
    )

    run.resume()
    run.wait_for(lambda: holder(run.folder) is not None, "the next launcher")
    run.docker_kill("rollout-0")
    run.wait_for(lambda: run.incarnations().get("rollout-0") == 2, "the next launcher to start what is killed")
    run.kill_launcher()
    assert "in containers whose launcher has ended" in run.orrery("status", str(run.folder))
    run.orrery("down", str(run.folder))
    audit = run.audit()
    assert audit.clean and audit.outcome == "stopped" and audit.terms == 1
    assert run.incarnations() == {"policy-0": 1, "rollout-0": 2, "rollout-1": 1, "rollout-2": 1}
    assert run.containers() == {}
