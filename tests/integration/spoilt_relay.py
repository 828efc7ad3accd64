"""A rollout whose copy for others has a flipped bit, for test_fanout.py: it samples with the true weights, tells their
digest, and passes on something else."""

from __future__ import annotations

from dataclasses import replace

from shared.messages import Position
from shared.service import ServiceArguments, run_service


def main(arguments: ServiceArguments) -> int:
    """As the rollout service."""
    from services.rollout.process import main as run
    from shared.weights import StagedWeights
    from shared.weights.publisher import Publisher

    offer = Publisher.offer

    def spoil(self: Publisher, position: Position, staged: StagedWeights) -> None:
        memory = staged.area.memory.clone()
        memory[memory.numel() // 2] ^= 1 << 6
        offer(self, position, replace(staged, area=replace(staged.area, memory=memory)))

    Publisher.offer = spoil  # type: ignore[method-assign]
    return run(arguments)


if __name__ == "__main__":
    run_service("rollout", main)
