"""Runs whose rollouts are in the images of vLLM and SGLang; `make test-compose-engines`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compose.conftest import NewRun
from tests.compose.engine import MAKE, Engine, make_wheels
from tests.compose.engine import run as call
from tests.integration.test_engines import ENGINE_S, registered

pytestmark = [pytest.mark.compose, pytest.mark.engines]
BUILD_S = 1200.0


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_and_its_workers_do_a_run_with_keys(new_run: NewRun, recipe: Path, engine: Engine, name: str) -> None:
    make_wheels(name)
    call([*MAKE, "images", f"IMAGES=rollout-{name}"], engine.environment, BUILD_S)
    run = new_run().up(recipe, f"timeouts.load_s={ENGINE_S}", engine=name)
    run.wait_for(lambda: len(run.steps("train", 1)) >= 1, "the first step", ENGINE_S)
    assert run.inside("rollout-0", "ls", "/run/secrets") == "rollout.key"
    assert run.wait(ENGINE_S) == 0, run.story()
    run.assert_complete()
    # one start; the engine's worker is a rank, which connects with its replica's key
    [ranks] = registered(run, "rollout-0")
    assert set(ranks) == {0, 1}
