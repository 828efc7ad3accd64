"""A whole run that listens on every address of this machine, with keys: services, ranks, launcher and person."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.keys import make_keys, renew_key
from deploy.local.asking import ask_run
from shared.bus import BusTimeout, TurnedAway, ask
from shared.bus.keys import VARIABLE
from shared.messages import Status, StatusRequest
from tests.integration.conftest import NewRun
from tests.integration.run import Run

pytestmark = pytest.mark.integration
ASK_S = 10.0


def refused(run: Run) -> dict[str, int]:
    """What the controller has refused so far, by name."""
    answer = ask_run(run.folder, StatusRequest(), ASK_S)
    assert isinstance(answer, Status)
    counters = answer.run["refused"]
    assert isinstance(counters, dict)
    return counters


def test_a_run_with_keys_completes_through_a_dead_controller_and_a_renewed_key(
    new_run: NewRun, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    keys = tmp_path / "keys"
    make_keys(keys)
    options = ('bus.bind="tcp://0.0.0.0:*"', f'bus.keys="{keys}"', "policy.parallel.fsdp=2", 'evaluator.engine="own"')
    run = new_run().up(recipe, *options, "sft.batches=200")
    run.wait_for_steps(3, "sft")
    address = (run.folder / "controller.address").read_text().split()[0]
    assert address.startswith("tcp://0.0.0.0:")
    with pytest.raises((TurnedAway, BusTimeout)):
        ask(address, StatusRequest(), 1.0)
    run.wait_for(lambda: refused(run).get("handshake"), "the controller to count a connection without a key")

    renew_key(keys, "policy")
    run.wait_for(lambda: refused(run).get("key"), "the controller to refuse the policy's old key")
    run.kill("controller")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    joined = {(fact["replica"], fact["incarnation"]) for fact in run.facts("joined")}
    assert joined == {("policy-0", 1), ("rollout-0", 1), ("evaluator-0", 1)}, "nobody had to start again"


def test_a_service_without_its_key_ends_by_name(
    new_run: NewRun, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    keys = tmp_path / "keys"
    make_keys(keys, ("policy", "person"))
    run = new_run()
    options = ("--recipe", str(recipe), "--set", f'bus.keys="{keys}"', "--run-folder", str(run.folder))
    process = run.launch("services.rollout", *options, "--controller", "tcp://127.0.0.1:9")
    run.wait_for(lambda: process.poll() is not None, "the rollout's end")
    assert process.returncode == 2, run.story()
    assert run.said(f"expected a file of keys at {keys / 'rollout.key'}, found none"), run.story()
