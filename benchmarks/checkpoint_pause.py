"""How long training waits for a checkpoint: written in its way, as it used to be, and beside it.

`python -m benchmarks.checkpoint_pause`, or `make bench-checkpoint-pause`.
One policy of one rank trains; by turns its state is written by the thread that trains, and by the policy's own `Saver`,
with steps going on until the files are durable. Writes `results/checkpoint_pause.{json,md}`.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.machine import RESULTS, describe_machine, load_average, write_results
from benchmarks.shared_prompt import make_step, no_mesh
from services.policy import checkpoint
from services.policy.copies import Copies
from services.policy.layouts.grid import Grid
from services.policy.learner import Learner
from services.policy.saving import Saver
from services.policy.state import head_of, tensors_of
from shared.config import load_recipe
from shared.messages import CheckpointSaved, CommitStep, LoadState, Position, SaveCheckpoint

FOLDER = "checkpoints"


class Training:
    """A policy's trainer and saver without a controller; each step is the same one at the next position."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        sizes = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden, "layers": given.layers}
        sets = [f"model.build.{name}={size}" for name, size in sizes.items()]
        self.recipe = load_recipe(given.recipe, [*sets, "train.batch_size=4", "train.samples=4"])
        self.folder = folder
        torch.set_num_threads(self.recipe.policy.threads)
        learner = Learner(self.recipe, folder, no_mesh, Grid.alone())
        learner.load(LoadState("initial", Position(0, 0, 0), ""))
        self.trainer = learner.loaded()
        self.answers: queue.Queue[Any] = queue.Queue()
        copies = Copies(learner, lambda order: nullcontext([]))
        self.saver = Saver(self.recipe, folder, self.answers.put, copies.take)
        self._step, self._frames = make_step(self.recipe, 1)

    def step(self) -> float:
        """Seconds of one step, optimizer included."""
        here, started = self.trainer.position, time.perf_counter()
        step = msgspec.structs.replace(self._step, step=here.step, position=here)
        self.trainer.compute(step, self._frames)
        self.trainer.apply(CommitStep(step.step, step.attempt, here.lineage))
        return time.perf_counter() - started

    def save_in_the_way(self) -> float:
        """Seconds until training may go on."""
        started = time.perf_counter()
        whole = tensors_of(self.trainer)
        checkpoint.save(head_of(self.trainer), whole, self.folder / FOLDER, self.folder.name, "bench", 2)
        return time.perf_counter() - started

    def save_beside(self) -> tuple[float, float, list[float]]:
        """Seconds until training may go on, and until the checkpoint is durable; those of the steps meanwhile."""
        started = time.perf_counter()
        self.saver.save(SaveCheckpoint(self.trainer.position, FOLDER, False), self.trainer, None)
        pause = time.perf_counter() - started
        steps = []
        while self.answers.empty():
            steps.append(self.step())
        answer = self.answers.get()
        assert isinstance(answer, CheckpointSaved), answer
        return pause, time.perf_counter() - started, steps

    @property
    def state_bytes(self) -> int:
        """Bytes of what a checkpoint holds."""
        return sum(tensor.nbytes for tensor in tensors_of(self.trainer).values())


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns; the result for JSON."""
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        training = Training(given, Path(folder))
        ways: dict[str, list[float]] = {name: [] for name in ("in_the_way", "beside", "durable", "alone", "meanwhile")}
        for attempt in range(given.rounds + 1):
            alone = [training.step() for _ in range(given.steps)]
            blocked = training.save_in_the_way()
            training.step()  # another position
            pause, durable, meanwhile = training.save_beside()
            if attempt:  # the first round warms up, and writes the reference
                ways["alone"] += alone
                ways["in_the_way"].append(blocked)
                ways["beside"].append(pause)
                ways["durable"].append(durable)
                ways["meanwhile"] += meanwhile
        size = training.state_bytes
    ratios = [blocked / pause for blocked, pause in zip(ways["in_the_way"], ways["beside"], strict=True)]
    return {
        "machine": describe_machine(),
        "load_average": load_average(),
        "threads": training.recipe.policy.threads,
        "rounds": given.rounds,
        "state_bytes": size,
        "steps_meanwhile": len(ways["meanwhile"]),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "seconds": {name: round(statistics.median(seconds), 4) for name, seconds in ways.items()},
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with what was compared."""
    seconds = result["seconds"]
    rounds = ", ".join(f"{ratio:.1f}" for ratio in result["ratios"])
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}.",
        "",
        f"A state of {result['state_bytes'] / 1e6:.0f} MB (weights, moments, reference) of a policy of one rank, "
        f"{result['threads']} thread; medians of {result['rounds']} rounds in turns.",
        "",
        "| | s |",
        "|---|---|",
        f"| training waits, written in its way | {seconds['in_the_way']:.3f} |",
        f"| training waits, written beside it | {seconds['beside']:.3f} |",
        f"| from the order until it is durable, beside training | {seconds['durable']:.3f} |",
        f"| a step with nothing beside it | {seconds['alone']:.3f} |",
        f"| a step while a checkpoint is written | {seconds['meanwhile']:.3f} |",
        "",
        f"Ratio of the pauses: **{result['ratio']:.1f}** (rounds: {rounds}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where checkpoints are written meanwhile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps with nothing beside them, each round")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    write_results(RESULTS, "checkpoint_pause", result := measure(given), as_markdown(result))


if __name__ == "__main__":
    main()
