"""One recorded optimizer step again, alone, from the run folder: for finding out what a step really did.

    python -m services.policy --replay runs/latest --step 12 [--lineage 0]

Reads journal, spool, checkpoints and metrics.jsonl; writes nothing, needs no controller. Starts from the newest
complete checkpoint at or before the step (else from the recipe's first weights), applies the recorded steps up to it,
and prints what the step gives beside what the run recorded. Payloads of settled steps are gone from the spool: only
later steps can be repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from services.policy import checkpoint
from services.policy.batch import BatchError, Frame
from services.policy.checkpoint import CheckpointError
from services.policy.layouts.compose import load_layout
from services.policy.speed import of_the_machine
from services.policy.trainer import Trainer, TrainerError
from shared.config import Recipe, RecipeError, load_recipe
from shared.mesh import Mesh
from shared.messages import CommitStep, GradientsReady, Position, TrainStep
from shared.models import ModelError
from shared.records import JournalDamaged, SpoolDamaged, read_journal, read_spooled
from shared.service import EXIT_DONE, EXIT_RECIPE
from shared.telemetry import log_to_stderr

METRICS = "metrics.jsonl"
LIKE = 1e-5  # relative difference above which a metric is marked


class ReplayError(Exception):
    """A step that cannot be repeated; the text says why and what can."""


@dataclass(frozen=True)
class Recorded:
    """One attempt at a step as the journal keeps it, all members' shares together; `payload` locates the frames."""

    message: TrainStep
    payload: list[dict[str, Any]]
    committed: bool


def main(argv: Sequence[str]) -> int:
    """The command line; prints the comparison and returns the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m services.policy", description="Repeat one recorded step, alone.")
    parser.add_argument("--replay", type=Path, required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--step", type=int, required=True, help="number of the step, as in metrics.jsonl")
    parser.add_argument("--lineage", type=int, help="lineage of the step (default: the last that has it)")
    given = parser.parse_args(argv)
    log_to_stderr()
    try:
        return replay(given.replay, given.step, given.lineage)
    except (ReplayError, RecipeError, CheckpointError, ModelError, TrainerError, BatchError, JournalDamaged) as error:
        print(error, file=sys.stderr)
        return EXIT_RECIPE


def replay(folder: Path, number: int, lineage: int | None) -> int:
    """Repeat step `number` of the run in `folder` and print it; raises ReplayError when its records are not there."""
    recipe = load_recipe(folder / "config.toml")
    torch.set_num_threads(recipe.policy.threads)
    torch.use_deterministic_algorithms(recipe.run.deterministic)
    history = recorded_steps(folder)
    lineages = sorted({line for line, step in history if step == number})
    if not lineages or (lineage is not None and lineage not in lineages):
        raise ReplayError(f"no step {number} in the journal of {folder} (lineages with it: {lineages or 'none'})")
    wanted = history[lineages[-1] if lineage is None else lineage, number]
    trainer, source = _start(folder, recipe, wanted.message.position)
    print(f"from {source} at step {trainer.position.step}")
    while trainer.position.step < wanted.message.position.step:
        recorded = _at(history, wanted.message.position.lineage, trainer.position)
        _compute(trainer, folder, recorded)
        trainer.apply(CommitStep(recorded.message.step, recorded.message.attempt, recorded.message.position.lineage))
    vote = _compute(trainer, folder, wanted)
    _print(wanted, vote, recorded_metrics(folder, wanted.message) if wanted.committed else {})
    return EXIT_DONE


def recorded_steps(folder: Path) -> dict[tuple[int, int], Recorded]:
    """(lineage, step) -> the attempt that was committed, or else the last one (a step may have failed: look why)."""
    found: dict[tuple[int, int], Recorded] = {}
    for _, record in read_journal(folder):
        for fact in record["facts"]:
            if fact["type"] == "assigned":
                message = msgspec.convert(fact["message"], TrainStep)
                key = (message.position.lineage, message.step)
                known = found.get(key)
                if known is not None and known.message.attempt == message.attempt:
                    groups = [*known.message.groups, *message.groups]
                    message = msgspec.structs.replace(known.message, groups=groups)
                    found[key] = Recorded(message, [*known.payload, *fact["payload"]], False)
                else:
                    found[key] = Recorded(message, fact["payload"], False)
            elif fact["type"] == "committed":
                key = (fact["lineage"], fact["step"])
                found[key] = Recorded(found[key].message, found[key].payload, True)
    return found


def recorded_metrics(folder: Path, step: TrainStep) -> dict[str, Any]:
    """What metrics.jsonl tells of the step, {} if nothing."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            metrics: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut off by a kill
        if (metrics.get("lineage"), metrics.get("step")) == (step.position.lineage, step.step):
            return metrics
    return {}


def _start(folder: Path, recipe: Recipe, wanted: Position) -> tuple[Trainer, str]:
    """A trainer at the newest state from which the step can be reached."""
    found = checkpoint.newest(folder / "checkpoints", at_most=wanted)
    torch.manual_seed(recipe.run.seed)
    layout = load_layout(recipe, weights=found is None)
    if found is None:
        return Trainer(layout, recipe, Position(wanted.lineage, 0, 0), _no_mesh), "the recipe's first weights"
    held = checkpoint.read_state(found).position
    trainer = Trainer(layout, recipe, Position(wanted.lineage, held.version, held.step), _no_mesh)
    checkpoint.load(trainer, found, trainer.position)
    return trainer, str(found)


def _at(history: dict[tuple[int, int], Recorded], lineage: int, position: Position) -> Recorded:
    """The recorded step that starts where the trainer stands."""
    for (line, _), recorded in history.items():
        if line == lineage and recorded.committed and recorded.message.position.step == position.step:
            return recorded
    raise ReplayError(f"no step of lineage {lineage} that starts after {position.step} steps is in the journal")


def _compute(trainer: Trainer, folder: Path, recorded: Recorded) -> GradientsReady:
    message = recorded.message
    frames: list[Frame] = []
    try:
        for location in recorded.payload:
            frames += read_spooled(folder, location)
    except (OSError, SpoolDamaged) as error:
        raise ReplayError(
            f"the payload of step {message.step} cannot be read: {error}; choose a step after the newest checkpoint"
        ) from error
    # all members' shares are here: there is nothing to reduce over a mesh
    vote = trainer.compute(msgspec.structs.replace(message, mesh=None), frames)
    if not isinstance(vote, GradientsReady):
        raise ReplayError(f"step {message.step} was applied already")
    return vote


@contextmanager
def _no_mesh(epoch: int) -> Iterator[Mesh]:
    raise ReplayError(f"a replay has one member and no mesh of epoch {epoch}")
    yield


def _print(replayed: Recorded, vote: GradientsReady, recorded: dict[str, Any]) -> None:
    step = replayed.message
    print(
        f"step {step.step} attempt {step.attempt} of lineage {step.position.lineage}, stage {step.stage}: "
        f"{len(step.groups)} groups, {step.sequences} sequences, {step.tokens} tokens; "
        f"{'committed' if replayed.committed else 'never committed'}"
    )
    print(f"{'metric':<24}{'replayed':>16}{'recorded':>16}")
    for name in sorted(vote.metrics):
        now, then = vote.metrics[name], recorded.get(name)
        mark = ""
        if isinstance(then, int | float) and not of_the_machine(name):
            mark = "" if abs(now - then) <= LIKE * max(abs(now), abs(then)) else "  differs"
        shown = f"{then:>16.8g}" if isinstance(then, int | float) else f"{'-':>16}"
        print(f"{name:<24}{now:>16.8g}{shown}{mark}")
