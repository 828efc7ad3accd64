"""What `orrery eval` makes of what a person types."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.cli.evaluated import EvalError, ask, find_model
from shared.config import Recipe

NOTHING: dict[str, object] = {}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = tmp_path / "sums.jsonl"
    rows.write_text('{"prompt": "1+1", "answer": 2, "level": "easy"}\n' * 3)
    data = {"sums": {"kind": "jsonl", "path": str(rows)}}
    suites = {"sums": {"problems": 2}, "split": {"dataset": "sums", "category": "level"}}
    train = {"dataset": "sums", "batches": 1, "batch_size": 1, "lr": 1e-3}
    tree = {"model": {"build": {}}, "data": data, "train": train, "evaluation": {"suites": suites}}
    return Recipe.model_validate(tree)


def test_the_first_suite_is_asked_unless_another_is_named(recipe: Recipe) -> None:
    assert ask(None, recipe, NOTHING, 0).name == "sums"
    asked = ask("split", recipe, {"problems": 1}, 0)
    assert (asked.name, asked.suite.problems, asked.dataset.category(0, "level")) == ("split", 1, "easy")


def test_a_task_and_a_file_are_suites_without_a_recipe(tmp_path: Path, recipe: Recipe) -> None:
    assert len(ask("task:chain_sum", None, {"problems": 7}, 0).dataset) == 7
    assert ask(str(tmp_path / "sums.jsonl"), None, NOTHING, 0).dataset.row(0).answer == "2"


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("nothing", "expected a suite of the recipe"),
        ("task:nothing", "expected a task"),
        ("no.jsonl", "expected a file"),
    ],
)
def test_a_suite_that_is_none_is_told_what_would_be_one(recipe: Recipe, suite: str, expected: str) -> None:
    with pytest.raises(EvalError, match=expected):
        ask(suite, recipe, NOTHING, 0)


def test_without_a_suite_and_a_recipe_nothing_is_asked() -> None:
    with pytest.raises(EvalError, match="--suite task:chain_sum"):
        ask(None, None, NOTHING, 0)


def test_samples_of_greedy_answers_are_refused(recipe: Recipe) -> None:
    with pytest.raises(EvalError, match="greedy answers are all alike"):
        ask("sums", recipe, {"samples": 3}, 0)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"neither config\.json nor config\.toml"):
        find_model(str(tmp_path))
    with pytest.raises(EvalError, match="nothing there"):
        find_model(str(tmp_path / "nothing"))


def test_a_name_is_taken_for_one_of_the_hub() -> None:
    assert find_model("Qwen/Qwen3-0.6B").table.path == "Qwen/Qwen3-0.6B"
