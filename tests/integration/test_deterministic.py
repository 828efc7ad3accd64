"""`deterministic = true`: equal bits at the end of two runs, and of a run that was stopped and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run, signal, write_recipe

pytestmark = pytest.mark.integration

SETS = (
    "run.deterministic=true",
    "train.max_staleness=0",
    "train.filter_equal_rewards=true",  # waves of different sizes, some groups wait for the next batch
    "train.mu=2",
    "train.minibatches=2",
    "rollout.slots=8",
)
EXIT_INTERRUPTED = 130


def digests(run: Run) -> dict[str, str]:
    """sha256 of the files that hold what was learnt."""
    last = run.folder / run.facts("settled")[-1]["path"]
    files = [run.folder / "export" / "model.safetensors", *last.glob("*.safetensors")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Run]]:
    """A run from its start to its end, and its recipe."""
    folder = tmp_path_factory.mktemp("deterministic")
    recipe = write_recipe(folder)
    with Run(folder / "whole") as run:
        assert run.up(recipe, *SETS).wait() == 0, run.story()
        yield recipe, run


def test_two_runs_end_with_equal_bits(new_run: NewRun, whole: tuple[Path, Run]) -> None:
    recipe, first = whole
    second = new_run().up(recipe, *SETS)
    assert second.wait() == 0, second.story()
    second.assert_complete()
    assert digests(second) == digests(first)
    losses = [[line["loss"] for line in run.metrics()] for run in (first, second)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", ["train", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(
    new_run: NewRun, whole: tuple[Path, Run], stage: str
) -> None:
    recipe, first = whole
    run = new_run().up(recipe, *SETS)
    run.wait_for_steps(5, stage)
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait() == EXIT_INTERRUPTED, run.story()
    stopped = run.audit()
    assert (stopped.clean, stopped.outcome) == (True, "stopped"), "\n".join(stopped.lines())
    assert len(run.metrics()) < len(first.metrics())
    assert run.all_gone(), run.story()

    assert run.resume().wait() == 0, run.story()
    assert run.assert_complete().rollbacks == []
    assert digests(run) == digests(first)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["controller", "policy", "rollout", SUPERVISOR])
def test_not_even_a_kill_changes_a_bit(new_run: NewRun, whole: tuple[Path, Run], role: str) -> None:
    recipe, first = whole
    run = new_run().up(recipe, *SETS)
    run.wait_for_steps(6, "train")
    run.kill(role)
    if role == SUPERVISOR:
        run.wait()
        run.wait_for(run.all_gone, "the end of every process of the run", timeout_s=20)
        run.resume()
    assert run.wait() == 0, run.story()
    run.assert_complete()
    assert digests(run) == digests(first)
