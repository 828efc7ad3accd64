"""What the benchmark of shared prompts compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shared_prompt import make_step, no_mesh, one_way, separate_rows, timed, tokens_of
from services.policy.batch import rows_of, sequences_of
from services.policy.layouts.compose import layout_of
from services.policy.trainer import Trainer
from shared.config import Recipe, load_recipe
from shared.messages import Position
from shared.models import load_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(name="recipe")
def _recipe() -> Recipe:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml")
    assert recipe.train is not None
    train = recipe.train.model_copy(update={"batch_size": 2, "samples": 3})
    return recipe.model_copy(update={"train": train})


def test_separate_rows_repeat_the_prompt_of_every_sample(recipe: Recipe) -> None:
    step, frames = make_step(recipe, seed=1)
    sequences = sequences_of(step, frames)
    apart, together = separate_rows(sequences, 1000, 128), rows_of(sequences, 1000, 128)
    assert (len(apart), len(together)) == (6, 2)
    assert tokens_of(recipe, step, frames, 128, shared=False) == sum(row.length for row in apart)
    repeated = 2 * sum(group.prompt_length for group in step.groups)
    assert tokens_of(recipe, step, frames, 128, shared=True) == sum(row.length for row in apart) - repeated


def test_both_ways_have_one_gradient(recipe: Recipe) -> None:
    step, frames = make_step(recipe, seed=1)
    norms = []
    for shared in (True, False):
        model = load_model(recipe.model, recipe.run.seed, weights=True)
        with one_way(shared):
            norms.append(
                timed(Trainer(layout_of(model, recipe), recipe, Position(0, 0, 0), no_mesh), step, frames)[1][
                    "grad_norm"
                ]
            )
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
