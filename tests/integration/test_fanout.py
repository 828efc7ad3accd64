"""Weights in real processes: receivers pass them on, and whoever is killed in mid-transfer holds nobody else back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.cli.live.sources import ask_controller
from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run

pytestmark = pytest.mark.integration

SHORT = ("sft.batches=2", "evaluation.suites.sums.problems=2", "rollout.max_new_tokens=8", "train.max_staleness=4")
HEARD_S = 1.0
"""The end of a process is known after this at most, to the controller and through it to whoever waits for it."""

STOPPED_S = 3.0
"""A process is stopped so long at most: less than it takes to count as lost."""


def told(run: Run, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The messages of a kind that reached the controller, with who sent them."""
    events = [record["event"] for record in run.records()]
    events = [event for event in events if event["type"] == "message_received" and event["body"]["type"] == name]
    return [(event["replica"], event["body"]) for event in events]


def version_of(message: dict[str, Any]) -> tuple[int, int]:
    return message["position"]["lineage"], message["position"]["version"]


def assert_only_true_weights(run: Run) -> None:
    """Nobody was made ready with anything but what a policy told the digest of, for that very version."""
    true: dict[tuple[int, int], str] = {}
    for who, message in told(run, "weights_sent"):
        if who.startswith("policy"):
            true.setdefault(version_of(message), message["digest"])
    synced = run.facts("synced")
    assert synced
    for fact in synced:
        assert fact["digest"] == true[fact["lineage"], fact["version"]], fact


def travelling(run: Run) -> list[list[str]]:
    """[source, receiver] of each transfer that is under way now."""
    answer = ask_controller(run.folder, 5.0)
    meshes = answer["meshes"] if answer is not None else []
    return [mesh["members"] for mesh in meshes if mesh.get("transfer") is not None]


def mismatches(run: Run) -> int:
    """How many receivers were found with a wrong digest so far."""
    answer = ask_controller(run.folder, 5.0)
    return int(answer["sync_mismatches"]) if answer is not None else 0


def trained(run: Run) -> int:
    """The version that the last committed step began with."""
    lines = run.metrics()
    return int(lines[-1]["version"]) if lines else -1


def synced_to(run: Run, replicas: set[str], newer_than: int) -> bool:
    newest = {fact["replica"]: fact["version"] for fact in run.facts("synced")}
    return all(newest.get(name, -1) > newer_than for name in replicas)


def in_mid_transfer(run: Run, receiver: str) -> str:
    """Stop a receiver's process until weights are on their way to it, which then stay so; their source's name.

    It may be stopped while it forms a mesh, or while everybody waits for its samples: then it goes on for a while.
    """
    pid = run.pid_of(receiver)
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        until = time.monotonic() + STOPPED_S
        while time.monotonic() < until:
            sources = [source for source, to in travelling(run) if to == receiver]
            if sources:
                return sources[0]
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)
    pytest.fail(f"no weights were on their way to {receiver} when it was stopped\n{run.story()}")


def test_receivers_that_are_done_serve_the_others(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *SHORT, "train.batches=12", "rollout.replicas=5", "weights.fanout=2")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    assert {fact["replica"] for fact in run.facts("synced")} == {f"rollout-{n}" for n in range(5)}
    assert any(who.startswith("rollout") for who, _ in told(run, "weights_sent")), "the policy served everybody"
    assert_only_true_weights(run)


def test_a_receiver_and_a_source_killed_in_mid_transfer_hold_nobody_back(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *SHORT, "train.batches=100000", "rollout.replicas=5", "weights.fanout=2")
    names = {f"rollout-{n}" for n in range(5)}
    run.wait_for(lambda: synced_to(run, names, 1), "every rollout's first weights")

    in_mid_transfer(run, "rollout-4")
    version = trained(run)
    os.kill(run.pid_of("rollout-4"), signal.SIGKILL)
    run.wait_for(lambda: synced_to(run, names - {"rollout-4"}, version), "weights for those that were not killed")

    for receiver in ("rollout-3", "rollout-2", "rollout-1", "rollout-0", "rollout-3", "rollout-2"):
        run.wait_for(lambda: synced_to(run, names, version), "weights for everybody")
        source = in_mid_transfer(run, receiver)
        if source.startswith("rollout"):
            break
        os.kill(run.pid_of(receiver), signal.SIGCONT)
    else:
        pytest.fail("no receiver was served by a relay")
    killed = time.time()
    os.kill(run.pid_of(source), signal.SIGKILL)
    os.kill(run.pid_of(receiver), signal.SIGCONT)
    gone = {"type": "gone", "replica": source}
    run.wait_for(lambda: any(gone.items() <= fact.items() for fact in run.facts("gone")), f"news of {source}'s end")
    version = trained(run)
    run.wait_for(lambda: synced_to(run, names - {source}, version), "weights for those that were not killed")
    ends = [record for record in run.records() if any(gone.items() <= fact.items() for fact in record["facts"])]
    assert ends[0]["event"]["at"] - killed < HEARD_S

    run.kill(SUPERVISOR, signal.SIGINT)
    run.wait()
    audit = run.audit()
    assert (audit.clean, audit.outcome, audit.rollbacks) == (True, "stopped", []), "\n".join(audit.lines())
    assert_only_true_weights(run)


def test_nobody_is_ready_with_what_a_spoilt_relay_passes_on(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *SHORT, "train.batches=60", "rollout.replicas=2", "weights.fanout=1")
    run.wait_for(lambda: (run.folder / "controller.address").exists(), "the controller's address")
    address = (run.folder / "controller.address").read_text().split()[0]
    options = ("--recipe", str(run.folder / "config.toml"), "--run-folder", str(run.folder), "--controller", address)
    relay = run.launch(
        "tests.integration.spoilt_relay", *options, "--replica", "a-relay"
    )  # first by name: served first
    run.wait_for(lambda: mismatches(run) > 0, "a receiver of the spoilt copy")
    run.wait_for(lambda: relay.poll() is not None, "the end of the run")
    run.wait_for(run.all_gone, "the end of everybody")
    run.assert_complete()
    true = {version_of(m): m["digest"] for who, m in told(run, "weights_sent") if who.startswith("policy")}
    wrong = [(who, m) for who, m in told(run, "weights_loaded") if m["digest"] != true[version_of(m)]]
    assert wrong, "the relay served nobody"
    assert {who for who, _ in wrong} <= {"rollout-0", "rollout-1"}
    assert_only_true_weights(run)
    last = max(fact["version"] for fact in run.facts("synced"))
    assert {fact["replica"] for fact in run.facts("synced") if fact["version"] > last - 5} > {"a-relay"}
