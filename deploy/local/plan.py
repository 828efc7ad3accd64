"""The launch plan on this machine: the Python of each process, an address on loopback, and who dies with whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.environments import SOURCE, python_for
from deploy.plan import CONTROLLER, Place, Process, launch_plan
from shared.config import Recipe
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
    plan = launch_plan(recipe)
    return RunPlan(address, start_of(plan.controller, place), lambda name: start_of(plan.replica(name), place))


def start_of(process: Process, place: Place) -> ReplicaPlan:
    """How a planned process is started by this one, and dies with it."""
    search = os.pathsep.join(part for part in (str(SOURCE), os.environ.get("PYTHONPATH", "")) if part)
    variables = {PARENT_VARIABLE: str(os.getpid()), "PYTHONPATH": search, **process.variables}
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
