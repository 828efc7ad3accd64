"""Ctrl-C, twice, and the death of the supervisor: what is left is nobody, and a run that can go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import PATIENCE_S, ROOT, SUPERVISOR, Run, signal, write_recipe

pytestmark = pytest.mark.integration

EXIT_INTERRUPTED = 130


def test_ctrl_c_ends_a_run_after_the_step_in_hand_with_a_checkpoint(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe)
    run.wait_for_steps(5, "sft")
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == EXIT_INTERRUPTED, run.story()
    assert run.all_gone(), run.story()
    audit = run.audit()
    assert (audit.clean, audit.outcome) == (True, "stopped"), "\n".join(audit.lines())
    settled = run.facts("settled")[-1]
    assert settled["step"] == len(run.metrics()) == len(audit.books[1].steps)
    assert (run.folder / settled["path"] / "manifest.json").exists()
    assert "orrery resume" in run.outputs.read_text()


def test_ctrl_c_while_services_start_waits_for_none_of_them(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "timeouts.exit_s=600")
    run.wait_for(lambda: run.pids("policy") and run.pids("rollout"), "policy and rollout to be started")
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait(timeout_s=60) == EXIT_INTERRUPTED, run.story()
    assert run.all_gone(), run.story()
    audit = run.audit()
    assert (audit.clean, audit.outcome) == (True, "stopped"), "\n".join(audit.lines())


def test_a_second_ctrl_c_kills_at_once(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe)
    run.wait_for_steps(5, "sft")
    # the policy is held, so that only a kill can end the run
    (policy,) = run.pids("policy")
    run.signal(policy, signal.SIGSTOP)
    run.kill(SUPERVISOR, signal.SIGINT)
    run.wait_for(lambda: run.said("once more to kill"), "the first Ctrl-C to be taken")
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait(timeout_s=20) == EXIT_INTERRUPTED, run.story()
    # a reward worker is killed by the kernel, a moment after its parent
    run.wait_for(run.all_gone, "the end of every process of the run", timeout_s=10)
    assert run.audit().clean


def test_no_process_outlives_a_supervisor_that_was_killed_while_services_start(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe)
    run.wait_for(lambda: run.pids("policy") and run.pids("rollout"), "policy and rollout to be started")
    run.kill(SUPERVISOR)
    run.wait()
    run.wait_for(run.all_gone, "the end of every process of the run", timeout_s=20)


@pytest.fixture(scope="module")
def orphaned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose supervisor was killed in the middle of RL."""
    folder = tmp_path_factory.mktemp("orphaned")
    with Run(folder / "run") as run:
        run.up(write_recipe(folder), "train.batches=30", "train.mu=2")
        run.wait_for_steps(9, "train")
        run.kill(SUPERVISOR)
        run.wait()
        yield run


def test_no_process_outlives_a_supervisor_that_was_killed(orphaned: Run) -> None:
    orphaned.wait_for(orphaned.all_gone, "the end of every process of the run", timeout_s=20)
    assert orphaned.audit().clean


def replay(run: Run, step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.policy", "--replay", str(run.folder), "--step", str(step)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("number", [0, 7], ids=["first-after-the-checkpoint", "in-the-middle-of-a-batch"])
def test_a_step_that_is_not_settled_can_be_replayed_alone(orphaned: Run, number: int) -> None:
    lines = [line for line in orphaned.metrics() if line["stage"] == "train"]
    answer = replay(orphaned, lines[number]["step"])
    assert answer.returncode == 0, answer.stderr
    table = {words[0]: words[1:] for words in map(str.split, answer.stdout.splitlines()) if len(words) >= 3}
    for name in ("loss", "grad_norm", "entropy", "mismatch_kl"):
        replayed, recorded = map(float, table[name][:2])
        assert recorded == pytest.approx(lines[number][name], rel=1e-5)
        assert replayed == pytest.approx(recorded, rel=1e-5, abs=1e-8)
    assert "differs" not in answer.stdout


def test_a_run_whose_supervisor_was_killed_is_resumed_to_its_end(orphaned: Run) -> None:
    orphaned.wait_for(orphaned.all_gone, "the end of every process of the run", timeout_s=20)
    assert orphaned.resume().wait() == 0, orphaned.story()
    audit = orphaned.assert_complete()
    assert audit.terms == 2
    assert [back["version"] for back in audit.rollbacks] == [30]
    # the new term wrote to a new segment of the spool, and the last checkpoint has settled all of the old one
    assert [path.name for path in (orphaned.folder / "spool").iterdir()] == ["00000002.seg"]
    answer = replay(orphaned, 3)
    assert answer.returncode == 2
    assert "settled" in answer.stderr and "Traceback" not in answer.stderr
