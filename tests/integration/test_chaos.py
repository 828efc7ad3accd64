"""The chaos benchmark from beginning to end: a run in which everybody is killed comes through, and is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.run import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OPTIONS = "--policies 1 --rollouts 1 --evaluators 0 --kinds kill --faults 3 --every 10 --seed 1"


def test_a_run_whose_every_role_is_killed_comes_through_and_is_reported(tmp_path: Path, recipe: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--recipe", str(recipe), *OPTIONS.split()]
    command += ["--set", "checkpoint.every=10", "--limit", "240"]
    command += ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (seed,) = json.loads((tmp_path / "chaos.json").read_text())["seeds"]
    assert seed["verdict"]["faults"] == []
    assert seed["verdict"]["terms"] == 2
    recoveries = {it["name"]: it for it in seed["recoveries"]}
    assert sorted(recoveries) == ["kill controller", "kill policy-0", "kill rollout-0"]
    for it in recoveries.values():
        # noticed by the launcher at once, not by silence, and told apart from the start of Python
        assert 0 < it["detect_s"] < 5
        assert it["restart_s"] > 0
        assert it["commit_s"] is not None
    assert 0 < seed["goodput"] < 1.5
    assert (tmp_path / "chaos-1.png").read_bytes().startswith(b"\x89PNG")
    assert "| kill policy-0 |" in (tmp_path / "chaos.md").read_text()
