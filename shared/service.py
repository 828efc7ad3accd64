"""The start and the end of every service process: arguments, logging, parent's death, exit codes.

Called by each service's `__main__`: `run_service("rollout", main)`. The launcher decides by the exit code whether to
start a process again, so these codes are part of the contract between services and launchers. Imports neither torch
nor numpy.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shared.bus.errors import KeysRefused
from shared.config import Recipe, RecipeError, load_recipe
from shared.telemetry import configure_logging, get_logger

EXIT_DONE = 0
"""The run is over, or this replica has drained: nothing to start again."""
EXIT_RESTART = 1
"""This process cannot go on, a fresh one may."""
EXIT_RECIPE = 2
"""The recipe or the arguments cannot work: starting again would not help."""
EXIT_FATAL = 3
"""An error that ends the run: starting again would not help."""
EXIT_FENCED = 4
"""The controller has given this replica's name to a newer process: a fresh one may start."""

PARENT_VARIABLE = "ORRERY_DIE_WITH_PARENT"
"""Set by a launcher to its own process id: the service is killed when the launcher dies."""
LEVEL_VARIABLE = "ORRERY_LOG_LEVEL"
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class ServiceArguments:
    """What a service is started with. `bind` belongs to the controller alone, `controller` to all the others."""

    recipe: Recipe
    run_folder: Path
    controller: str
    bind: str | None
    replica: str
    launch: int = 0
    """Of the controller: a newer launch of the run supersedes it; 0 where only one can be."""


def parse_arguments(role: str, argv: Sequence[str] | None = None) -> ServiceArguments:
    """The command line of a service; RecipeError for a recipe that cannot be used, SystemExit(2) for wrong options."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{role}", description=f"One {role} process of a run.")
    parser.add_argument("--recipe", required=True, help="TOML file that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one key; may be repeated")
    parser.add_argument("--run-folder", type=Path, help="where the run lives (default: [run] folder/name)")
    if role == "controller":
        parser.add_argument("--bind", help="address to listen on (default: bus.bind)")
        parser.add_argument(
            "--launch", type=int, default=0, help="the launch it belongs to, where launches may overlap"
        )
    else:
        parser.add_argument("--controller", required=True, help="tcp://HOST:PORT, or a file that tells it")
    parser.add_argument("--replica", default=role if role == "controller" else f"{role}-0", help="name of this replica")
    given = parser.parse_args(argv)
    recipe = load_recipe(given.recipe, given.set)
    return ServiceArguments(
        recipe=recipe,
        run_folder=(given.run_folder or Path(recipe.run.folder) / recipe.run.name).absolute(),
        controller="" if role == "controller" else given.controller,
        bind=(given.bind or recipe.bus.bind) if role == "controller" else None,
        replica=given.replica,
        launch=given.launch if role == "controller" else 0,
    )


def run_service(role: str, main: Callable[[ServiceArguments], int]) -> NoReturn:
    """Run `main` as this process and exit with its code; see the EXIT_ constants.

    A RecipeError anywhere ends in code 2 with its text; any other exception is logged with its traceback and ends in
    code 1, which launchers answer with a restart. `main` should import what takes seconds to import (torch) itself:
    until the first line below has run, nothing ties this process to its launcher.
    """
    begin_process()
    try:
        arguments = parse_arguments(role)
    except RecipeError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_RECIPE)
    begin_logging(arguments.run_folder, role, arguments.replica)
    sys.exit(_run(role, main, arguments))


def begin_process() -> None:
    """The first thing that a process of a run does: tie it to its parent, and let it tell what it is busy with."""
    _die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 prints every thread's stack: where is it waiting?


def begin_logging(run_folder: Path, role: str, name: str) -> None:
    """Log to the run folder as `name`, at the level that the launcher asks for; errors of threads too."""
    configure_logging(run_folder, role, name, os.environ.get(LEVEL_VARIABLE, "INFO"))
    threading.excepthook = _log_thread_exception


def _run(role: str, main: Callable[[ServiceArguments], int], arguments: ServiceArguments) -> int:
    log = get_logger()
    log.info(f"{role} starts", pid=os.getpid())
    try:
        code = main(arguments)
    except RecipeError as error:
        log.error("the recipe cannot be used", why=str(error))
        return EXIT_RECIPE
    except KeysRefused as error:
        log.error("the keys of the bus cannot be used", why=str(error))
        return EXIT_RECIPE
    except KeyboardInterrupt:
        log.warning(f"{role} interrupted from the keyboard")
        return 128 + signal.SIGINT
    except Exception:
        log.exception(f"{role} failed unexpectedly")
        return 1
    log.info(f"{role} ends", code=code)
    return code


def _log_thread_exception(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is None or failure.exc_type is SystemExit:
        return
    name = failure.thread.name if failure.thread else "unknown"
    get_logger().error(f"thread {name} failed unexpectedly", exc_info=failure.exc_value)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the launcher dies, however that happens (Linux)."""
    asked = os.environ.get(PARENT_VARIABLE, "0")
    if asked in ("", "0"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        print(f"cannot tie this process to its launcher: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(1)
    # a launcher that died before the call above sends no signal any more; "1" is a flag without a process id
    if asked != "1" and os.getppid() != int(asked):
        print(f"the launcher (process {asked}) has ended already", file=sys.stderr)
        sys.exit(1)
