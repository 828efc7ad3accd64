"""What the Slurm launcher prepares and reads, as far as it needs no cluster (tests/slurm has a real one)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deploy.slurm import client
from deploy.slurm.client import Job, SlurmError
from deploy.slurm.launcher import check_recipe
from deploy.slurm.layout import SCRIPTS, SITE, SITE_VARIABLE, copy_scripts, job_name, script
from shared.config import Recipe, RecipeError

NODE_FAIL = (
    "JobId=9 JobName=run.policy-1 UserId=root(0) Priority=4294901759 JobState=NODE_FAIL Reason=NodeDown "
    "Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 ExitCode=0:0 NodeList=n3 BatchHost=n3\n"
)
KILLED = NODE_FAIL.replace("NODE_FAIL", "CANCELLED").replace("ExitCode=0:0", "ExitCode=0:15")
REQUEUED = NODE_FAIL.replace("JobState=NODE_FAIL", "JobState=PENDING").replace("Restarts=0", "Restarts=2")


def recipe(**tables: object) -> Recipe:
    base = {
        "model": {"build": {}},
        "data": {"a": {"kind": "jsonl", "path": "a.jsonl"}},
        "sft": {"dataset": "a", "batches": 1, "batch_size": 1, "lr": 1e-3},
    }
    return Recipe.model_validate({**base, **tables})


def test_what_slurm_shows_of_a_job_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"7": NODE_FAIL, "8": KILLED, "9": REQUEUED}
    monkeypatch.setattr(client, "_run", lambda command: told[command[-1]])
    assert (client.details(7).state, client.details(7).node, client.details(7).code) == ("NODE_FAIL", "n3", 0)
    assert client.details(8).code == -15
    assert client.details(9).restarts == 2


def test_jobs_are_read_line_by_line_and_some_states_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_run", lambda command: "3|run.a|RUNNING|n1|None\n4|run.b|NODE_FAIL||NodeDown\n")
    first, second = client.find(["run.a", "run.b"])
    assert (first, first.ended) == (Job(3, "run.a", "RUNNING", "n1", "None"), False)
    assert second.ended


def test_a_job_does_not_inherit_what_its_submitter_was_told_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "CUDA_VISIBLE_DEVICES", "SLURM_CONF", "ORRERY_RUN"):
        monkeypatch.setenv(name, "x")
    kept = client._environment()
    assert {"SLURM_CONF", "ORRERY_RUN"} <= kept.keys()
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "CUDA_VISIBLE_DEVICES"} & kept.keys()


def test_without_slurm_it_is_said_which_command_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match="command squeue of Slurm, found none"):
        client.find(["a"])


def test_loopback_is_refused_as_the_network_of_several_nodes() -> None:
    with pytest.raises(RecipeError, match=r"weights\.interface: expected the network interface"):
        check_recipe(recipe())
    check_recipe(recipe(weights={"interface": "eth0"}))


def test_ranks_must_be_as_many_on_each_node() -> None:
    assert recipe(policy={"parallel": {"tp": 4}, "nodes": 2}).policy.nodes == 2
    with pytest.raises(ValueError, match="nodes = 2 cannot have as many ranks each"):
        recipe(policy={"parallel": {"tp": 3}, "nodes": 2})


def test_a_run_keeps_the_job_scripts_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name in SCRIPTS:
        (site / name).write_text("#!/bin/bash\n# of our site\n")
    monkeypatch.setenv(SITE_VARIABLE, str(site))
    copy_scripts(tmp_path)
    assert "of our site" in script(tmp_path, "rollout").read_text()
    script(tmp_path, "controller").write_text("changed by hand")
    copy_scripts(tmp_path)
    assert script(tmp_path, "controller").read_text() == "changed by hand"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_job_scripts_are_whole(name: str) -> None:
    subprocess.run(["bash", "-n", str(SITE / name)], check=True)
    assert '"$ORRERY_PYTHON" "$@"' in (SITE / name).read_text()


def test_jobs_are_called_by_run_and_process() -> None:
    assert job_name(Path("/runs/r-1"), "rollout-0") == "r-1.rollout-0"
