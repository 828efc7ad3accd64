"""Slurm's commands, as functions. Each may take seconds: call them in a thread."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND_S = 60.0
"""How long Slurm may take to answer; its own commands give up after about as long."""
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States that a job does not leave any more."""
_AWAY = re.compile(r"unable to contact|timed out|connection refused|communication", re.IGNORECASE)


class SlurmError(Exception):
    """Slurm did not do what it was asked; `away` if it could not be reached, so that nothing is known."""

    def __init__(self, text: str, *, away: bool = False) -> None:
        super().__init__(text)
        self.away = away


@dataclass(frozen=True)
class Job:
    """A job as Slurm shows it."""

    number: int
    name: str
    state: str
    node: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it will never run again under this number."""
        return self.state in ENDED


@dataclass(frozen=True)
class Details:
    """What Slurm remembers of one job: for some minutes after its end."""

    state: str
    code: int
    """The batch script's exit code; negative: the signal that ended it."""
    node: str
    reason: str
    restarts: int


def submit(script: Path, arguments: Sequence[str], options: Sequence[str], variables: Mapping[str, str]) -> int:
    """Submit a batch script with its arguments; the job's number."""
    told = _run(["sbatch", "--parsable", *options, str(script), *arguments], variables)
    return int(told.strip().split(";")[0])


def find(names: Iterable[str]) -> list[Job]:
    """This user's jobs of these names, those that ended lately too."""
    return _look(f"--name={','.join(names)}")


def find_all() -> list[Job]:
    """All of this user's jobs, those that ended lately too."""
    return _look()


def _look(*which: str) -> list[Job]:
    told = _run(["squeue", "--me", "--noheader", "--states=all", *which, "--format=%i|%j|%T|%N|%r"])
    jobs = []
    for line in told.splitlines():
        number, name, state, node, reason = line.strip().split("|", 4)
        jobs.append(Job(int(number), name, state, node, reason))
    return jobs


def details(number: int) -> Details:
    """What Slurm knows of a job; SlurmError for one that it has forgotten."""
    told = _run(["scontrol", "show", "job", "--oneliner", str(number)])
    fields = dict(re.findall(r"(\w+)=(\S*)", told))
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    return Details(
        state=fields.get("JobState", ""),
        code=-int(signal) if signal not in ("", "0") else int(code),
        node=fields.get("NodeList", "").replace("(null)", ""),
        reason=fields.get("Reason", ""),
        restarts=int(fields.get("Restarts", "0")),
    )


def terminate(number: int) -> None:
    """Ask what a job runs to end by itself: SIGTERM to its steps, and nothing after it."""
    _run(["scancel", "--signal=TERM", str(number)])


def cancel(*numbers: int) -> None:
    """End jobs: SIGTERM, then SIGKILL after Slurm's KillWait; those that wait are taken out of the queue."""
    if numbers:
        _run(["scancel", *map(str, numbers)])


def requeue(number: int) -> None:
    """End a job and have it run again, under the same number."""
    _run(["scontrol", "requeue", str(number)])


def _run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=_environment() | dict(variables or {}),
            timeout=COMMAND_S,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"expected the command {command[0]} of Slurm, found none: run this where jobs are submitted from"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {COMMAND_S:g} s", away=True) from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command[:2])}: {said}", away=bool(_AWAY.search(said)))
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's, without what a job is told of itself: another job that inherits it would take it for its own."""
    own = ("SLURM_", "SBATCH_", "SRUN_", "CUDA_VISIBLE_", "GPU_DEVICE_", "ROCR_VISIBLE_", "ORRERY_DIE_")
    return {key: value for key, value in os.environ.items() if not key.startswith(own) or key == "SLURM_CONF"}
