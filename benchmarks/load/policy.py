"""A policy replica without a model: votes, commits, saves and sends weights at once, over the real bus client.

Every applied step leaves a line in `commits.jsonl` of the run folder: the monotonic clock in seconds (one clock for all
processes of a machine) and how many groups the step held.
"""

from __future__ import annotations

import json
import time

from benchmarks.load.rollout import PATIENCE_S
from benchmarks.load.work import DATASET, DIGEST
from shared.bus import BusClient
from shared.messages import (
    CheckpointSaved,
    CommitStep,
    FormMesh,
    GradientsReady,
    LoadState,
    MeshFormed,
    Position,
    SaveCheckpoint,
    SendWeights,
    Shutdown,
    StateLoaded,
    StepApplied,
    TrainStep,
    WeightsSent,
)
from shared.service import EXIT_DONE, ServiceArguments, run_service

COMMITS = "commits.jsonl"


def main(arguments: ServiceArguments) -> int:
    """Answer until Shutdown."""
    recipe = arguments.recipe
    bus = BusClient(
        arguments.controller, role="policy", replica=arguments.replica, settings=recipe.bus, datasets=[DATASET]
    )
    bus.start(recipe.timeouts.register_s)
    held = Position(1, 0, 0)
    in_hand: TrainStep | None = None
    commits: list[tuple[float, int]] = []
    while (delivery := bus.receive(PATIENCE_S)) is not None:
        match delivery.message:
            case LoadState(position=position):
                held = position
                bus.send(StateLoaded(held))
            case TrainStep() as in_hand:
                bus.send(GradientsReady(in_hand.step, in_hand.attempt, in_hand.position.lineage, True, {}))
            case CommitStep(step=step, lineage=lineage) if in_hand is not None:
                last = in_hand.index + 1 == in_hand.steps_in_batch
                held = Position(lineage, held.version + last, step + 1)
                bus.hold(held)
                bus.send(StepApplied(step, held, {}))
                commits.append((time.monotonic(), len(in_hand.groups)))
            case FormMesh(identity=identity):
                bus.send(MeshFormed(identity.epoch))
            case SendWeights(epoch=epoch, position=position):
                bus.send(WeightsSent(epoch, position, DIGEST, 0, 0.0))
            case SaveCheckpoint(position=position):
                bus.send(CheckpointSaved(position, f"checkpoints/{position.version}", DIGEST))
            case Shutdown(cause=cause):
                (arguments.run_folder / COMMITS).write_text("".join(json.dumps(entry) + "\n" for entry in commits))
                bus.close(goodbye=cause)
                return EXIT_DONE
    return 1


if __name__ == "__main__":
    run_service("policy", main)
