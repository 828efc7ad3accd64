"""Which Python runs which process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.local import environments
from deploy.local.environments import check_environments, python_for
from shared.config import Recipe, RecipeError
from shared.config.schema import RolloutTable


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "SOURCE", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def test_the_transformers_engine_runs_in_this_environment(source: Path) -> None:
    assert python_for("transformers") == sys.executable


def test_an_engine_runs_in_its_own_environment(source: Path) -> None:
    python = source / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert python_for("vllm") == str(python)


def test_an_engine_that_this_environment_has_runs_here(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "sglang" else None)
    assert python_for("sglang") == sys.executable


def test_a_missing_environment_is_named_with_the_command_that_makes_it(source: Path) -> None:
    recipe = Recipe.model_construct(rollout=RolloutTable(engine=["transformers", "sglang"]))
    with pytest.raises(RecipeError, match=r"'sglang' has an environment of its own.*run 'make env-sglang'"):
        check_environments(recipe)


def test_replicas_take_the_engines_of_a_list_in_turn() -> None:
    table = RolloutTable(engine=["vllm", "sglang"])
    names = ["rollout-0", "rollout-1", "rollout-2", "by-hand"]
    assert [table.engine_of(name) for name in names] == ["vllm", "sglang", "vllm", "vllm"]
    assert RolloutTable(engine="vllm").engine_of("rollout-7") == "vllm"
    for wrong in ([], ["vllm", "tgi"], "tgi", 3):
        with pytest.raises(ValueError, match="expected one of transformers, vllm, sglang, or a list of them"):
            RolloutTable(engine=wrong)
