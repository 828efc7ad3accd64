"""One policy process, from its arguments to its exit code: signals, the bus, the other ranks of the replica."""

from __future__ import annotations

from contextlib import ExitStack

from services.policy.device import choose_device
from services.policy.layouts.grid import Grid
from services.policy.learner import prepare_torch
from services.policy.ranks.crew import Crew
from services.policy.ranks.nodes import Nodes
from services.policy.ranks.orders import RanksError
from services.policy.service import PolicyService
from shared.bus import BusClient, Fenced, Refusal
from shared.config import Recipe
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset
from shared.nccl.device import own_device
from shared.service import EXIT_DONE, EXIT_FENCED, EXIT_RESTART, ServiceArguments
from shared.signals import Signals, Stopped
from shared.telemetry import get_logger
from shared.weights.slices import Parallel


def main(arguments: ServiceArguments) -> int:
    """Run one policy process until its exit code is known; see shared.service for what the codes mean."""
    log = get_logger()
    signals = Signals()
    try:
        return _serve(arguments, signals)
    except Fenced as error:
        log.warning("fenced: a newer process has this replica's name", why=str(error))
        return EXIT_FENCED
    except Refusal as error:
        log.error("the controller does not want this replica", why=str(error))
        return EXIT_RESTART
    except RanksError as error:
        log.error("the ranks of this replica did not come together", why=str(error))
        return EXIT_RESTART
    except Stopped:
        log.info("stopped by a signal")
        return EXIT_DONE


def _serve(arguments: ServiceArguments, signals: Signals) -> int:
    recipe = arguments.recipe
    nodes = Nodes.parse(arguments.nodes, arguments.reach, recipe.policy.parallel.ranks)
    device = choose_device(recipe, nodes.here_too)
    prepare_torch(recipe, device)
    datasets, problem = _open_datasets(recipe)
    identities = [dataset.identity for dataset in datasets.values()]
    client = BusClient(
        arguments.controller,
        role="policy",
        replica=arguments.replica,
        world=recipe.policy.parallel.ranks,
        settings=recipe.bus,
        datasets=identities,
        device=own_device(),
    )
    goodbye: str | None = None
    try:
        client.start(recipe.timeouts.register_s)
        with ExitStack() as together:
            crew = grid = None
            if recipe.policy.parallel.ranks > 1 and problem is None:
                crew = together.enter_context(Crew(recipe, arguments.run_folder, client, nodes, device))
                crew.form_world()
                grid = Grid.form(Parallel.of(recipe.policy.parallel), 0, recipe.timeouts.step_s)
            service = signals.service = PolicyService(arguments, client, datasets, crew, grid, device)
            code = service.run() if problem is None else service.give_up(problem)
        if code != EXIT_FENCED:
            goodbye = f"this replica ends with code {code}"  # said last: all that was sent before it has arrived
        return code
    except Stopped:
        goodbye = "this replica was stopped by a signal"
        raise
    finally:
        signals.ignore()
        client.close(goodbye)


def _open_datasets(recipe: Recipe) -> tuple[dict[str, Dataset], DataError | None]:
    """The data set whose rows SFT leases name, or why it cannot be opened: the controller has to hear of that."""
    if recipe.sft is None:
        return {}, None
    name = recipe.sft.dataset
    try:
        return {name: open_dataset(name, recipe.data[name])}, None
    except DataError as error:
        return {}, error
