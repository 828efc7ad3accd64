"""Steering a run that goes on, from another terminal: each command is one message, and prints what it became."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run

if TYPE_CHECKING:
    from shared.messages import AnyMessage, Role

TELL_S = 10.0
"""How long the controller is waited for: it answers once what was asked is on its disk, or is being restarted."""
RunOption = Annotated[str | None, typer.Option("--run", "-r", help="a run's folder or id (default: runs/latest)")]


def tell(folder: Path, message: AnyMessage) -> None:
    """Tell the run's controller and print what became of it; exit code 1 if it refuses or does not answer."""
    from deploy.local.asking import ask_run
    from shared.bus import BusError, TurnedAway
    from shared.bus.errors import Refusal
    from shared.messages import Accepted

    try:
        answer = ask_run(folder, message, TELL_S)
    except Refusal as refusal:
        console.error(f"expected {refusal.expected}, got {refusal.got}; {refusal.advice}")
        raise typer.Exit(1) from None
    except TurnedAway:
        raise
    except BusError:
        console.error(
            f"{folder.name} has no controller that answers within {TELL_S:g} s: is the run up ('orrery status')? "
            f"'orrery resume {folder.name}' starts it again"
        )
        raise typer.Exit(1) from None
    console.out.print(answer.detail if isinstance(answer, Accepted) else str(answer), markup=False)


def pause(run: RunArgument = None) -> None:
    """Begin no new batch until 'orrery resume': the one in hand is finished, everything stays loaded."""
    from shared.messages import PauseRun

    tell(find_run(run), PauseRun("a person paused it"))


def checkpoint(run: RunArgument = None) -> None:
    """Write a checkpoint as soon as the batch in hand is done."""
    from shared.messages import CheckpointRun

    tell(find_run(run), CheckpointRun())


def evaluate(run: RunArgument = None) -> None:
    """Judge the newest weights on the held-out suites now."""
    from shared.messages import EvaluateRun

    tell(find_run(run), EvaluateRun())


def drain(
    replica: Annotated[str, typer.Argument(help="its name, such as rollout-1 ('orrery status' lists them)")],
    run: RunOption = None,
) -> None:
    """Have a replica finish or hand back its work and leave; it is not started again."""
    from shared.messages import DrainReplica

    tell(find_run(run), DrainReplica(replica, "a person drains it"))


def scale(
    roles: Annotated[list[str], typer.Argument(metavar="ROLE=NUMBER...", help="such as rollout=3 policy=2")],
    run: RunOption = None,
) -> None:
    """Change how many replicas of a role the run's launcher keeps running."""
    from shared.messages import ScaleFleet

    tell(find_run(run), ScaleFleet(_counts(roles)))


def _counts(texts: list[str]) -> dict[Role, int]:
    counts: dict[Role, int] = {}
    for text in texts:
        role, equals, number = text.partition("=")
        match role.strip():
            case ("policy" | "rollout" | "evaluator") as known if equals and number.strip().isdigit():
                counts[known] = int(number)
            case _:
                console.error(f"{text!r}: expected ROLE=NUMBER with policy, rollout or evaluator, such as rollout=3")
                raise typer.Exit(2)
    return counts
