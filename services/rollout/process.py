"""One rollout process of a run, from its arguments to its exit code."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from torch.utils import deterministic

from services.rollout.rewards_pool import RewardsPool
from services.rollout.service import RolloutService
from shared.bus import BusClient, Fenced, Refusal
from shared.config import Recipe
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, ServiceArguments
from shared.telemetry import get_logger

EXIT_RESTART = 1


class Stopped(BaseException):
    """SIGTERM or SIGINT came before the service was up."""


class _Signals:
    """SIGTERM and SIGINT: ask the service to leave, or interrupt its making."""

    def __init__(self) -> None:
        self.service: RolloutService | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.service is None:
            raise Stopped
        self.service.stop()

    def ignore(self) -> None:
        """A second signal must not tear the goodbye, nor the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def main(arguments: ServiceArguments) -> int:
    """Run one rollout process until its exit code is known; see shared.service for what the codes mean."""
    recipe = arguments.recipe
    signals = _Signals()
    _prepare_torch(recipe)
    problem: DataError | None = None
    datasets: dict[str, Dataset] = {}
    try:
        datasets = open_datasets(recipe)
    except DataError as error:
        problem = error
    client = BusClient(
        arguments.controller,
        role="rollout",
        replica=arguments.replica,
        settings=recipe.bus,
        datasets=[dataset.identity for dataset in datasets.values()],
    )
    pool = RewardsPool(
        {name: recipe.data[name] for name in datasets},
        workers=recipe.rewards.workers,
        timeout_s=recipe.rewards.timeout_s,
        memory_mb=recipe.rewards.memory_mb,
        start_timeout_s=recipe.timeouts.load_s,
    )
    goodbye: str | None = None
    try:
        client.start(recipe.timeouts.register_s)
        service = RolloutService(recipe, arguments.run_folder, arguments.replica, client, datasets, pool)
        signals.service = service
        code = service.run() if problem is None else service.give_up(problem)
        if code == EXIT_DONE:
            goodbye = "this replica leaves: it was stopped, drained, or the run is over"
        elif code == EXIT_FATAL:
            goodbye = "this replica failed"  # closing with a goodbye waits until the reason has arrived
        return code
    except Fenced as error:
        get_logger().warning("fenced: a newer process has this replica's name", why=str(error))
        return EXIT_FENCED
    except Refusal as error:
        get_logger().error("the controller does not want this replica", why=str(error))
        return EXIT_RESTART
    except Stopped:
        goodbye = "this replica was stopped by a signal"
        return EXIT_DONE
    finally:
        signals.ignore()
        client.close(goodbye)
        pool.close()


def open_datasets(recipe: Recipe) -> dict[str, Dataset]:
    """The data sets that leases on prompts to generate may name, by name."""
    tables = (recipe.train, recipe.evaluation)
    names = [table.dataset for table in tables if table is not None]
    return {name: open_dataset(name, recipe.data[name]) for name in names}


def _prepare_torch(recipe: Recipe) -> None:
    torch.set_num_threads(recipe.rollout.threads)
    if recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)
        # every buffer is written before it is read; filling new memory would cost a tenth of the speed
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
