"""A rollout replica without a model: answers every lease at once with the same frames, over the real bus client.

Started like the service (`--recipe`, `--run-folder`, `--controller`, `--replica`); ends when the run does.
"""

from __future__ import annotations

from benchmarks.load.work import DATASET, DIGEST, Work
from shared.bus import BusClient
from shared.messages import (
    FormMesh,
    Lease,
    LoadState,
    MeshFormed,
    ReceiveWeights,
    SendWeights,
    Shutdown,
    StateLoaded,
    WeightsLoaded,
    WeightsSent,
)
from shared.service import EXIT_DONE, ServiceArguments, run_service

PATIENCE_S = 60.0
"""Longest silence of the controller before this process gives up."""


def main(arguments: ServiceArguments) -> int:
    """Answer until Shutdown."""
    recipe, work = arguments.recipe, Work()
    bus = BusClient(
        arguments.controller, role="rollout", replica=arguments.replica, settings=recipe.bus, datasets=[DATASET]
    )
    bus.start(recipe.timeouts.register_s)
    while (delivery := bus.receive(PATIENCE_S)) is not None:
        match delivery.message:
            case LoadState(position=position):
                bus.send(StateLoaded(position))
            case FormMesh(identity=identity):
                bus.send(MeshFormed(identity.epoch))
            case ReceiveWeights(epoch=epoch, position=position):
                bus.send(WeightsLoaded(epoch, position, DIGEST, 0.0))
            case SendWeights(epoch=epoch, position=position):
                bus.send(WeightsSent(epoch, position, DIGEST, 0, 0.0))
            case Lease(grants=grants):
                for grant in grants:
                    bus.send(work.report(grant), work.payload)
            case Shutdown(cause=cause):
                bus.close(goodbye=cause)
                return EXIT_DONE
    return 1


if __name__ == "__main__":
    run_service("rollout", main)
