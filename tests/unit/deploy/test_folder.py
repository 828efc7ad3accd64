"""Run folders and their lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import runs
from deploy.cli.runs import RunNotFoundError, find_run
from deploy.local.folder import RunBusyError, RunLock, change_recipe, create_run, holder, newest_run
from shared.config import Recipe, RecipeError, load_recipe

RECIPE = {
    "run": {"name": "small"},
    "model": {"build": {}},
    "data": {"a": {"kind": "jsonl", "path": "a.jsonl"}},
    "sft": {"dataset": "a", "batches": 1, "batch_size": 1, "lr": 1e-3},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return Recipe.model_validate(RECIPE)


def test_two_runs_of_the_same_second_get_folders_of_their_own(recipe: Recipe) -> None:
    first, second = create_run(recipe), create_run(recipe)
    assert first != second
    assert first.name.startswith("small-")
    assert load_recipe(second / "config.toml") == recipe


def test_latest_points_to_the_newest_run(recipe: Recipe) -> None:
    create_run(recipe)
    second = create_run(recipe)
    assert newest_run(Path("runs")) == second.resolve()
    assert (Path("runs") / "latest").is_symlink()
    assert sorted(p.name for p in Path("runs").iterdir() if p.name.startswith(".")) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    create_run(recipe, tmp_path / "mine")
    with pytest.raises(FileExistsError, match="orrery resume"):
        create_run(recipe, tmp_path / "mine")


def test_a_run_is_found_by_path_by_id_and_as_the_newest(recipe: Recipe) -> None:
    run = create_run(recipe)
    assert find_run(None) == find_run(run.name) == find_run(str(run)) == run.resolve()


def test_a_run_that_is_not_there_is_told_with_those_that_are(recipe: Recipe) -> None:
    with pytest.raises(RunNotFoundError, match="orrery up"):
        find_run(None)
    run = create_run(recipe)
    with pytest.raises(RunNotFoundError, match=run.name):
        find_run("other")
    assert Path("runs") == runs.RUNS


def test_one_run_has_one_supervisor(recipe: Recipe) -> None:
    run = create_run(recipe)
    assert holder(run) is None
    with RunLock(run):
        assert holder(run) == os.getpid()
        with pytest.raises(RunBusyError, match=f"process {os.getpid()}"), RunLock(run):
            pass
        assert holder(run) == os.getpid()
    assert holder(run) is None


def test_a_killed_supervisor_leaves_no_lock(recipe: Recipe) -> None:
    run = create_run(recipe).resolve()
    code = (
        "import os, sys; from pathlib import Path; from deploy.local.folder import RunLock; "
        "RunLock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code, str(run)], cwd=root, check=False, timeout=30).returncode == -9
    assert (run / "supervisor.pid").read_text().strip().isdigit()
    assert holder(run) is None
    with RunLock(run):
        assert holder(run) == os.getpid()


def test_how_a_policy_computes_may_change_between_two_starts(recipe: Recipe) -> None:
    folder = create_run(recipe)
    changed = change_recipe(folder, ["policy.parallel.fsdp=4", "policy.gradient_checkpointing=true"])
    assert changed.policy.parallel.ranks == 4
    assert load_recipe(folder / "config.toml") == changed


def test_what_a_run_is_may_not_change_and_the_recipe_stays_as_it_was(recipe: Recipe) -> None:
    folder = create_run(recipe)
    with pytest.raises(RecipeError, match=r"sft\.batches: expected 1, which the run began with, got 9"):
        change_recipe(folder, ["sft.batches=9", "policy.parallel.tp=2"])
    assert load_recipe(folder / "config.toml") == recipe
