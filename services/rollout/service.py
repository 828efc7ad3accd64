"""The rollout service: leased prompts in, samples and their rewards out.

The loop is `shared.serving.service`; a rollout has its groups judged in reward workers and reports them with their
arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.rollout.judging import Judging
from services.rollout.reporting import group_report
from services.rollout.rewards_pool import RewardsPool, RewardsPoolError
from shared.bus import BusClient
from shared.config import Recipe
from shared.data.dataset import Dataset
from shared.engines.load import load_engine
from shared.serving.service import EngineService, LoadEngine


class RolloutService(EngineService):
    """One rollout replica of one rank. `datasets` are those that leases may name, `pool` judges what is generated."""

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        replica: str,
        client: BusClient,
        datasets: Mapping[str, Dataset],
        pool: RewardsPool,
        *,
        load: LoadEngine = load_engine,
    ) -> None:
        judging = Judging(pool, recipe.rewards.failure_limit)
        super().__init__(
            recipe, run_folder, replica, client, datasets, judging, group_report, load=load, fatal=(RewardsPoolError,)
        )
