"""The ranks of a replica, for test_first_load.py: each loads the recipe's model from its files, and tells what it took.

`python loading_ranks.py FOLDER`: on standard input the recipe; FOLDER gets RANK.json. Ranks are forked, so that the
libraries are loaded once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from services.policy.layouts.compose import load_layout
from services.policy.layouts.grid import Grid
from services.policy.ranks.group import form_world, leave_world, store_at
from shared.config import Recipe
from shared.models import load_model, load_skeleton, stored
from shared.weights.slices import Parallel


class Counted:
    """A slice of a file that counts what is read of it."""

    read = 0

    def __init__(self, slice_: Any) -> None:
        self._slice, self.get_shape = slice_, slice_.get_shape

    def __getitem__(self, place: Any) -> torch.Tensor:
        found = self._slice[place]
        Counted.read += found.nbytes
        return found


class CountedFile:
    """A safetensors file whose slices count."""

    def __init__(self, path: str, framework: str) -> None:
        self._file = SAFE_OPEN(path, framework)
        self.keys = self._file.keys

    def get_slice(self, name: str) -> Counted:
        return Counted(self._file.get_slice(name))


SAFE_OPEN = stored.safe_open
stored.safe_open = CountedFile


def resident(field: str) -> int:
    """Bytes of this process: "RssAnon" is memory of its own, without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def rank(number: int, recipe: Recipe, folder: Path) -> None:
    world = recipe.policy.parallel.ranks
    form_world(number, world, store_at(str(folder / "store"), world), interface="lo", timeout_s=60.0)
    grid = Grid.form(Parallel.of(recipe.policy.parallel), number, 60.0)
    before = resident("RssAnon")
    layout = load_layout(recipe, grid, weights=True)
    took = resident("RssAnon") - before
    whole = load_model(recipe.model, 0, weights=True)
    mine, theirs = layout.weights(), dict(whole.named_parameters())
    told = {
        "read": Counted.read,
        "holds": sum(part.nbytes for part in mine.values()),
        "whole": sum(part.nbytes for part in theirs.values()),
        "took": took,
        "names": list(mine),
        "differ": [n for n, p in mine.items() if p.numel() and not torch.equal(p, layout.cut(n, theirs[n].detach()))],
        "buffers": all(
            torch.equal(buffer, dict(whole.named_buffers())[name]) for name, buffer in layout.model.named_buffers()
        ),
    }
    (folder / f"{number}.json").write_text(json.dumps(told))
    leave_world()


def main() -> None:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(json.load(sys.stdin))
    load_skeleton(recipe.model)  # transformers loads its code here
    children = []
    for number in range(recipe.policy.parallel.ranks):
        child = os.fork()
        if child == 0:
            rank(number, recipe, Path(sys.argv[1]))
            os._exit(0)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


main()
