"""Persons steer whole runs: scale, drain, pause, change values; SIGTERM of services. Nothing is lost by any of it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli.live.sources import ask_controller
from tests.integration.conftest import NewRun
from tests.integration.run import ROOT, Run

pytestmark = pytest.mark.integration


def orrery(run: Run, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of a person in another terminal."""
    command = [sys.executable, "-m", "deploy.cli", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(command, cwd=run.folder.parent, env=environment, capture_output=True, text=True, timeout=60)


def status(run: Run) -> dict[str, Any]:
    return ask_controller(run.folder, 5.0) or {}


def states(run: Run, role: str) -> dict[str, str]:
    replicas = status(run).get("replicas", ())
    return {each["name"]: each["state"] for each in replicas if each["role"] == role}


def ready(run: Run, role: str, *names: str) -> Callable[[], bool]:
    """Whether exactly these replicas of a role are there, and ready."""

    def look() -> bool:
        there = {name: state for name, state in states(run, role).items() if state not in ("left", "lost")}
        return there == dict.fromkeys(names, "ready")

    return look


def test_rollouts_are_scaled_up_and_down_while_training_and_over_a_controller_kill(
    new_run: NewRun, recipe: Path
) -> None:
    run = new_run().up(recipe, "train.batches=400", "sft.batches=5")
    run.wait_for_steps(3, "train")
    told = orrery(run, "scale", "rollout=3", "--run", str(run.folder))
    assert "rollout-0, rollout-1, rollout-2" in told.stdout, told.stderr
    run.wait_for(ready(run, "rollout", "rollout-0", "rollout-1", "rollout-2"), "three rollouts")
    run.kill("controller")
    run.wait_for(ready(run, "rollout", "rollout-0", "rollout-1", "rollout-2"), "three rollouts in the new term")
    assert orrery(run, "scale", "rollout=1", "--run", str(run.folder)).returncode == 0
    run.wait_for(ready(run, "rollout", "rollout-0"), "one rollout")
    run.wait_for(lambda: len(run.pids("rollout")) == 1, "the end of two processes")
    committed = len(run.facts("committed"))
    run.wait_for(lambda: len(run.facts("committed")) > committed + 3, "steps with one rollout")
    gone = {(fact["replica"], fact["state"]) for fact in run.facts("gone")}
    assert {("rollout-1", "left"), ("rollout-2", "left")} <= gone
    assert not [fact for fact in run.facts("gone") if fact["state"] == "lost"]
    assert orrery(run, "drain", "policy-0", "--run", str(run.folder)).returncode == 1
    run.kill("supervisor", signal.SIGINT)
    assert run.wait() == 130, run.story()
    assert run.audit().clean


@pytest.mark.parametrize("role", ["rollout", "policy"])
def test_sigterm_of_a_service_loses_nothing_and_it_comes_back(new_run: NewRun, recipe: Path, role: str) -> None:
    run = new_run().up(recipe, "train.batches=30")
    run.wait_for_steps(5, "train")
    pid = run.kill(role, signal.SIGTERM)
    run.wait_for(lambda: pid not in run.pids(role), f"the end of the {role}", timeout_s=30)
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert not audit.rollbacks, "what was committed was written before the only policy left"
    assert next((fact["replica"], fact["state"]) for fact in run.facts("gone")) == (f"{role}-0", "left")


def test_a_run_is_paused_saved_and_goes_on(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "train.batches=40", "sft.batches=5")
    run.wait_for_steps(3, "train")
    assert "paused" in orrery(run, "pause", str(run.folder)).stdout
    run.wait_for(lambda: status(run).get("paused"), "the pause")
    assert "checkpoint" in orrery(run, "checkpoint", str(run.folder)).stdout
    run.wait_for(
        lambda: run.facts("settled") and status(run)["settled_version"] == status(run)["version"], "a checkpoint"
    )
    assert orrery(run, "evaluate", str(run.folder)).returncode == 0
    run.wait_for(lambda: any(fact["why"] == "asked" for fact in run.facts("evaluated")), "a verdict")
    held = len(run.facts("committed"))
    assert len(run.facts("committed")) == held
    assert "goes on" in orrery(run, "resume", str(run.folder)).stdout
    assert run.wait() == 0, run.story()
    run.assert_complete()


def test_a_change_that_a_controller_kill_follows_at_once_is_in_force_at_its_step(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.replicas=2", "train.batches=100", "sft.batches=5")
    run.wait_for_steps(2, "train")
    wanted = len(run.metrics()) + 30
    name = ("--run", str(run.folder))
    changed = orrery(run, "set", "train.lr=1e-6", "rewards.format.weight=0", "--at-step", str(wanted), *name)
    run.kill("controller")
    said = re.search(r"in force from step (\d+) on", changed.stdout)
    assert said is not None, changed.stderr
    step = int(said[1])
    assert step >= wanted
    run.wait_for_steps(30, "train")
    refused = orrery(run, "set", "train.batches=3", *name)
    assert refused.returncode == 1 and "train.batches cannot change" in refused.stderr and "train.lr" in refused.stderr
    refused = orrery(run, "set", "train.lr=-1", *name)
    assert refused.returncode == 1 and "greater than 0" in refused.stderr
    assert run.wait() == 0, run.story()
    run.assert_complete()
    lines = {line["step"]: line for line in run.metrics()}
    assert [lines[at]["revision"] for at in (step - 1, step, step + 1)] == [0, 1, 1]
    assert lines[step]["set/train.lr"] == 1e-6
    assert "set/train.lr" not in lines[step - 1]
    assert [fact["step"] for fact in run.facts("revised")] == [step]
    told = {(fact["step"], fact["replica"]): fact["message"]["revision"] for fact in run.facts("assigned")}
    assert {replica for _, replica in told} == {"policy-0", "policy-1"}
    assert told == {(at, replica): int(at >= step) for at, replica in told}, "each policy from the same step on"
    shown = orrery(run, "history", str(run.folder))
    assert "train.lr: 0.0003 -> 1e-06" in shown.stdout, shown.stdout + shown.stderr
    assert "1e-06" in orrery(run, "get", "train.lr", *name).stdout
