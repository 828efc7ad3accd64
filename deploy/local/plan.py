"""How a run's processes are started on this machine: command and environment of each, by its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.environments import SOURCE, python_for
from shared.config import Recipe
from shared.service import PARENT_VARIABLE

CONTROLLER = "controller"


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
    shared_options = ("--recipe", str(run_folder / "config.toml"), "--run-folder", str(run_folder))

    threads = {
        "policy": recipe.policy.threads,
        "rollout": recipe.rollout.threads,
        "evaluator": recipe.evaluator.threads,
    }

    def process(role: str, name: str, options: Iterable[str]) -> ReplicaPlan:
        engine = recipe.rollout.engine_of(name) if role in ("rollout", "evaluator") else "transformers"
        command = (python_for(engine), "-m", f"services.{role}", *shared_options, *options, "--replica", name)
        return ReplicaPlan(name, role, command, _environment(threads.get(role, 1)))

    def replica(name: str) -> ReplicaPlan:
        return process(name.rpartition("-")[0], name, ("--controller", address))

    return RunPlan(address, process(CONTROLLER, CONTROLLER, ("--bind", bind)), replica)


def _environment(threads: int) -> dict[str, str]:
    search = os.pathsep.join(part for part in (str(SOURCE), os.environ.get("PYTHONPATH", "")) if part)
    return {
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONPATH": search,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _fixed_port(bind: str) -> str:
    """`bind` with its `*` port replaced by one that is free now."""
    host, colon, port = bind.removeprefix("tcp://").rpartition(":")
    if not bind.startswith("tcp://") or not colon or port != "*":
        return bind
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("" if host == "*" else host.strip("[]"), 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"
