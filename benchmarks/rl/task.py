"""What all three ways share: the recipe's rows in its order, the reward, the judge of the outcome, the result.

Invariant: every way begins with the same weights, trains on the same prompts in the same order with the same batch,
samples and optimizer settings, and is judged on the same held-out problems, outside the time that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from shared.config import Recipe, load_recipe
from shared.config.schema import DataTable, ModelTable, TrainTable
from shared.data import open_dataset
from shared.data.answers import extract_answer
from shared.data.chat import encode_prompt
from shared.data.dataset import Dataset
from shared.data.order import permuted_row
from shared.engines.base import Request
from shared.engines.load import stop_tokens
from shared.engines.transformers import TransformersEngine
from shared.messages import Sampling
from shared.models import load_model, load_tokenizer

HELDOUT = "heldout"


class Outcome(msgspec.Struct, frozen=True):
    """One way, one round. `ends` are the clock times in seconds at which each batch's optimizer step was done."""

    way: str
    samples_per_batch: int
    ends: list[float]
    whole_s: float
    """From the start of the process to the end of the last batch."""
    tokens: int
    """Response tokens trained on."""
    rewards: list[float]
    """Mean reward of each batch."""
    accuracy: float
    correct: int
    problems: int

    def samples_per_s(self, warm: int) -> float:
        """Trained samples a second, the first `warm` batches left out."""
        return self.samples_per_batch * (len(self.ends) - warm) / (self.ends[-1] - self.ends[warm - 1])


class Task:
    """The RL part of the recipe at `path`, whose [model] names a folder."""

    def __init__(self, path: Path) -> None:
        self.recipe: Recipe = load_recipe(path)
        assert self.recipe.train is not None
        self.train: TrainTable = self.recipe.train
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.dataset: Dataset = open_dataset(self.train.dataset, self.recipe.data[self.train.dataset])

    def row(self, counter: int) -> int:
        """The row of the `counter`-th prompt, as the controller draws it."""
        return permuted_row(counter, len(self.dataset), self.recipe.run.seed)[1]

    def prompt(self, row: int) -> list[int]:
        """Token ids of a row's prompt."""
        return encode_prompt(self.tokenizer, self.dataset.row(row), 1 << 20)

    def reward(self, row: int, tokens: list[int]) -> float:
        """The verifier's score of a completion; the tokens may hold the stop token."""
        return self.dataset.score(row, extract_answer(str(self.tokenizer.decode(tokens))))


def judge(folder: Path, table: DataTable, problems: int, new_tokens: int) -> int:
    """How many of the first `problems` held-out rows the model in `folder` answers right, greedily."""
    model = ModelTable(path=str(folder))
    tokenizer = load_tokenizer(model)
    heldout = open_dataset(HELDOUT, table)
    loaded = load_model(model, 0, weights=True)
    stops = stop_tokens(tokenizer, loaded.generation_config)
    engine = TransformersEngine(loaded, slots=256, stops=stops, version=0)
    for row in range(problems):
        prompt = encode_prompt(tokenizer, heldout.row(row), engine.context - new_tokens)
        engine.submit(Request(row, prompt, 1, Sampling(0.0, 1.0, 0, new_tokens), 0))
    correct = 0
    while engine.stats().running or engine.stats().queued:
        for sample in engine.advance():
            text = str(tokenizer.decode(sample.tokens.tolist()))
            correct += heldout.score(sample.key, extract_answer(text)) >= 1.0
    return correct


def judged(outcome: dict[str, Any], folder: Path, recipe: Recipe, problems: int) -> Outcome:
    """The outcome of a way with the accuracy of the model that it left in `folder`."""
    correct = judge(folder, recipe.data[HELDOUT], problems, recipe.rollout.max_new_tokens)
    return msgspec.convert(
        {**outcome, "accuracy": correct / problems, "correct": correct, "problems": problems}, Outcome
    )


def process_began() -> float:
    """Wall clock time at which this process was started, in seconds."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def run_loop(train: Callable[[Task, int, Path], dict[str, Any]], description: str) -> None:
    """The command line of a loop in one process: train, save to `--out`, write `outcome.json` there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    outcome = train(Task(given.recipe), given.batches, given.out)
    (given.out / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
