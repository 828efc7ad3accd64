"""One evaluator process of a run, from its arguments to its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from services.evaluator.report import eval_report
from services.evaluator.verifying import Verifying
from shared.data.dataset import Dataset
from shared.engines.load import load_engine
from shared.service import ServiceArguments
from shared.serving.process import MakeService, run_replica
from shared.serving.service import EngineService


def main(arguments: ServiceArguments) -> int:
    """Run one evaluator process until its exit code is known; see shared.service for what the codes mean."""
    recipe = arguments.recipe
    names = recipe.evaluation.datasets if recipe.evaluation is not None else []

    @contextmanager
    def workers(datasets: dict[str, Dataset]) -> Iterator[MakeService]:
        judge = Verifying(datasets, recipe.rewards.timeout_s)
        load = partial(load_engine, role="evaluator")
        try:
            yield lambda client: EngineService(
                recipe, arguments.run_folder, arguments.replica, client, datasets, judge, eval_report, load=load
            )
        finally:
            judge.close()

    return run_replica(arguments, "evaluator", recipe.evaluator.threads, names, workers)
