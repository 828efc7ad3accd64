"""Options that every benchmark of a live run has: which recipe, how many replicas of each role."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import RESULTS, ROOT


def add_options(parser: argparse.ArgumentParser, *, policies: int, rollouts: int, evaluators: int) -> None:
    """--recipe, --set, --policies, --rollouts, --evaluators, --limit, --folder, --collect, --results."""
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--policies", type=int, default=policies)
    parser.add_argument("--rollouts", type=int, default=rollouts)
    parser.add_argument("--evaluators", type=int, default=evaluators, help="0: the rollouts judge")
    parser.add_argument("--limit", type=float, default=1800.0, help="longest time to wait for a run, in seconds")
    parser.add_argument("--collect", type=Path, help="make the report of the runs in this folder again")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a new folder in runs/)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where table, figures and picture go")


def folder_of(given: argparse.Namespace, name: str) -> Path:
    """Where the runs lie, or will: the folder that was given, or a new one in runs/ that tells the benchmark's name."""
    given_one: Path | None = given.collect or given.folder
    return (given_one or ROOT / "runs" / time.strftime(f"{name}-%Y%m%d-%H%M%S")).absolute()


def fleet(policies: int, rollouts: int, evaluators: int) -> list[str]:
    """Overrides for so many replicas."""
    sets = [f"policy.replicas={policies}", f"rollout.replicas={rollouts}"]
    if evaluators:
        sets += ["evaluator.engine=own", f"evaluator.replicas={evaluators}"]
    return sets


def fleet_of(given: argparse.Namespace) -> list[str]:
    """The overrides that the options ask for; those given by --set come last and win."""
    return [*fleet(given.policies, given.rollouts, given.evaluators), *given.overrides]


def describe(policies: int, rollouts: int, evaluators: int) -> str:
    """For a person: "2 policy + 2 rollout + 1 evaluator"."""
    counts: Sequence[tuple[int, str]] = ((policies, "policy"), (rollouts, "rollout"), (evaluators, "evaluator"))
    return " + ".join(f"{count} {role}" for count, role in counts if count)
