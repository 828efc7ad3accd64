"""Weights from every rank of a policy to rollouts: a kill in mid-transfer costs the killed alone, and at once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run
from tests.integration.test_fanout import (
    HEARD_S,
    SHORT,
    assert_only_true_weights,
    in_mid_transfer,
    synced_to,
    told,
    trained,
)
from tests.integration.test_policy_ranks import members_of

pytestmark = pytest.mark.integration

LAYOUT = ("policy.parallel.tp=2", "model.build.kv_heads=2", "checkpoint.every=5")
ENDLESS = ("train.batches=100000", "rollout.replicas=2")
NAMES = {"rollout-0", "rollout-1"}


def losses_of(run: Run, replica: str) -> list[float]:
    """When a replica was lost, by the controller's clock."""
    return [
        record["event"]["at"]
        for record in run.records()
        for fact in record["facts"]
        if fact["type"] == "gone" and (fact["state"], fact["replica"]) == ("lost", replica)
    ]


def stop_in_a_transfer_from_the_policy(run: Run, receiver: str) -> None:
    """Stop a receiver's process while weights are on their way to it from the policy, not from another rollout."""
    while in_mid_transfer(run, receiver) != "policy-0":
        run.signal(run.pid_of(receiver), signal.SIGCONT)
        version = trained(run)
        run.wait_for(lambda version=version: synced_to(run, NAMES, version), "weights for everybody")


def test_a_receiver_and_a_rank_of_the_source_killed_in_mid_transfer(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *SHORT, *LAYOUT, *ENDLESS)
    run.wait_for(lambda: synced_to(run, NAMES, 2), "every rollout's first weights")

    stop_in_a_transfer_from_the_policy(run, "rollout-1")
    version = trained(run)
    run.signal(run.pid_of("rollout-1"), signal.SIGKILL)
    run.wait_for(lambda: synced_to(run, NAMES - {"rollout-1"}, version), "weights for the one that was not killed")
    assert not losses_of(run, "policy-0"), "its ranks were freed, and go on"

    run.wait_for(lambda: synced_to(run, NAMES, version), "weights for everybody")
    stop_in_a_transfer_from_the_policy(run, "rollout-1")
    killed, before = time.time(), len(told(run, "weights_loaded"))
    run.signal(members_of(run)[-1], signal.SIGKILL)
    run.signal(run.pid_of("rollout-1"), signal.SIGCONT)
    run.wait_for(lambda: losses_of(run, "policy-0"), "the loss of the policy")
    [at] = losses_of(run, "policy-0")
    assert at - killed < HEARD_S
    run.wait_for(lambda: len(told(run, "weights_loaded")) > before + 4, "weights from its new ranks")

    run.kill(SUPERVISOR, signal.SIGINT)
    run.wait()
    audit = run.audit()
    assert (audit.clean, audit.outcome) == (True, "stopped"), "\n".join(audit.lines())
    assert not losses_of(run, "rollout-0"), "who was not killed was not lost"
    assert_only_true_weights(run)
