"""Each service started by hand, as the README tells: no supervisor, any order."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun

pytestmark = pytest.mark.integration


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_services_started_by_hand_complete_a_run_in_any_order(new_run: NewRun, recipe: Path) -> None:
    run, address = new_run("runs/short"), free_address()  # where a service looks by itself
    run.folder.parent.mkdir()
    options = ("--recipe", str(recipe), "--set", f'run.folder="{run.folder.parent}"')
    second = run.launch("services.rollout", *options, "--controller", address, "--replica", "rollout-1")
    policy = run.launch("services.policy", *options, "--controller", address)
    rollout = run.launch("services.rollout", *options, "--controller", address)
    controller = run.launch("services.controller", *options, "--bind", address)
    for process in (controller, policy, rollout, second):
        run.wait_for(lambda process=process: process.poll() is not None, f"the end of {process.args}")
        assert process.returncode == 0, run.story()
    audit = run.audit()
    assert (audit.clean, audit.outcome) == (True, "complete"), "\n".join(audit.lines())
    assert [line["step"] for line in run.metrics()] == list(range(40))
    assert {fact["replica"] for fact in run.facts("joined")} == {"policy-0", "rollout-0", "rollout-1"}
    assert run.all_gone(), run.story()
