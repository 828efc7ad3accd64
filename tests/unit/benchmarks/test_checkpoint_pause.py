"""What the benchmark of a checkpoint's pause compares: two ways of writing one state."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.checkpoint_pause import FOLDER, Training, as_markdown, measure
from services.policy import checkpoint

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"


def test_both_ways_write_the_same_state(tmp_path: Path) -> None:
    given = Namespace(recipe=RECIPE, hidden=16, layers=1)
    training = Training(given, tmp_path)
    training.step()
    training.save_in_the_way()
    path = tmp_path / FOLDER / "1"
    first = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    path.rename(tmp_path / "first")
    training.save_beside()
    assert checkpoint.verify(path).position.step == 1
    assert first.keys() == {file.name for file in path.glob("*.safetensors")}
    for name, tensors in first.items():
        again = load_file(path / name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items()), name


def test_the_table_has_the_ratio_of_the_pauses(tmp_path: Path) -> None:
    given = Namespace(recipe=RECIPE, folder=tmp_path, hidden=16, layers=1, rounds=1, steps=1)
    result = measure(given)
    assert f"**{result['ratio']:.1f}**" in as_markdown(result)
    assert list(tmp_path.iterdir()) == []
