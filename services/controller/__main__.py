"""`python -m services.controller --recipe R [--run-folder F] [--bind A]`: one term of one run."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import uvloop

from services.controller.disk import FolderDisk
from services.controller.journal import Journal
from services.controller.launch import Launch, Superseded
from services.controller.outputs import Outputs
from services.controller.recovery import DriftedJournal, open_run
from services.controller.server import Controller
from services.controller.shell import MessageTooLarge
from services.controller.spool import Spool
from shared.bus import BindRefused, RouterBus
from shared.records import JOURNAL, SPOOL, JournalDamaged, SpoolDamaged
from shared.service import (
    EXIT_DONE,
    EXIT_FATAL,
    EXIT_FENCED,
    EXIT_RECIPE,
    EXIT_RESTART,
    ServiceArguments,
    run_service,
)
from shared.telemetry import get_logger

log = get_logger()

LOCK_S = 2.0
"""How long a new term waits for the process of the old one to be gone."""
TAKE_OVER_S = 30.0
"""The same where the old one may be alive on another machine: it notices the newer launch, and lets go."""


def main(arguments: ServiceArguments) -> int:
    """Serve one term; 0 when the run is complete or stopped, 2 for an address or folder in use, 3 when it failed."""
    recipe, folder = arguments.recipe, arguments.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    launch = Launch(folder, arguments.launch)
    lock = _lock(folder, TAKE_OVER_S if launch.number else LOCK_S)
    if lock is None:  # who is sure to be the newest may try again
        return EXIT_RESTART if launch.number else EXIT_RECIPE
    segment = recipe.journal.segment_mb << 20
    try:
        launch.check()
        journal = Journal(FolderDisk(folder / JOURNAL), segment)
        outputs = Outputs(folder)
        core = open_run(recipe, folder, journal, outputs)
        if core.state.stages.name == "over":
            log.info("this run is complete; nothing to resume", run=core.state.run)
            return EXIT_DONE
        bus = RouterBus(arguments.bind or recipe.bus.bind, term=core.state.term + 1, settings=recipe.bus)
        controller = Controller(core, journal, Spool(FolderDisk(folder / SPOOL), segment), outputs, bus, launch)
        end = uvloop.run(controller.serve(folder.name))
    except Superseded as error:
        log.warning("fenced: a newer launch of this run has begun", why=str(error))
        return EXIT_FENCED
    except BindRefused as error:
        log.error("the controller cannot listen", why=str(error))
        return EXIT_RECIPE
    except (JournalDamaged, DriftedJournal, SpoolDamaged) as error:
        log.error("the run's records cannot be used", why=str(error))
        return EXIT_FATAL
    except MessageTooLarge as error:
        log.error("a message is too large for the bus: the run can go on once it fits", why=str(error))
        return EXIT_FATAL
    except OSError as error:
        why = f"{error}; nothing acknowledged is lost: free space or mend the folder's rights, then resume"
        log.error("the run folder cannot be written", why=f"the run folder {folder} cannot be written: {why}")
        return EXIT_FATAL
    finally:
        os.close(lock)
    (log.error if end.outcome == "failed" else log.info)(f"the run is {end.outcome}", why=end.cause)
    return EXIT_FATAL if end.outcome == "failed" else EXIT_DONE


def _lock(folder: Path, patience_s: float) -> int | None:
    """Hold the run folder: two controllers on one journal would tear it.

    A process that was just killed may hold it for a moment longer.
    """
    descriptor = os.open(folder / "controller.lock", os.O_RDWR | os.O_CREAT, 0o644)
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                why = f"{folder} is used by another controller: end that ('orrery down'), or give another run folder"
                log.error("the run folder is in use", why=why)
                os.close(descriptor)
                return None
            time.sleep(LOCK_S / 20)


if __name__ == "__main__":
    run_service("controller", main)
