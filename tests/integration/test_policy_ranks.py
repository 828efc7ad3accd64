"""A policy replica of two ranks in real processes: they share each step's rows, and live and die together."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run

pytestmark = pytest.mark.integration
LOST_AFTER_S = 3.0


def members_of(run: Run, replica: str = "policy-0") -> list[int]:
    """Process ids of the ranks from 1 on."""
    return [pid for pid, command in run.commands() if command[-1].startswith(f"{replica}.")]


def member_of(run: Run, replica: str = "policy-0") -> int:
    found = members_of(run, replica)
    assert len(found) == 1, f"{found}\n{run.story()}"
    return found[0]


def losses(run: Run) -> list[str]:
    return [fact["cause"] for fact in run.facts("gone") if fact["state"] == "lost"]


def logged(run: Run, name: str, event: str) -> bool:
    return event in (run.folder / "logs" / f"{name}.jsonl").read_text()


def left_behind() -> list[str]:
    """Folders of sockets that nobody uses any more."""
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("orrery-ranks-")]


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_whichever_rank_is_killed_in_mid_step_all_are_lost_and_it_costs_a_redo(new_run: NewRun, recipe: Path) -> None:
    layout = ("policy.parallel.tp=2", "model.build.kv_heads=2")
    run = new_run().up(recipe, *layout, "checkpoint.every=10", "train.batches=100")
    run.wait_for_steps(1, "train")
    for rank in (1, 0):
        done = len(run.metrics())
        run.wait_for(lambda done=done: len(run.metrics()) >= done + 3, "three more steps")
        both = [run.pid_of("policy-0"), member_of(run)]
        run.signal(both[rank], signal.SIGKILL)
        run.wait_for(
            lambda both=both: not {pid for pid, _ in run.commands()} & set(both), "both to be gone", LOST_AFTER_S
        )
        if rank == 1:
            run.wait_for(lambda: losses(run), "the loss of the replica")
            assert f"rank 1 (process {both[1]}) ended: killed by SIGKILL" in losses(run)[0]
            assert logged(run, "policy-0", "this replica is over, with all its ranks")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    assert len(losses(run)) == 2
    assert {fact["incarnation"] for fact in run.facts("joined") if fact["replica"] == "policy-0"} == {1, 2, 3}
    assert left_behind() == []


def test_a_rank_that_hangs_is_the_loss_of_all_while_the_others_wait_for_it(new_run: NewRun, recipe: Path) -> None:
    options = ("policy.parallel.pp=2", "checkpoint.every=10", f"bus.lost_after_s={LOST_AFTER_S}")
    run = new_run().up(recipe, *options, "sft.batches=60")
    run.wait_for_steps(5, "sft")
    hung = member_of(run)
    run.signal(hung, signal.SIGSTOP)
    run.wait_for(lambda: losses(run), "the loss of the replica")
    assert losses(run)[0].startswith("rank 1 silent for")
    run.wait_for(lambda: hung not in {pid for pid, _ in run.commands()}, "the rank that hangs to be killed", 20.0)
    assert run.wait() == 0, run.story()
    run.assert_complete()


def test_a_signal_to_the_process_group_is_for_rank_0_to_decide(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "policy.parallel.replicate=2", "sft.batches=100000")
    run.wait_for_steps(5, "sft")
    member = member_of(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        run.signal(member, number)
    steps = len(run.metrics())
    run.wait_for_steps(steps + 5, "sft")
    assert member_of(run) == member and not losses(run)
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == 130, run.story()
    assert run.audit().clean and run.all_gone(), run.story()


def compared(run: Run) -> list[dict[str, Any]]:
    return run.facts("compared")


def test_replicas_of_two_ranks_share_the_steps_and_one_of_them_joins_again(new_run: NewRun, recipe: Path) -> None:
    options = ("policy.replicas=2", "policy.parallel.fsdp=2", "checkpoint.every=10")
    run = new_run().up(recipe, *options, "sft.batches=100000")
    run.wait_for_steps(5, "sft")
    run.signal(member_of(run, "policy-1"), signal.SIGKILL)
    run.wait_for(lambda: run.facts("caught_up"), "policy-1 to join again")
    (back,) = run.facts("caught_up")
    assert (back["replica"], back["source"]) == ("policy-1", "policy-0")
    run.wait_for(
        lambda: any(len(check["digests"]) == 2 and check["step"] > back["step"] for check in compared(run)),
        f"a comparison of both after step {back['step']}",
    )
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == 130, run.story()
    audit = run.audit()
    assert audit.clean and audit.rollbacks == [], "\n".join(audit.lines())
    assert not any(check["different"] for check in compared(run))
    assert run.all_gone(), run.story()
