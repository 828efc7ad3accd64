"""Where a Slurm run keeps what belongs to the launcher, and what its jobs are called."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploy.local.folder import RunFolderError
from deploy.plan import CONTROLLER

SITE_VARIABLE = "ORRERY_SLURM"
"""Names the folder with a site's own job scripts."""
SITE = Path(__file__).parent / "site"
SCRIPTS = ("controller.sbatch", "replica.sbatch")
WARNING_S = 120
"""Seconds before a job's time limit at which it is told."""


def script(folder: Path, role: str) -> Path:
    """The job script of a role in a run's folder."""
    return folder / "slurm" / SCRIPTS[role != CONTROLLER]


def copy_scripts(folder: Path) -> None:
    """Give a run its own copy of the site's job scripts, which whoever wants to change them for this run edits."""
    site = Path(os.environ.get(SITE_VARIABLE) or SITE).expanduser()
    try:
        (folder / "slurm").mkdir(exist_ok=True)
        for name in SCRIPTS:
            if not (folder / "slurm" / name).exists():
                shutil.copyfile(site / name, folder / "slurm" / name)
    except OSError as error:
        raise RunFolderError(folder, error) from error


def job_name(folder: Path, process: str) -> str:
    """What the job of a controller or replica is called: the run's id, and the name."""
    return f"{folder.name}.{process}"


def outcome_path(folder: Path) -> Path:
    """Where the supervisor tells how the run ended."""
    return folder / "slurm" / "outcome.json"
