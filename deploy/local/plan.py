"""The launch plan on this machine: the Python of each process, an address on loopback, and who dies with whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.environments import SOURCE, python_for
from deploy.plan import CONTROLLER, LaunchPlan, Place, Process, launch_plan
from shared.config import Recipe, RecipeError
from shared.gpus import VISIBLE, names
from shared.service import PARENT_VARIABLE

__all__ = ["CONTROLLER", "ReplicaPlan", "RunPlan", "plan_run", "start_of"]


@dataclass(frozen=True)
class ReplicaPlan:
    """One process to keep alive. `environment` is added to the launcher's own."""

    replica: str
    role: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunPlan:
    """The controller, the address that the others reach it at, and how a replica is started, given its name."""

    address: str
    controller: ReplicaPlan
    replica: Callable[[str], ReplicaPlan]


def plan_run(recipe: Recipe, run_folder: Path) -> RunPlan:
    """The plan of a run whose resolved recipe lies in `run_folder/config.toml`.

    The controller's port is chosen here and fixed for this supervisor's life, so that a restarted controller is found
    again at the address that everybody has.
    """
    bind = _fixed_port(recipe.bus.bind)
    address = bind.replace("//0.0.0.0:", "//127.0.0.1:").replace("//*:", "//127.0.0.1:")
    place = Place(str(run_folder / "config.toml"), str(run_folder), bind, address)
    plan, gpus = launch_plan(recipe), names()

    def replica(name: str) -> ReplicaPlan:
        return start_of(plan.replica(name), place, own_gpus(plan, name, gpus))

    return RunPlan(address, start_of(plan.controller, place), replica)


def check_gpus(recipe: Recipe) -> None:
    """RecipeError for a recipe that has to have more GPUs than this machine."""
    plan = launch_plan(recipe)
    wanted = {process.name: process.gpus for process in plan.replicas if process.gpus}
    here = names() if wanted else []
    if sum(wanted.values()) > len(here):
        each = ", ".join(f"{count} for {name}" for name, count in wanted.items())
        raise RecipeError(
            f'expected {sum(wanted.values())} GPUs on this machine (weights.backend = "nccl": {each}), found '
            f'{len(here)}; set weights.backend = "auto", with which replicas share what is there, or ask for less'
        )


def own_gpus(plan: LaunchPlan, name: str, here: Sequence[str]) -> Mapping[str, str]:
    """The variable that leaves a replica its own of the machine's GPUs; where they do not go round, they are shared."""
    chosen = dict.fromkeys(here[place % len(here)] for place in plan.gpus_of(name)) if here else {}
    return {VISIBLE: ",".join(chosen)} if chosen else {}


def start_of(process: Process, place: Place, more: Mapping[str, str] | None = None) -> ReplicaPlan:
    """How a planned process is started by this one, and dies with it; `more` is added to its variables."""
    search = os.pathsep.join(part for part in (str(SOURCE), os.environ.get("PYTHONPATH", "")) if part)
    variables = {PARENT_VARIABLE: str(os.getpid()), "PYTHONPATH": search, **process.variables, **(more or {})}
    command = (python_for(process.environment), *process.arguments(place))
    return ReplicaPlan(process.name, process.role, command, variables)


def free_port(host: str) -> int:
    """A TCP port of an interface ("*": of all) that is free now."""
    with socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET) as probe:
        probe.bind(("" if host == "*" else host.strip("[]"), 0))
        return int(probe.getsockname()[1])


def _fixed_port(bind: str) -> str:
    """`bind` with its `*` port replaced by one that is free now."""
    host, colon, port = bind.removeprefix("tcp://").rpartition(":")
    if not bind.startswith("tcp://") or not colon or port != "*":
        return bind
    return f"tcp://{host}:{free_port(host)}"
