"""A rollout leaves in the middle of its samples: another one finishes them, and they are trained on."""

from __future__ import annotations

import signal
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from deploy.local.supervisor import EXIT_INTERRUPTED
from shared.arrays import unpack
from shared.messages import ArrayHeader
from shared.records import read_spooled
from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run
from tests.integration.test_steering import orrery

pytestmark = pytest.mark.integration

# one long answer after the other, slower than training: a rollout that is asked to leave is in the middle of one
LONG = (
    "rollout.slots=1",
    "rollout.max_new_tokens=80",
    "sft.batches=3",
    "train.max_staleness=2",
    "evaluation.every=1000",
)


def continued(run: Run) -> list[tuple[int, str, str]]:
    """(group, who handed it over, who went on) of every group that was trained with tokens of two replicas."""
    trained = {group for fact in run.facts("consumed") for group in fact["groups"]}
    last: dict[int, dict[str, Any]] = {}
    handed: dict[int, str] = {}
    for record in run.records():
        for fact in record["facts"]:
            if fact["type"] == "handed_over":
                handed[fact["group"]] = last[fact["group"]]["replica"]
            elif fact["type"] == "leased":
                last[fact["group"]] = fact
    return [
        (group, handed[group], lease["replica"])
        for group, lease in last.items()
        if group in trained and lease["begun"] and lease["replica"] != handed[group]
    ]


def payload(run: Run, kind: str, group: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """Lengths of the samples, and arrays, of the last message of a kind about a group, from journal and spool."""
    found = [
        record["event"]
        for record in run.records()
        if record["event"]["type"] == "message_received"
        and record["event"]["body"]["type"] == kind
        and record["event"]["body"]["group"] == group
    ]
    body, place = found[-1]["body"], found[-1]["spooled"]
    piece = body if kind == "group_report" else body["partial"]
    headers = msgspec.convert(piece["arrays"], list[ArrayHeader])
    return piece["lengths"], unpack(headers, read_spooled(run.folder, place))


def samples(lengths: list[int], flat: np.ndarray) -> list[list[float]]:
    return [flat[start:end].tolist() for start, end in pairwise(accumulate(lengths, initial=0))]


@pytest.mark.parametrize("how", ["drain", "sigterm"])
def test_what_a_leaving_rollout_has_begun_another_one_finishes(new_run: NewRun, recipe: Path, how: str) -> None:
    run = new_run().up(recipe, *LONG, "rollout.replicas=2", "train.batches=2000")
    run.wait_for_steps(2, "train")
    if how == "drain":
        assert orrery(run, "drain", "rollout-1", "--run", str(run.folder)).returncode == 0
    else:
        run.signal(run.pid_of("rollout-1"), signal.SIGTERM)
    run.wait_for(lambda: continued(run), "a trained group with tokens of both rollouts")

    group, first, second = continued(run)[0]
    assert {first, second} == {"rollout-0", "rollout-1"}
    begun, before = payload(run, "lease_returned", group)
    whole, after = payload(run, "group_report", group)
    added = 0
    for name in ("tokens", "logprobs", "versions"):
        for old, new in zip(samples(begun, before[name]), samples(whole, after[name]), strict=True):
            assert new[: len(old)] == old
            added += len(new) - len(old)
    assert added > 0, "the second rollout has tokens in it, too"

    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == EXIT_INTERRUPTED, run.story()
    audit = run.audit()
    assert audit.clean, "\n".join(audit.lines())
    assert audit.handed_over > 0 and audit.continued > 0
    assert audit.staleness <= audit.bound
    left = [(fact["replica"], fact["state"]) for fact in run.facts("gone")]
    assert left[0] == ("rollout-1", "left") and "lost" not in {state for _, state in left}
