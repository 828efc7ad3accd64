"""Recipes: what is refused and how it is said, what `--set` does, which fields are live."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import RecipeError, check_changes, check_scale, dump_recipe, live_fields, live_values, load_recipe

RECIPE = """
[run]
name = "small"

[model.build]

[data.sums]
kind = "reasoning_gym"
task = "chain_sum"

[data.held]
kind = "reasoning_gym"
task = "chain_sum"
seed = 7
options = { min_terms = 3, max_terms = 3 }

[sft]
dataset = "sums"
batches = 5
batch_size = 8
lr = 1e-3

[train]
dataset = "sums"
batches = 10
batch_size = 16
lr = 1e-4

[evaluation.suites.held]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_fill_what_a_recipe_leaves_out(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.rollout.replicas == 1
    assert recipe.train is not None
    assert recipe.train.max_staleness == 1


def test_an_unknown_key_is_refused_with_the_nearest_one_of_its_table(recipe_file: Path) -> None:
    text = refusal(recipe_file, "train.bacth_size=4")
    assert "train.bacth_size: unknown key" in text
    assert "did you mean train.batch_size?" in text


def test_a_key_in_the_wrong_table_is_told_where_it_belongs(recipe_file: Path) -> None:
    assert "did you mean rollout.temperature?" in refusal(recipe_file, "checkpoint.temperature=0.5")


def test_an_unknown_table_is_refused(recipe_file: Path) -> None:
    assert "did you mean rollout?" in refusal(recipe_file, "rolout.slots=4")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ('train.batches="10"', "train.batches"),
        ("train.batches=1.5", "train.batches"),
        ("train.lr=true", "train.lr"),
        ("train.lr=0", "train.lr"),
        ("train.max_staleness=-1", "train.max_staleness"),
        ("run.deterministic=1", "run.deterministic"),
        ("weights.backend=mpi", "weights.backend"),
        ("run.name=../up", "run.name"),
        ("rollout.engine=tgi", "rollout.engine"),
        ("rollout.quantization=int4", "rollout.quantization"),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_name(recipe_file: Path, override: str, field: str) -> None:
    text = refusal(recipe_file, override)
    assert f"  {field}: " in text
    assert "got" in text


def test_a_whole_number_is_good_enough_for_a_float(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.lr=1", "bus.heartbeat_s=2"])
    assert isinstance(recipe.train and recipe.train.lr, float)
    assert recipe.bus.heartbeat_s == 2.0


def test_a_dataset_that_is_not_there_is_told_with_those_that_are(recipe_file: Path) -> None:
    text = refusal(recipe_file, "train.dataset=summs")
    assert "summs" in text
    assert "held, sums" in text


def test_a_run_with_nothing_to_do_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n')
    assert "nothing to do" in refusal(path)


@pytest.mark.parametrize("missing", ["train", "evaluation"])
def test_a_run_that_needs_rollouts_is_refused_without_any(tmp_path: Path, missing: str) -> None:
    tables = {
        "train": '[train]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n',
        "evaluation": '[evaluation.suites.held]\ndataset = "a"\n',
    }
    path = tmp_path / "r.toml"
    sft = '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
    path.write_text(f'[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n{sft}[rollout]\nreplicas = 0\n')
    assert load_recipe(path).rollout.replicas == 0
    path.write_text(path.read_text() + tables[missing])
    assert "rollout.replicas = 0 leaves nobody" in refusal(path)


def test_deterministic_wants_an_engine_that_does_not_go_by_the_clock(recipe_file: Path) -> None:
    overrides = ["run.deterministic=true", "train.max_staleness=0", "rollout.engine=vllm"]
    assert 'run.deterministic wants rollout.engine = "transformers"' in refusal(recipe_file, *overrides)


def test_deterministic_wants_no_staleness(recipe_file: Path) -> None:
    assert "max_staleness = 0" in refusal(recipe_file, "run.deterministic=true")
    assert load_recipe(recipe_file, ["run.deterministic=true", "train.max_staleness=0"]).run.deterministic


def test_a_model_comes_from_exactly_one_source(recipe_file: Path) -> None:
    assert "exactly one of" in refusal(recipe_file, "model.path=some/folder")


def test_a_missing_file_and_broken_toml_are_told_apart(tmp_path: Path) -> None:
    assert "no recipe at" in refusal(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    assert "not valid TOML" in refusal(broken)


@pytest.mark.parametrize("override", ["train.lr", "=3", ""])
def test_an_override_without_key_or_value_is_refused_with_an_example(recipe_file: Path, override: str) -> None:
    assert "train.lr=1e-5" in refusal(recipe_file, override)


def test_an_override_cannot_go_below_a_value(recipe_file: Path) -> None:
    assert "is a value, not a table" in refusal(recipe_file, "train.lr.x=1")


@pytest.mark.parametrize("text", ["7", "1e5", "true", "2026-01-01", "some words"])
def test_an_override_of_a_text_field_is_text_whatever_it_looks_like(recipe_file: Path, text: str) -> None:
    assert load_recipe(recipe_file, [f"data.sums.system={text}"]).data["sums"].system == text


def test_an_override_of_a_mixed_field_keeps_its_toml_type(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.held.options.max_terms=4", "data.held.options.kind=plain"])
    assert recipe.data["held"].options == {"min_terms": 3, "max_terms": 4, "kind": "plain"}


def test_later_overrides_win(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.batches=3", "train.batches=4"])
    assert recipe.train is not None
    assert recipe.train.batches == 4


def test_what_is_dumped_loads_as_the_same_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["train.lr=1e-7", "data.sums.system=be \"brief\"\nand 'kind'", "run.seed=12345678901"]
    )
    again = tmp_path / "config.toml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_a_loaded_recipe_cannot_be_changed(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.seed = 3  # type: ignore[misc]


def test_live_fields_are_those_that_the_schema_marks(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    live = live_fields(recipe)
    assert {"train.lr", "sft.lr", "rollout.temperature", "train.clip_high", "checkpoint.every"} <= set(live)
    assert not {"train.batches", "run.seed", "model.path"} & set(live)
    assert live_values(recipe)["train.lr"] == 1e-4


def test_a_stage_that_a_recipe_lacks_has_no_live_fields(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.split("[sft]")[0] + "[train]" + RECIPE.split("[train]")[1])
    assert not [name for name in live_fields(load_recipe(path)) if name.startswith("sft.")]


def test_a_live_change_is_checked_like_the_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    checked = check_changes(recipe, live_values(recipe), {"train.lr": 1, "train.samples": 4})
    assert checked == {"train.lr": 1.0, "train.samples": 4}
    with pytest.raises(RecipeError, match=r"train\.samples"):
        check_changes(recipe, live_values(recipe), {"train.samples": 1})
    with pytest.raises(RecipeError, match=r"train\.lr"):
        check_changes(recipe, live_values(recipe), {"train.lr": "fast"})


def test_a_field_that_is_not_live_is_refused_with_those_that_are(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(RecipeError, match=r"train\.batches cannot change.*train\.lr"):
        check_changes(recipe, live_values(recipe), {"train.batches": 3})


def test_a_change_is_checked_together_with_those_before_it(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    values = live_values(recipe) | {"rollout.max_new_tokens": 100_000_000}
    with pytest.raises(RecipeError, match=r"max_message_mb"):
        check_changes(recipe, values, {"train.samples": 8})


def test_a_trust_band_without_an_inside_is_refused_in_the_recipe_and_live(recipe_file: Path) -> None:
    assert "expected is_floor below is_cap" in refusal(recipe_file, "train.is_floor=3.0")
    recipe = load_recipe(recipe_file)
    with pytest.raises(RecipeError, match=r"expected is_floor below is_cap.*3\.0 and 2\.0"):
        check_changes(recipe, live_values(recipe), {"train.is_floor": 3.0})


def test_what_is_done_about_mismatch_is_live(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    change = {"train.is_correction": "mask", "train.is_level": "sequence"}
    assert check_changes(recipe, live_values(recipe), change) == change
    with pytest.raises(RecipeError, match=r"train\.is_correction.*'truncate', 'mask' or 'none'"):
        check_changes(recipe, live_values(recipe), {"train.is_correction": "clip"})


def test_the_weights_of_rewards_are_live_by_the_name_of_their_part(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    name = recipe.rewards.parts[0].name
    assert live_values(recipe)[f"rewards.{name}.weight"] == recipe.rewards.parts[0].weight
    assert check_changes(recipe, live_values(recipe), {f"rewards.{name}.weight": 2}) == {f"rewards.{name}.weight": 2.0}
    with pytest.raises(RecipeError, match="less than or equal to 100"):
        check_changes(recipe, live_values(recipe), {f"rewards.{name}.weight": 1000.0})


def test_numbers_of_replicas_that_the_recipe_forbids_are_refused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    check_scale(recipe, {"rollout": 3})
    with pytest.raises(RecipeError, match=r"rollout\.replicas"):
        check_scale(recipe, {"rollout": 0})


def test_an_engine_with_workers_makes_a_replica_of_several_ranks(recipe_file: Path) -> None:
    mixed = load_recipe(recipe_file, ['rollout.engine=["transformers", "vllm"]']).rollout
    assert [mixed.world_of(f"rollout-{number}") for number in range(3)] == [1, 2, 1]
    sharded = load_recipe(recipe_file, ["rollout.engine=sglang", "rollout.parallel.tp=2", "rollout.parallel.pp=2"])
    assert sharded.rollout.world_of("rollout-0") == 5
