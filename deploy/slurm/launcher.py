"""Starting a Slurm run from where a person is, and what can be known and done from there."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.keys import make_keys
from deploy.local import check_environments
from deploy.local.environments import SOURCE, python_for
from deploy.local.folder import KEYS, RunBusyError, RunFolderError, keep_keys
from deploy.plan import CONTROLLER
from deploy.slurm import client
from deploy.slurm.client import SlurmError
from deploy.slurm.layout import WARNING_S, copy_scripts, job_name, outcome_path, script
from shared.bus import keys_place
from shared.config import Recipe, RecipeError


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for what could never run on several nodes."""
    check_environments(recipe)
    if recipe.weights.interface == "lo":
        raise RecipeError(
            'weights.interface: expected the network interface by which the nodes reach each other, got "lo"; '
            "'ip -4 address' on a node lists them: --set weights.interface=eth0"
        )


def submit_controller(recipe: Recipe, folder: Path) -> int:
    """Make ready what the jobs need, and submit the controller's; its number. RunBusyError, SlurmError."""
    busy = state_of(folder)
    if busy is not None:
        raise RunBusyError(f"{folder} is run already ({busy}): stop it with 'orrery down {folder.name}'")
    copy_scripts(folder)
    _give_keys(recipe, folder)
    outcome_path(folder).unlink(missing_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    options = [
        f"--job-name={job_name(folder, CONTROLLER)}",
        f"--output={folder / 'logs' / 'controller-job.out'}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{WARNING_S}",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=2",
    ]
    variables = {
        "ORRERY_PYTHON": python_for("controller"),
        "ORRERY_RUN": str(folder),
        "ORRERY_ROLE": CONTROLLER,
        "ORRERY_REPLICA": CONTROLLER,
        "ORRERY_ENVIRONMENT": "controller",
        "PYTHONPATH": str(SOURCE),
        "PYTHONUNBUFFERED": "1",
    }
    number = client.submit(script(folder, CONTROLLER), ("-m", "deploy.slurm", str(folder)), options, variables)
    (folder / "slurm" / "job").write_text(f"{number}\n", encoding="utf-8")
    return number


def state_of(folder: Path) -> str | None:
    """The controller's job and its state, for a person, while it waits or runs; None if it does neither.

    SlurmError if Slurm cannot say.
    """
    jobs = [job for job in client.find([job_name(folder, CONTROLLER)]) if not job.ended]
    if not jobs:
        return None
    job = jobs[-1]
    return f"Slurm job {job.number}, {job.state}" + (f" on {job.node}" if job.node else f" ({job.reason})")


def outcome_of(folder: Path) -> tuple[int, str] | None:
    """The exit code of the run and what went wrong, once its supervisor has told."""
    try:
        told = json.loads(outcome_path(folder).read_text(encoding="utf-8"))
        return int(told["code"]), str(told["why"])
    except FileNotFoundError:
        return None


def cancel_jobs(folder: Path) -> int:
    """Cancel every job of the run; their number."""
    mine = [job.number for job in client.find_all() if job.name.startswith(job_name(folder, "")) and not job.ended]
    client.cancel(*mine)
    return len(mine)


def _give_keys(recipe: Recipe, folder: Path) -> None:
    """Make keys for the run where it has none: its controller listens on the nodes' network."""
    if keys_place(recipe.bus.keys) is not None:
        return
    make_keys(folder / KEYS)
    try:
        keep_keys(recipe, folder, folder / KEYS)
    except OSError as error:
        raise RunFolderError(folder, error) from error


__all__ = ["SlurmError", "cancel_jobs", "check_recipe", "outcome_of", "state_of", "submit_controller"]
