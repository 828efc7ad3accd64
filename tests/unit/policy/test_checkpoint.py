"""Checkpoints: equal bits after a round trip, whole or not there, torn and foreign ones refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from services.policy import checkpoint
from services.policy.checkpoint import CheckpointError
from services.policy.state import head_of, tensors_of
from services.policy.trainer import Trainer
from shared.messages import CommitStep, Position
from shared.weights import digest_of
from shared.weights.staging import named_weights


def train(trainer: Trainer, tools: Any, stage: str, batches: int, of: int = 1) -> None:
    for _ in range(batches):
        for index in range(of):
            here = trainer.position
            step, frames = tools.step(trainer.recipe, here, stage=stage, index=index, of=of, seed=here.step)
            trainer.compute(step, frames)
            trainer.apply(CommitStep(step.step, step.attempt, here.lineage))


def save(trainer: Trainer, folder: Path, keep: int = 2) -> Path:
    return checkpoint.save(head_of(trainer), tensors_of(trainer), folder, "run-1", "recipe-1", keep)[0]


def resumed(recipe: Any, path: Path, tools: Any, lineage: int = 0) -> Trainer:
    state = checkpoint.read_state(path).position
    trainer = tools.trainer(recipe)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(float("nan"))  # whatever is not restored shows
    checkpoint.load(trainer, path, Position(lineage, state.version, state.step))
    return trainer


def assert_equal(left: Trainer, right: Trainer) -> None:
    for name, tensor in named_weights(left.model).items():
        assert torch.equal(tensor, named_weights(right.model)[name]), name
    assert left.position == right.position
    assert left.optimizer is not None and right.optimizer is not None
    ours, theirs = left.optimizer.tensors(), right.optimizer.tensors()
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert left.optimizer.steps == right.optimizer.steps


@pytest.mark.parametrize(
    "options",
    [{}, {"family": "qwen3_moe"}, {"model__dtype": "bfloat16"}, {"family": "llama"}],
    ids=["qwen3", "qwen3_moe", "bfloat16", "llama"],
)
@pytest.mark.parametrize("of", [1, 2], ids=["one-step", "two-steps-a-batch"])
def test_training_on_after_a_load_equals_uninterrupted_training_bit_for_bit(
    tools: Any, tmp_path: Path, options: dict[str, Any], of: int
) -> None:
    recipe = tools.recipe(**options)
    straight = tools.trainer(recipe)
    train(straight, tools, "sft", 2)
    train(straight, tools, "train", 1, of)
    again = resumed(recipe, save(straight, tmp_path), tools)
    assert_equal(again, straight)
    train(straight, tools, "train", 2, of)
    train(again, tools, "train", 2, of)
    assert_equal(again, straight)
    for name, tensor in straight.reference.tensors.items():
        assert torch.equal(tensor, again.reference.tensors[name]), name


def test_a_resumed_warm_up_goes_on_where_it_was(tools: Any, tmp_path: Path) -> None:
    recipe = tools.recipe(sft__warmup_steps=10)
    trainer = tools.trainer(recipe)
    train(trainer, tools, "sft", 3)
    again = resumed(recipe, save(trainer, tmp_path), tools)
    assert again.optimizer.rate(1.0) == trainer.optimizer.rate(1.0) == pytest.approx(0.4)


def test_the_random_state_comes_back(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    torch.manual_seed(123)
    path = save(trainer, tmp_path)
    expected = torch.rand(4)
    torch.manual_seed(7)
    resumed(trainer.recipe, path, tools)
    assert torch.equal(torch.rand(4), expected)


def test_a_checkpoint_before_the_first_stage_can_be_loaded(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    again = resumed(trainer.recipe, save(trainer, tmp_path), tools)
    assert again.stage is None and again.optimizer is None


def test_the_digest_is_that_of_the_weights(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    path, digest = checkpoint.save(head_of(trainer), tensors_of(trainer), tmp_path, "run-1", "recipe-1", 2)
    assert digest == digest_of(named_weights(trainer.model)) == checkpoint.read_state(path).digest


def test_a_new_lineage_may_start_from_an_old_checkpoint(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    train(trainer, tools, "sft", 1)
    again = resumed(trainer.recipe, save(trainer, tmp_path), tools, lineage=3)
    assert again.position == Position(3, 1, 1)


def test_saving_again_returns_the_same_checkpoint_untouched(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    first = checkpoint.save(head_of(trainer), tensors_of(trainer), tmp_path, "run-1", "recipe-1", 2)
    written = os.stat(first[0] / "manifest.json").st_mtime_ns
    assert checkpoint.save(head_of(trainer), tensors_of(trainer), tmp_path, "run-1", "recipe-1", 2) == first
    assert os.stat(first[0] / "manifest.json").st_mtime_ns == written


def test_another_lineage_writes_over_the_same_step(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    save(trainer, tmp_path)
    trainer.position = Position(1, 0, 0)
    assert checkpoint.read_state(save(trainer, tmp_path)).position.lineage == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_the_newest_is_found_by_number_not_by_spelling(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    for step in (9, 10, 100):
        trainer.position = Position(0, step, step)
        save(trainer, tmp_path, keep=5)
    assert checkpoint.newest(tmp_path) == tmp_path / "100"
    assert checkpoint.newest(tmp_path, Position(0, 99, 99)) == tmp_path / "10"
    assert checkpoint.newest(tmp_path, Position(0, 8, 8)) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_the_newest_complete_one_is_taken_when_a_newer_is_torn(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    for step in (1, 2):
        trainer.position = Position(0, step, step)
        save(trainer, tmp_path)
    os.truncate(tmp_path / "2" / "model.safetensors", 100)
    assert checkpoint.newest(tmp_path) == tmp_path / "1"


def test_the_newest_are_kept_and_what_another_lineage_left_ahead_is_removed(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    for step in (9, 10, 11, 20):
        trainer.position = Position(0, step, step)
        save(trainer, tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "20"]
    trainer.position = Position(1, 12, 12)
    save(trainer, tmp_path, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "12"]


def test_the_one_before_the_newest_stays_even_when_one_is_to_be_kept(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    for step in (1, 2, 3):
        trainer.position = Position(0, step, step)
        save(trainer, tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_reference_weights_are_written_once_a_stage(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    paths = []
    for _ in range(2):
        train(trainer, tools, "train", 1)
        paths.append(save(trainer, tmp_path))
    first, second = (os.stat(path / "reference.safetensors").st_ino for path in paths)
    assert first == second
    resumed(trainer.recipe, paths[1], tools)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["gone", "cut", "flipped"])
def test_a_torn_or_altered_checkpoint_is_refused_by_name(tools: Any, tmp_path: Path, name: str, fault: str) -> None:
    trainer = tools.trainer(tools.recipe())
    train(trainer, tools, "sft", 1)
    file = save(trainer, tmp_path) / name
    content = file.read_bytes()
    if fault == "gone":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    before = tools.weights(trainer)
    with pytest.raises(CheckpointError, match=r"checkpoint .*/1: expected .*, got .*; ") as caught:
        checkpoint.load(trainer, tmp_path / "1", trainer.position)
    assert name in str(caught.value) or name == "manifest.json"
    assert all(torch.equal(tensor, before[n]) for n, tensor in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "change", [{"model__build": {"hidden_size": 24}}, {"family": "qwen2"}], ids=["shape", "family"]
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tools: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tools.trainer(tools.recipe()), tmp_path)
    if "model__build" in change:
        recipe = tools.recipe()
        build = recipe.model.build.model_copy(update=change["model__build"])
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"build": build})})
    else:
        recipe = tools.recipe(**change)
    with pytest.raises(CheckpointError, match="it is of another model"):
        checkpoint.load(tools.trainer(recipe), path, tools.start)


def test_a_checkpoint_of_another_step_is_refused(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    with pytest.raises(CheckpointError, match="step=7"):
        checkpoint.load(trainer, save(trainer, tmp_path), Position(0, 7, 7))


def test_a_checkpoint_of_a_later_format_is_refused(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    path = save(trainer, tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_state(path)


def test_leftovers_of_a_killed_writer_are_removed_and_never_found(tools: Any, tmp_path: Path) -> None:
    trainer = tools.trainer(tools.recipe())
    (tmp_path / ".5.partial-999").mkdir()
    assert checkpoint.newest(tmp_path) is None
    save(trainer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_nothing(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tools.trainer(tools.recipe()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_given_up_touches_nothing_of_the_lineage_after_it(tools: Any, tmp_path: Path) -> None:
    zombie, heir = tools.trainer(tools.recipe()), tools.trainer(tools.recipe())
    for step in (2, 4, 6):
        heir.position = Position(2, step, step)
        save(heir, tmp_path, keep=3)
    zombie.position = Position(1, 4, 4)
    with pytest.raises(CheckpointError, match="later lineage"):
        save(zombie, tmp_path, keep=1)
    zombie.position = Position(1, 5, 5)
    save(zombie, tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5", "6"]
    assert checkpoint.read_state(tmp_path / "6").position == heir.position
