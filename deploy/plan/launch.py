"""The launch plan: which processes a recipe wants, what each needs, and the command that starts it.

    recipe -> LaunchPlan -> deploy/local, deploy/slurm, ...: where, and by what, each is started

A pure function of the recipe: no file is read, no machine is looked at. What differs from one launcher to the next is
a `Place` (paths and addresses as the process will see them) and the Python of an environment; the rest is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from services.controller.core.scaling import Scaling
from shared.config import Recipe

CONTROLLER = "controller"
Environment = Literal["controller", "transformers", "vllm", "sglang"]
"""What a process imports, hence which Python or image runs it: nothing of torch, the trainer's own, an engine's."""


@dataclass(frozen=True)
class Place:
    """A run as its processes see it. Replicas connect to `controller`: an address, or the file that tells it."""

    recipe: str = "RUN/config.toml"
    run_folder: str = "RUN"
    bind: str = "ADDRESS"
    controller: str = "ADDRESS"


@dataclass(frozen=True)
class Process:
    """A controller, or rank 0 of a replica, which starts the replica's further ranks itself.

    `ranks` are all that the controller gets to know; `holders` hold a part of the model, and compute on a GPU each if
    there is one for them. `gpus` and `cpus` are what has to be there for all of them together, and on `nodes` each has
    the same share of them.
    """

    name: str
    role: str
    environment: Environment
    ranks: int
    gpus: int
    cpus: int
    variables: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1
    holders: int = 0

    def arguments(self, place: Place) -> tuple[str, ...]:
        """What follows the Python of this process's environment."""
        where = ("--bind", place.bind) if self.role == CONTROLLER else ("--controller", place.controller)
        run = ("--recipe", place.recipe, "--run-folder", place.run_folder)
        return ("-m", f"services.{self.role}", *run, *where, "--replica", self.name)


@dataclass(frozen=True)
class LaunchPlan:
    """`replicas` are those that the recipe begins with; a run that is scaled asks for others by name."""

    recipe: Recipe
    controller: Process
    replicas: tuple[Process, ...]

    def replica(self, name: str) -> Process:
        """The plan of a replica, given its name: ROLE-NUMBER."""
        return _replica(self.recipe, name)

    def gpus_of(self, name: str) -> range:
        """The places of a replica's GPUs among all of a machine: each that the recipe begins with has its own.

        A replica that a scaled run adds takes those after the recipe's, counted within its role.
        """
        first = 0
        for process in self.replicas:
            if process.name == name:
                return range(first, first + process.holders)
            first += process.holders
        added = self.replica(name)
        number = int(name.rpartition("-")[2])
        first += max(0, number - sum(process.role == added.role for process in self.replicas)) * added.holders
        return range(first, first + added.holders)

    @property
    def processes(self) -> tuple[Process, ...]:
        """All that the recipe begins with."""
        return (self.controller, *self.replicas)

    def as_json(self) -> list[dict[str, Any]]:
        """The processes with their commands, for other programs."""
        return [
            {
                "name": process.name,
                "role": process.role,
                "environment": process.environment,
                "nodes": process.nodes,
                "ranks": process.ranks,
                "gpus": process.gpus,
                "cpus": process.cpus,
                "variables": dict(process.variables),
                "command": ["python", *process.arguments(Place())],
            }
            for process in self.processes
        ]


def launch_plan(recipe: Recipe) -> LaunchPlan:
    """The plan of a recipe."""
    controller = Process(CONTROLLER, CONTROLLER, "controller", 1, 0, 1, _variables(1))
    return LaunchPlan(recipe, controller, tuple(_replica(recipe, name) for name in Scaling.of(recipe).wanted))


def _replica(recipe: Recipe, name: str) -> Process:
    role = name.rpartition("-")[0]
    if role == "policy":
        threads, holders, ranks = recipe.policy.threads, recipe.policy.parallel.ranks, recipe.policy.parallel.ranks
        environment: Environment = "transformers"
        helpers = 0
    else:
        environment = recipe.rollout.engine_of(name)
        threads = recipe.evaluator.threads if role == "evaluator" else recipe.rollout.threads
        holders = 1 if environment == "transformers" else recipe.rollout.parallel.ranks
        ranks = recipe.rollout.world_of(name)
        helpers = recipe.rewards.workers
    gpus = holders if on_gpus(recipe) else 0
    nodes = recipe.policy.nodes if role == "policy" else 1
    cpus = holders * threads + helpers
    return Process(name, role, environment, ranks, gpus, cpus, _variables(threads), nodes, holders)


def on_gpus(recipe: Recipe) -> bool:
    """Whether there have to be GPUs, one for each rank that holds a part of the model.

    So it is where weights travel by NCCL, which wants them. With other backends ranks take what they find.
    """
    return str(recipe.weights.backend) == "nccl"


def _variables(threads: int) -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
