"""One process with an engine, from its arguments to its exit code: what rollouts and evaluators have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch.utils import deterministic

from shared.bus import BusClient, Fenced, Refusal
from shared.config import Recipe
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset
from shared.nccl.device import own_device
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, EXIT_RESTART, ServiceArguments
from shared.serving.service import EngineService
from shared.signals import Signals, Stopped
from shared.telemetry import get_logger

MakeService = Callable[[BusClient], EngineService]
Workers = Callable[[dict[str, Dataset]], AbstractContextManager[MakeService]]
"""Opens what judges the answers; within the context the service can be made, at its end the workers are closed."""


def run_replica(
    arguments: ServiceArguments,
    role: Literal["rollout", "evaluator"],
    threads: int,
    names: Iterable[str],
    workers: Workers,
) -> int:
    """Run one process until its exit code is known; see shared.service for what the codes mean.

    `names` are the data sets that leases to this role may name, `threads` those of torch.
    """
    recipe = arguments.recipe
    signals = Signals()
    _prepare_torch(recipe, threads)
    problem: DataError | None = None
    datasets: dict[str, Dataset] = {}
    try:
        datasets = open_datasets(recipe, names)
    except DataError as error:
        problem = error
    client = BusClient(
        arguments.controller,
        role=role,
        replica=arguments.replica,
        world=recipe.rollout.world_of(arguments.replica),
        settings=recipe.bus,
        datasets=[dataset.identity for dataset in datasets.values()],
        device=own_device(),
    )
    goodbye: str | None = None
    with workers(datasets) as make:
        try:
            client.start(recipe.timeouts.register_s)
            service = signals.service = make(client)
            code = service.run() if problem is None else service.give_up(problem)
            if code == EXIT_DONE:
                goodbye = "this replica leaves: it was stopped, drained, or the run is over"
            elif code in (EXIT_FATAL, EXIT_RESTART):
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


def open_datasets(recipe: Recipe, names: Iterable[str]) -> dict[str, Dataset]:
    """The data sets of these names, each once. DataError if one cannot be read, or lacks a suite's category column."""
    opened = {name: open_dataset(name, recipe.data[name]) for name in dict.fromkeys(names)}
    evaluation = recipe.evaluation
    for name, suite in evaluation.suites.items() if evaluation is not None else ():
        dataset = opened.get(evaluation.dataset(name)) if evaluation is not None else None
        if dataset is not None and suite.category is not None:
            dataset.category(0, suite.category)  # a wrong column name would spoil every row: say so at the start
    return opened


def _prepare_torch(recipe: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    if recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)
        # every buffer is written before it is read; filling new memory would cost a tenth of the speed
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
