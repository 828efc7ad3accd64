"""Several policies in real processes: they share the steps, end equal, and may be killed with -9 at any time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run

pytestmark = pytest.mark.integration


def compared(run: Run) -> list[dict[str, Any]]:
    """The comparisons of the members' states, in order."""
    return run.facts("compared")


def members(run: Run) -> list[int]:
    """How many policies shared each step, in the order of metrics.jsonl."""
    return [line["members"] for line in run.metrics()]


def end_after_a_comparison(run: Run, of: int) -> None:
    """Once so many policies have been compared again, Ctrl-C; nothing was lost, and all of them were equal."""
    step = run.facts("caught_up")[-1]["step"]
    run.wait_for(
        lambda: any(len(check["digests"]) == of and check["step"] > step for check in compared(run)),
        f"a comparison of {of} policies after step {step}",
    )
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == 130, run.story()
    audit = run.audit()
    assert audit.clean and audit.rollbacks == [], "\n".join(audit.lines())
    assert not any(check["different"] for check in compared(run))


def test_two_policies_share_every_step_and_end_equal(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.replicas=2", "checkpoint.every=5")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    assert set(members(run)) == {2}, "the first step waits for both"
    assert not run.facts("aborted") and not run.facts("caught_up")
    checks = compared(run)
    assert checks[-1]["step"] == 40 and len(checks) >= 8
    assert all(sorted(check["digests"]) == ["policy-0", "policy-1"] for check in checks)
    assert not any(check["different"] for check in checks)


@pytest.mark.parametrize("name", ["policy-0", "policy-1"])
def test_a_policy_killed_in_mid_step_costs_a_redo_and_joins_again(new_run: NewRun, recipe: Path, name: str) -> None:
    run = new_run().up(recipe, "policy.replicas=2", "sft.batches=100000", "checkpoint.every=10")
    run.wait_for_steps(5, "sft")
    run.signal(run.pid_of(name), signal.SIGKILL)
    run.wait_for(lambda: run.facts("caught_up"), f"{name} to join again")
    end_after_a_comparison(run, of=2)
    (back,) = run.facts("caught_up")
    assert back["replica"] == name and back["source"] != name
    shared = members(run)
    assert shared[0] == shared[-1] == 2 and 1 in shared, "meanwhile the other one went on alone"


def test_when_both_are_killed_the_run_rolls_back_and_both_are_members_again(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.replicas=2", "sft.batches=10", "train.batches=40", "train.mu=2")
    run.wait_for_steps(4, "train")
    for pid in (run.pid_of("policy-0"), run.pid_of("policy-1")):
        run.signal(pid, 9)
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    (back,) = audit.rollbacks
    assert back["step"] == 10
    last = compared(run)[-1]
    assert len(last["digests"]) == 2 and not last["different"]
    assert members(run)[-1] == 2


@pytest.mark.slow
def test_three_policies_lose_one_after_the_other(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.replicas=3", "sft.batches=100000", "checkpoint.every=10")
    run.wait_for_steps(5, "sft")
    for number, name in enumerate(("policy-0", "policy-2", "policy-1"), 1):
        run.signal(run.pid_of(name), signal.SIGKILL)
        run.wait_for(lambda number=number: len(run.facts("caught_up")) >= number, f"{name} to join again")
    end_after_a_comparison(run, of=3)
