"""`python -m deploy.container.entry ARGUMENTS`: what a replica's container starts.

All containers of a service are made from one description, so a container has to find out which replica it is: by the
number that Compose gave it, which is in the name that Docker's name server has for its address. It then becomes that
replica's process (`python ARGUMENTS --replica NAME`, the same process id), with the GPUs of that replica alone.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.container.names import Container, replica_of
from deploy.plan import launch_plan
from shared.config import RecipeError, load_recipe
from shared.gpus import VISIBLE
from shared.service import EXIT_RECIPE, EXIT_RESTART

PROJECT_VARIABLE = "ORRERY_PROJECT"
SERVICE_VARIABLE = "ORRERY_SERVICE"
NAME_S = 10.0
"""How long Docker's name server may take to know a container that has just started."""

Lookup = Callable[[], str]


class NamelessError(Exception):
    """This container cannot tell which replica it is."""


def main(arguments: Sequence[str]) -> None:
    """Become the replica; never returns."""
    try:
        recipe = load_recipe(Path(arguments[arguments.index("--recipe") + 1]))
        project, service = os.environ[PROJECT_VARIABLE], os.environ[SERVICE_VARIABLE]
        replica = replica_of(recipe, Container(service, own_number(project, service)))
    except (RecipeError, ValueError, KeyError) as error:
        print(f"this container cannot become a replica: {error}", file=sys.stderr)
        sys.exit(EXIT_RECIPE)
    except NamelessError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_RESTART)
    pids = Path(arguments[arguments.index("--run-folder") + 1]) / "pids"
    (pids / replica).write_text(str(os.getpid()), encoding="utf-8")
    plan = launch_plan(recipe)
    if plan.replica(replica).gpus:  # Compose gives every container of a service the same GPUs, hence all of them
        os.environ[VISIBLE] = ",".join(map(str, plan.gpus_of(replica)))
    os.execv(sys.executable, [sys.executable, *arguments, "--replica", replica])


def own_number(project: str, service: str, lookup: Lookup | None = None, patience_s: float = NAME_S) -> int:
    """The number that Compose gave this container; NamelessError if its name server does not tell."""
    lookup = lookup or _name_of_own_address
    name = re.compile(rf"{re.escape(project)}-{re.escape(service)}-(\d+)(\.|\s|$)")
    deadline = time.monotonic() + patience_s
    while True:
        told = lookup()
        if found := name.search(told):
            return int(found[1])
        if time.monotonic() >= deadline:
            raise NamelessError(
                f"waited {patience_s:g} s for Docker's name server to call this container {project}-{service}-NUMBER, "
                f"got {told.strip() or 'no name'!r}; replicas are started by Compose, on a network that it made"
            )
        time.sleep(0.1)


def _name_of_own_address() -> str:
    """What the name server has for this container's address, /etc/hosts aside, where it is called by its id."""
    address = socket.gethostbyname(socket.gethostname())
    asked = subprocess.run(["getent", "-s", "dns", "hosts", address], capture_output=True, text=True, check=False)
    return asked.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
