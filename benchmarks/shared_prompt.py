"""A GRPO training step with each prompt computed once a row, beside one row for each sample.

`python -m benchmarks.shared_prompt`, or `make bench-shared-prompt`.
The recipe's model, batch and prompts; as responses its worked answers, which are what the model has learnt to write.
Both ways run the policy's own trainer on the same step in turns, forward, backward and clipping, without the optimizer;
separate rows come from the same code, told to put one response in a row. Writes `results/shared_prompt.{json,md}`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import torch

from benchmarks.machine import RESULTS, describe_machine, load_average, write_results
from services.policy import trainer as trainer_module
from services.policy.batch import Row, TrainSequence, rows_of, sequences_of
from services.policy.layouts.compose import layout_of
from services.policy.trainer import Trainer
from shared.arrays import Frame, pack
from shared.config import Recipe, live_values, load_recipe
from shared.data import open_dataset
from shared.data.chat import encode_prompt, encode_response
from shared.mesh import Mesh
from shared.messages import AssignedGroup, GradientsReady, Position, TrainStep
from shared.models import load_model, load_tokenizer


def separate_rows(sequences: list[TrainSequence], limit: int, width: int) -> list[Row]:
    """Every sample with a prompt of its own, longest first: in the place of `rows_of`."""
    return sorted((Row((s,)) for s in sequences if len(s.tokens)), key=lambda row: -row.length)


def make_step(recipe: Recipe, seed: int) -> tuple[TrainStep, list[Frame]]:
    """One batch of the recipe's RL stage. Responses are worked answers of rows drawn at random; half are right."""
    train = recipe.train
    assert train is not None
    tokenizer = load_tokenizer(recipe.model)
    dataset = open_dataset(train.dataset, recipe.data[train.dataset])
    draw = np.random.default_rng(seed)
    groups, payload, tokens = [], [], 0
    for number in range(train.batch_size):
        prompt = encode_prompt(tokenizer, dataset.row(int(draw.integers(len(dataset)))), 1 << 20)
        rows = draw.integers(len(dataset), size=train.samples)
        responses = [encode_response(tokenizer, dataset.row(int(row))) for row in rows]
        lengths = [len(response) for response in responses]
        headers, frames = pack(
            {
                "prompt": np.array(prompt, dtype=np.int32),
                "tokens": np.concatenate(responses).astype(np.int32),
                "logprobs": np.full(sum(lengths), -6.0, dtype=np.float32),
                "versions": np.zeros(sum(lengths), dtype=np.int32),
            }
        )
        advantages = [1.0 if sample % 2 else -1.0 for sample in range(train.samples)]
        groups.append(AssignedGroup(number, 1, "train", len(prompt), lengths, advantages, 1.0, headers))
        payload += frames
        tokens += sum(lengths)
    step = TrainStep(
        step=0, attempt=1, stage="train", position=Position(0, 0, 0), index=0, steps_in_batch=1, members=[], mesh=None,
        groups=groups, tokens=tokens, sequences=train.batch_size * train.samples, revision=0,
        hyperparameters=live_values(recipe),
    )  # fmt: skip
    return step, payload


def tokens_of(recipe: Recipe, step: TrainStep, frames: list[Frame], width: int, *, shared: bool) -> int:
    """Tokens that go through the model."""
    rows = (rows_of if shared else separate_rows)(sequences_of(step, frames), recipe.policy.micro_batch_tokens, width)
    return sum(row.length for row in rows)


def timed(trainer: Trainer, step: TrainStep, frames: list[Frame]) -> tuple[float, dict[str, float]]:
    """Seconds of one gradient computation, and its metrics."""
    started = time.perf_counter()
    vote = trainer.compute(step, frames)
    seconds = time.perf_counter() - started
    assert isinstance(vote, GradientsReady)
    return seconds, vote.metrics


@contextmanager
def no_mesh(epoch: int) -> Iterator[Mesh]:
    """What a trainer alone is given for meshes."""
    raise RuntimeError(f"expected a step of one member, got one of mesh epoch {epoch}")
    yield


def one_way(shared: bool) -> AbstractContextManager[Any]:
    """The trainer as it is, or with separate rows."""
    return patch.object(trainer_module, "rows_of", rows_of if shared else separate_rows)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns; the result for JSON."""
    recipe = load_recipe(given.recipe)
    torch.set_num_threads(recipe.policy.threads)
    model = load_model(recipe.model, recipe.run.seed, weights=True)
    trainer = Trainer(layout_of(model, recipe), recipe, Position(0, 0, 0), no_mesh)
    step, frames = make_step(recipe, given.seed)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    norms: dict[bool, float] = {}
    for attempt in range(given.rounds + 1):
        for shared in (True, False):
            again = msgspec.structs.replace(step, attempt=2 * attempt + shared + 1)
            with one_way(shared):
                took, metrics = timed(trainer, again, frames)
            norms[shared] = metrics["grad_norm"]
            if attempt:  # the first of each warms up
                seconds[shared].append(took)
    ratios = [alone / together for together, alone in zip(seconds[True], seconds[False], strict=True)]
    lengths = [length for group in step.groups for length in group.lengths]
    width = int(model.config.get_text_config().hidden_size)
    return {
        "machine": describe_machine(),
        "load_average": load_average(),
        "recipe": str(given.recipe),
        "batch": f"{len(step.groups)} x {len(step.groups[0].lengths)}",
        "threads": recipe.policy.threads,
        "micro_batch_tokens": recipe.policy.micro_batch_tokens,
        "rounds": given.rounds,
        "prompt_tokens": statistics.mean(group.prompt_length for group in step.groups),
        "response_tokens": statistics.mean(lengths),
        "ratio": round(statistics.median(ratios), 3),
        "quarters": [round(ratio, 3) for ratio in statistics.quantiles(ratios, n=4)],
        "shared": _of_way(seconds[True], tokens_of(recipe, step, frames, width, shared=True), norms[True]),
        "separate": _of_way(seconds[False], tokens_of(recipe, step, frames, width, shared=False), norms[False]),
    }


def _of_way(seconds: list[float], tokens: int, norm: float) -> dict[str, Any]:
    return {"seconds": round(statistics.median(seconds), 4), "tokens": tokens, "grad_norm": norm}


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with what was compared."""
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}.",
        "",
        f"Gradients of one RL step of `{result['recipe']}`: {result['batch']} samples, prompts of "
        f"{result['prompt_tokens']:.0f} and responses of {result['response_tokens']:.1f} tokens, "
        f"{result['threads']} thread, micro-batches of at most {result['micro_batch_tokens']} tokens; medians of "
        f"{result['rounds']} rounds in turns.",
        "",
        "| | s a step | tokens | gradient norm |",
        "|---|---|---|---|",
    ]
    for name, key in (("one prompt a row, its responses behind it", "shared"), ("one row a sample", "separate")):
        way = result[key]
        lines.append(f"| {name} | {way['seconds']:.3f} | {way['tokens']} | {way['grad_norm']:.6f} |")
    low, _, high = result["quarters"]
    return "\n".join([*lines, "", f"Ratio: **{result['ratio']:.2f}** (middle half: {low:.2f} to {high:.2f})."]) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    result = measure(given)
    write_results(RESULTS, "shared_prompt", result, as_markdown(result))


if __name__ == "__main__":
    main()
