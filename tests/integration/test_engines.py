"""Real engines in real runs, each in its own environment; `make test-engines` makes the environments first."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from deploy.local.environments import python_for
from shared.config import RecipeError
from tests.integration.conftest import NewRun
from tests.integration.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.engines]
ENGINES = ("vllm", "sglang", "transformers")
LOST_AFTER_S = 6
AT_ONCE_S = 2.0
ENGINE_S = 400.0
"""Patience with an engine of several processes on a machine that does other things too."""
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
    assert run.wait(ENGINE_S) == 0, run.story()
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
def test_a_killed_engine_worker_costs_the_replica_alone_and_at_once(new_run: NewRun, recipe: Path, engine: str) -> None:
    wants(engine)
    run = new_run().up(
        recipe, f'rollout.engine=["{engine}", "transformers"]', "rollout.replicas=2", "train.batches=200"
    )
    run.wait_for_steps(3, "train")
    [worker] = workers(run, "rollout-0")
    assert registered(run, "rollout-0") == [{0: run.pid_of("rollout-0"), 1: worker.pid}]
    worker.send_signal(signal.SIGKILL)
    killed = time.time()
    run.wait_for(lambda: losses(run), "rollout-0 to be lost")
    [(at, cause)] = losses(run)
    assert f"rank 1 (process {worker.pid}) ended" in cause
    assert at - killed < AT_ONCE_S
    assert run.wait(ENGINE_S) == 0, run.story()
    run.assert_complete()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_silent_engine_worker_costs_the_replica_and_it_comes_back_as_new_processes(
    new_run: NewRun, recipe: Path, engine: str
) -> None:
    wants(engine)
    options = ("rollout.parallel.tp=2", "train.batches=60", f"bus.lost_after_s={LOST_AFTER_S}")
    run = new_run().up(recipe, f"rollout.engine={engine}", *options)
    run.wait_for(lambda: len(run.steps("train", 1)) >= 3, "the first steps", ENGINE_S)
    [ranks] = registered(run, "rollout-0")
    held = {process.pid for process in workers(run, "rollout-0")}
    assert (set(ranks), {ranks[1], ranks[2]}, ranks[0]) == ({0, 1, 2}, held, run.pid_of("rollout-0"))
    run.signal(ranks[1], signal.SIGSTOP)
    stopped = time.time()
    run.wait_for(lambda: losses(run), "the loss of a replica with a silent rank")
    [(at, cause)] = losses(run)
    assert cause.startswith("rank 1 silent for")
    assert at - stopped < LOST_AFTER_S + AT_ONCE_S
    run.wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks.values()), "the end of all its ranks")
    assert run.wait(ENGINE_S) == 0, run.story()
    run.assert_complete()
    assert len(losses(run)) == 1
    assert [set(start) for start in registered(run, "rollout-0")] == 2 * [{0, 1, 2}]


def registered(run: Run, replica: str) -> list[dict[int, int]]:
    """Process id by rank of each start of a replica, as the controller has put it on record."""
    starts: dict[int, dict[int, int]] = {}
    for record in run.records():
        event = record["event"]
        if event["type"] == "replica_registered" and event["register"]["replica"] == replica:
            register = event["register"]
            starts.setdefault(register["nonce"], {})[register["rank"]] = register["pid"]
    return list(starts.values())


def losses(run: Run) -> list[tuple[float, str]]:
    """When the rollout was lost, by the controller's clock, and why."""
    return [
        (record["event"]["at"], fact["cause"])
        for record in run.records()
        for fact in record["facts"]
        if fact["type"] == "gone" and fact["state"] == "lost" and fact["replica"] == "rollout-0"
    ]
