"""[[rewards.parts]]: each kind has its own keys, its name, and its refusals."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from shared.config import RecipeError, dump_recipe, load_recipe
from shared.config.schema import LengthPart, PythonPart

RECIPE = """
[model.build]
[data.sums]
kind = "reasoning_gym"
task = "chain_sum"
[train]
dataset = "sums"
batches = 1
batch_size = 1
lr = 1e-3
"""


def load(folder: Path, parts: str) -> list[object]:
    path = folder / "recipe.toml"
    path.write_text(RECIPE + parts)
    return list(load_recipe(path).rewards.parts)


def part(**keys: object) -> str:
    return "[[rewards.parts]]\n" + "".join(f"{key} = {value!r}\n" for key, value in keys.items())


def test_a_part_is_named_after_its_kind_or_its_function_unless_it_has_a_name(tmp_path: Path) -> None:
    text = part(kind="exact") + part(kind="python", function="my:score") + part(kind="format", name="shape", weight=2)
    assert [(p.name, p.weight) for p in load(tmp_path, text)] == [("exact", 1.0), ("score", 1.0), ("shape", 2.0)]


def test_without_parts_the_reward_is_the_verifier(tmp_path: Path) -> None:
    assert [p.name for p in load(tmp_path, "")] == ["verifier"]


def test_a_module_is_looked_for_beside_the_recipe_also_by_the_runs_own_copy(tmp_path: Path) -> None:
    text = part(kind="python", function="a:f") + part(kind="python", function="b:g", path="sub")
    paths = [p.path for p in load(tmp_path, text) if isinstance(p, PythonPart)]
    assert paths == [str(tmp_path), str(tmp_path / "sub")]
    copy = tomllib.loads(dump_recipe(load_recipe(tmp_path / "recipe.toml")))
    assert [p["path"] for p in copy["rewards"]["parts"]] == paths


def test_the_keys_of_a_kind_are_its_own(tmp_path: Path) -> None:
    (length,) = load(tmp_path, part(kind="length", max_length=60, cache_length=20))
    assert isinstance(length, LengthPart)
    assert (length.max_length, length.cache_length) == (60, 20)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            part(kind="python", functoin="a:f"),
            "rewards.parts.0.functoin: unknown key; did you mean rewards.parts.0.fun",
        ),
        (part(kind="exact", function="a:f"), "rewards.parts.0.function: unknown key"),
        (part(kind="python", function="a.f"), "expected module:function, such as my_rewards:score (got 'a.f')"),
        (part(kind="pyton"), "rewards.parts.0.kind: expected one of 'verifier', 'exact'"),
        (part(weight=1.0), "rewards.parts.0.kind: expected one of 'verifier', 'exact'"),
        (part(kind="exact") + part(kind="exact"), "two parts are named 'exact': give one of them another `name`"),
        (part(kind="exact", name="a b"), "rewards.parts.0.name"),
        (part(kind="length", max_length=9), "rewards.parts.0.cache_length: missing"),
        (part(kind="length", max_length=9, cache_length=10), "cache_length is 10, more than max_length = 9"),
        (
            part(kind="length", max_length=99, cache_length=10),
            "no completion has more than rollout.max_new_tokens = 64",
        ),
        (part(kind="choice", options=11), "rewards.parts.0.options"),
        (part(kind=["exact"]), "rewards.parts.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(tmp_path: Path, parts: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, parts)
    assert said in str(caught.value)
