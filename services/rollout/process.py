"""One rollout process of a run, from its arguments to its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.rollout.rewards_pool import RewardsPool
from services.rollout.service import RolloutService
from shared.config import Recipe
from shared.data.dataset import Dataset
from shared.service import ServiceArguments
from shared.serving.process import MakeService, run_replica


def main(arguments: ServiceArguments) -> int:
    """Run one rollout process until its exit code is known; see shared.service for what the codes mean."""
    recipe = arguments.recipe

    @contextmanager
    def workers(datasets: dict[str, Dataset]) -> Iterator[MakeService]:
        pool = RewardsPool(
            {name: recipe.data[name] for name in datasets},
            recipe.rewards.parts,
            workers=recipe.rewards.workers,
            timeout_s=recipe.rewards.timeout_s,
            memory_mb=recipe.rewards.memory_mb,
            start_timeout_s=recipe.timeouts.load_s,
        )
        try:
            yield lambda client: RolloutService(recipe, arguments.run_folder, arguments.replica, client, datasets, pool)
        finally:
            pool.close()

    return run_replica(arguments, "rollout", recipe.rollout.threads, dataset_names(recipe), workers)


def dataset_names(recipe: Recipe) -> list[str]:
    """The data sets that leases on prompts to generate may name."""
    trained = [recipe.train.dataset] if recipe.train is not None else []
    judged = recipe.evaluation.datasets if recipe.evaluation is not None and recipe.judge == "rollout" else []
    return [*trained, *judged]
