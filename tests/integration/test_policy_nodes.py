"""Policy replicas whose ranks run on two nodes: what the second one sees is its own network interface and processes.

A node is stood for by a process namespace, in which neither rank 0's memory nor its sockets can be opened; both are in
a network namespace of this test, whose interface `nodes` is the nodes' network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import Run
from tests.integration.test_policy_layouts import TWO_HEADS
from tests.integration.test_services_alone import free_address

TOOLS = ("ip", "nsenter", "unshare")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason=f"namespaces want root and {', '.join(TOOLS)}"
    ),
]
NODES = ("--nodes", "here:2,there:2", "--reach", "unshare --pid --fork --mount-proc env NODE={node}")
LAYOUT = ("policy.parallel.fsdp=2", "policy.parallel.tp=2", TWO_HEADS)
LOST_AFTER_S = 20.0
STOP = """
import sys
from shared.bus import ask
from shared.messages import StopRun
ask(sys.argv[1], StopRun("the test has seen enough"), 30.0)
"""


@pytest.fixture
def network() -> Iterator[tuple[str, ...]]:
    """What starts a command in a network namespace that has an interface `nodes`."""
    name = f"orrery-nodes-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        link = ("link add nodes type bridge", "address add 10.88.0.1/24 dev nodes", "link set nodes up")
        for command in ("link set lo up", *link):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield ("nsenter", f"--net=/run/netns/{name}")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def far_ranks(run: Run, replica: str) -> list[int]:
    """Process ids of the ranks on the second node."""
    names = (f"{replica}.2", f"{replica}.3")
    return [pid for pid, command in run.commands() if command[-1] in names and command[0] != "unshare"]


@dataclass
class ByHand:
    """A run whose processes are started one by one inside the network; the controller is there already."""

    run: Run
    network: tuple[str, ...]
    options: tuple[str, ...]
    address: str
    controller: subprocess.Popen[bytes]

    def start(self, role: str, *more: str) -> subprocess.Popen[bytes]:
        return self.run.launch(
            f"services.{role}", *self.options, "--controller", self.address, *more, inside=self.network
        )

    def stop(self) -> None:
        """Ask the controller to end the run."""
        self.run.begin(*self.network, sys.executable, "-c", STOP, self.address)


@pytest.fixture
def begin(network: tuple[str, ...], new_run: NewRun, recipe: Path) -> Callable[..., ByHand]:
    def make(*sets: str) -> ByHand:
        run, address = new_run("runs/short"), free_address()
        run.folder.parent.mkdir()
        settings = (f'run.folder="{run.folder.parent}"', "sft.batches=100000", *LAYOUT, *sets)
        options = ("--recipe", str(recipe), *(part for each in settings for part in ("--set", each)))
        controller = run.launch("services.controller", *options, "--bind", address, inside=network)
        return ByHand(run, network, options, address, controller)

    return make


def test_ranks_of_two_nodes_train_are_joined_and_die_as_one(begin: Callable[..., ByHand]) -> None:
    hand = begin('weights.interface="nodes"', "checkpoint.every=10")
    run, rollout, first = hand.run, hand.start("rollout"), hand.start("policy", *NODES)
    run.wait_for_steps(3, "sft")
    second = hand.start("policy", *NODES, "--replica", "policy-1")
    run.wait_for(lambda: run.facts("caught_up"), "policy-1 to be given the state")
    (joined,) = run.facts("caught_up")
    run.wait_for(
        lambda: any(len(each["digests"]) == 2 and each["step"] > joined["step"] for each in run.facts("compared")),
        f"a comparison of both after step {joined['step']}",
    )
    ranks = far_ranks(run, "policy-0")
    assert len(ranks) == 2, run.story()
    os.kill(ranks[0], signal.SIGKILL)
    run.wait_for(lambda: first.poll() is not None, "the end of policy-0", LOST_AFTER_S)
    run.wait_for(lambda: not far_ranks(run, "policy-0"), "the end of its ranks", LOST_AFTER_S)
    hand.stop()
    for process in (hand.controller, rollout, second):
        run.wait_for(lambda process=process: process.poll() is not None, f"the end of {process.args}")
    audit = run.audit()
    assert audit.clean and audit.rollbacks == [], "\n".join(audit.lines())
    (lost,) = [fact for fact in run.facts("gone") if fact["state"] == "lost"]
    assert "on there" in lost["cause"], lost
    assert not any(each["different"] for each in run.facts("compared"))
    run.wait_for(run.all_gone, "the end of all")


def test_far_ranks_end_with_a_rank_0_that_was_killed(begin: Callable[..., ByHand]) -> None:
    hand = begin('weights.interface="nodes"')
    run, first = hand.run, hand.start("policy", *NODES)
    run.wait_for(lambda: len(far_ranks(run, "policy-0")) == 2, "both far ranks")
    run.wait_for_steps(2, "sft")
    first.kill()
    run.wait_for(lambda: not far_ranks(run, "policy-0"), "the end of its ranks", LOST_AFTER_S)
    hand.controller.kill()
    run.wait_for(run.all_gone, "the end of all")


def test_an_interface_that_other_nodes_cannot_reach_ends_it_by_name(begin: Callable[..., ByHand]) -> None:
    hand = begin()
    run, policy = hand.run, hand.start("policy", *NODES)
    run.wait_for(lambda: policy.poll() is not None, "its end")
    assert policy.returncode == 2, run.story()
    log = (run.folder / "logs" / "policy-0.jsonl").read_text()
    assert "expected one that other nodes reach" in log
    hand.controller.kill()
    run.wait_for(run.all_gone, "the end of all")
