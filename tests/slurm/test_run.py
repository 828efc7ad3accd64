"""A whole run on a real Slurm: it grows, loses jobs, nodes and its controller, and comes to its end with clean books.

One run for all of it, since its start costs most; every step waits for what it has caused.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.controller.audit import audit_run
from shared.bus.address import TELLS
from tests.integration.run import write_recipe
from tests.slurm.cluster import LOGIN, Cluster

ROOT = Path(__file__).resolve().parents[2]
REPLICAS = {"policy-0", "policy-1", "rollout-0", "rollout-1", "evaluator-0"}
SETS = {
    "weights.interface": "eth0",
    "policy.replicas": "2",
    "rollout.replicas": "2",
    "evaluator.engine": "own",
    "evaluation.every": "50",
    "train.batches": "400",
    "checkpoint.every": "50",
    "timeouts.transfer_s": "10.0",
}
TWO_NODES = {
    "weights.interface": "eth0",
    "model.build.kv_heads": "2",
    "policy.parallel.tp": "2",
    "policy.nodes": "2",
}

PACE = """
import time


def pace(completion):
    time.sleep(0.04)
    return 0.0
"""
"""A reward that takes its time: on a fast machine too the run lasts until the last of what is done to it."""


def write_paced_recipe(folder: Path) -> Path:
    """The recipe of the integration tests, a few steps a second at most."""
    (folder / "pace.py").write_text(PACE)
    recipe = write_recipe(folder)
    with recipe.open("a") as file:
        file.write('\n[[rewards.parts]]\nkind = "python"\nfunction = "pace:pace"\nweight = 0.0\n')
    return recipe


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


class ClusterRun:
    """One run on the cluster, as a person on its login node sees it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.outputs = folder.parent / "up.out"
        self.began = time.monotonic()

    def make_up(self, recipe: Path, sets: dict[str, str]) -> subprocess.Popen[bytes]:
        """`make up LAUNCHER=slurm`, in a shell of its own."""
        arguments = " ".join([f"--run-folder {self.folder}", *(f"--set {key}={value}" for key, value in sets.items())])
        installed = ROOT / ".venv" / ".installed"  # the environment is the one that runs this test, whatever its age
        make = ("make", "--no-print-directory", f"--old-file={installed.relative_to(ROOT)}", "-C", str(ROOT), "up")
        with self.outputs.open("ab") as sink:
            return subprocess.Popen(
                self.cluster.command(LOGIN, *make, "LAUNCHER=slurm", f"RECIPE={recipe}", f"ARGS={arguments}"),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def orrery(self, *command: str) -> str:
        """What a command of the same name prints."""
        words = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "deploy.cli", *command)
        return self.cluster.on(LOGIN, *words)

    def job(self, process: str) -> tuple[int, str]:
        """Number and node of the running job of a process; (0, "") if none runs."""
        found = self.cluster.jobs().get(f"{self.folder.name}.{process}")
        return (found.number, found.node) if found is not None and found.state == "RUNNING" else (0, "")

    def term(self) -> int:
        """The newest term that told its address."""
        try:
            return int((self.folder / TELLS).read_text().split()[1])
        except FileNotFoundError:
            return 0

    def steps(self) -> int:
        """Committed steps."""
        try:
            return (self.folder / "metrics.jsonl").read_text().count("\n")
        except FileNotFoundError:
            return 0

    def logged(self, process: str, event: str) -> list[dict[str, Any]]:
        """The lines of a process's log with this event."""
        path = self.folder / "logs" / f"{process}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if event in line["event"]]

    def registered(self, replica: str) -> int:
        """How many incarnations of a replica were welcomed."""
        return len(
            {line["incarnation"] for line in self.logged("controller", "replica registered") if line["who"] == replica}
        )

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> None:
        """Until `condition` holds, while the run goes on; told with the time that it took."""
        took = self.cluster.wait_for(lambda: condition() or self.over(), f"{what}\n{self.story()}", timeout_s)
        assert condition(), f"the run ended before {what}\n{self.story()}"
        print(f"[{time.monotonic() - self.began:5.1f} s] {what}: {took:.1f} s, step {self.steps()}")

    def wait_for_progress(self, steps: int = 5) -> None:
        """Until more steps are committed."""
        before = self.steps()
        self.wait_for(lambda: self.steps() >= before + steps, f"{steps} more steps")

    def over(self) -> dict[str, Any] | None:
        """What the supervisor told at the end."""
        path = self.folder / "slurm" / "outcome.json"
        return json.loads(path.read_text()) if path.exists() else None

    def story(self) -> str:
        """For a failed test: the ends of everything that was written."""
        logs = self.folder / "logs"
        paths = [self.outputs, *sorted(logs.glob("*.out")), logs / "supervisor.jsonl"]
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:])
            for path in paths
            if path.exists()
        )


def test_a_run_lives_through_what_a_cluster_does_to_it(cluster: Cluster, tmp_path: Path) -> None:
    run = ClusterRun(cluster, tmp_path / "run")
    shell = run.make_up(write_paced_recipe(tmp_path), SETS)
    try:
        run.wait_for(lambda: run.steps() >= 32 or shell.poll() is not None, "the first steps of RL")
        assert shell.poll() is None, f"make up ended with code {shell.returncode}\n{run.story()}"
        for replica in REPLICAS:
            assert run.job(replica)[0], f"{replica} has no job\n{run.story()}"

        os.killpg(shell.pid, signal.SIGHUP)
        shell.wait(30)
        run.wait_for_progress()

        print(run.orrery("scale", "rollout=3", "--run", str(run.folder)))
        run.wait_for(lambda: run.registered("rollout-2"), "a third rollout")

        number, _ = run.job("rollout-1")
        cluster.on(LOGIN, "scancel", str(number))
        run.wait_for(
            lambda: run.job("rollout-1")[0] not in (0, number), "another job of a rollout whose job was cancelled"
        )
        run.wait_for(lambda: run.registered("rollout-1") == 2, "that rollout")

        kept = {replica: run.job(replica)[0] for replica in (*REPLICAS, "rollout-2")}
        term, (number, _) = run.term(), run.job("controller")
        cluster.on(LOGIN, "scancel", "--batch", "--signal=USR2", str(number))  # as Slurm does before a time limit
        run.wait_for(lambda: run.term() > term, "the next term of a controller whose time was up")
        assert run.logged("policy-0", "checkpoint written") or run.logged("policy-1", "checkpoint written")
        run.wait_for_progress()
        assert {replica: run.job(replica)[0] for replica in kept} == kept, "replicas do not end with their controller"

        home = run.job("controller")[1]
        node = next(run.job(replica)[1] for replica in ("policy-1", "policy-0") if run.job(replica)[1] != home)
        lost = [replica for replica in kept if run.job(replica)[1] == node]
        before = {replica: run.registered(replica) for replica in lost}
        cluster.crash(node)
        run.wait_for(lambda: all(run.registered(r) > before[r] for r in lost), f"{', '.join(lost)} of a crashed node")
        cluster.start(node)
        run.wait_for_progress()

        term = run.term()
        cluster.cut(home)
        run.wait_for(lambda: run.term() > term, "a new term, while the old controller lives behind a cut")
        run.wait_for(
            lambda: run.logged("controller", "fenced: a newer launch"),
            "the old controller's end, by itself",
            timeout_s=20,
        )
        run.wait_for_progress()
        cluster.heal(home)
        run.wait_for_progress()

        cluster.wait_for(run.over, f"the end of the run\n{run.story()}", 240)
        assert run.over() == {"code": 0, "why": ""}, run.story()
    finally:
        print(run.story())
    audit = audit_run(run.folder)
    assert audit.clean and audit.outcome == "complete", "\n".join(audit.lines())
    cluster.wait_for(lambda: not cluster.jobs(), "the queue to be empty")
    said = run.orrery("logs", str(run.folder))
    assert "job ended" in said and "NODE_FAIL" in said


def test_the_ranks_of_a_policy_may_be_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = ClusterRun(cluster, tmp_path / "wide")
    shell = run.make_up(write_recipe(tmp_path), TWO_NODES)
    run.wait_for(lambda: run.steps() >= 1 or shell.poll() is not None, "the first step")
    nodes = cluster.jobs()["wide.policy-0"].node
    cluster.wait_for(lambda: shell.poll() is not None, f"the end of make up\n{run.story()}")
    assert shell.returncode == 0, run.story()
    assert run.over() == {"code": 0, "why": ""}, run.story()
    assert len(cluster.on(LOGIN, "scontrol", "show", "hostnames", nodes).split()) == 2, nodes
    assert {line["rank"] for line in run.logged("controller", "replica registered") if line["who"] == "policy-0"} == {
        0,
        1,
    }
    audit = audit_run(run.folder)
    assert audit.clean and audit.outcome == "complete", "\n".join(audit.lines())
