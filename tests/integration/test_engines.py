"""Real engines in real runs, each in its own environment; `make test-engines` makes the environments first."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from deploy.local.environments import python_for
from shared.config import RecipeError
from tests.integration.conftest import NewRun
from tests.integration.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.engines]
ENGINES = ("vllm", "sglang", "transformers")
WORKER = {"vllm": "VLLM::Worker", "sglang": "sglang::scheduler"}


def wants(*engines: str) -> None:
    for engine in engines:
        try:
            python_for(engine)  # type: ignore[arg-type]
        except RecipeError as missing:
            pytest.skip(str(missing))


def workers(run: Run, replica: str) -> list[psutil.Process]:
    """The processes of a replica's engine that hold a model."""
    children = psutil.Process(run.pid_of(replica)).children(recursive=True)
    return [child for child in children if any(title in " ".join(child.cmdline()) for title in WORKER.values())]


def test_three_engines_generate_for_one_run(new_run: NewRun, recipe: Path) -> None:
    wants(*ENGINES)
    names = ", ".join(f'"{engine}"' for engine in ENGINES)
    options = ("rollout.replicas=3", f"rollout.engine=[{names}]", "train.batches=60", "train.max_staleness=0")
    run = new_run().up(recipe, *options)
    assert run.wait() == 0, run.story()
    run.assert_complete()
    holder = {(fact["group"], fact["attempt"]): fact["replica"] for fact in run.facts("leased")}
    reporters = {holder.get((fact["group"], fact["attempt"])) for fact in run.facts("reported")}
    assert {"rollout-0", "rollout-1", "rollout-2"} <= reporters
    # float32 and fresh weights on all sides: engines and trainer agree to rounding, whoever generated
    off = [line["mismatch_max"] for line in run.metrics() if "mismatch_max" in line]
    assert len(off) >= 60 and max(off) < 1e-3
    for engine in ENGINES:
        own = [line[f"mismatch_abs/{engine}"] for line in run.metrics() if f"mismatch_abs/{engine}" in line]
        assert own and max(own) < 1e-4


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_killed_engine_worker_costs_the_replica_alone(new_run: NewRun, recipe: Path, engine: str) -> None:
    wants(engine)
    run = new_run().up(
        recipe, f'rollout.engine=["{engine}", "transformers"]', "rollout.replicas=2", "train.batches=200"
    )
    run.wait_for_steps(3, "train")
    [worker, *_] = workers(run, "rollout-0")
    worker.send_signal(signal.SIGKILL)
    run.wait_for(lambda: any(fact["replica"] == "rollout-0" for fact in run.facts("gone")), "rollout-0 to be lost")
    assert run.wait() == 0, run.story()
    run.assert_complete()
