"""`orrery set`, `get`, `history` and `revert`: the live hyper-parameters of a run.

Read from the controller, or, once there is none, from the journal. Changes are checked where they are taken, by the
controller: its refusal names the field, its range, and what may change at all.
"""

from __future__ import annotations

import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run
from deploy.cli.steer import RunOption, tell

if TYPE_CHECKING:
    from shared.messages import Scalar

_ASK_S = 3.0


@dataclass(frozen=True)
class Known:
    """Values in force, the revisions behind them (maps of revision, at, step, changes), and what waits for its step."""

    values: dict[str, Any]
    history: list[dict[str, Any]]
    pending: list[dict[str, Any]]

    def under(self, revision: int, start: dict[str, Any]) -> dict[str, Any]:
        """The values of a revision, `start` being those of revision 0."""
        values = dict(start)
        for known in self.history:
            if known["revision"] <= revision:
                values.update(known["changes"])
        return values


def read_known(folder: Path) -> Known:
    """What is known of a run's hyper-parameters."""
    from deploy.cli.live.sources import ask_controller

    answer = ask_controller(folder, _ASK_S)
    if answer is not None and "hyperparameters" in answer:
        return Known(answer["hyperparameters"], answer["history"], answer["pending"])
    from shared.records import read_journal

    history = []
    for _, record in read_journal(folder):
        revised = [fact for fact in record["facts"] if fact["type"] == "revised"]
        history += [{"at": record["event"]["at"], **fact} for fact in revised]
    start = first_values(folder)
    return Known(Known(start, history, []).under(len(history), start), history, [])


def first_values(folder: Path) -> dict[str, Any]:
    """Revision 0: what the run's recipe says."""
    from shared.config import live_values, load_recipe

    return dict(live_values(load_recipe(folder / "config.toml")))


def set_(
    changes: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="such as train.lr=1e-6")],
    at_step: Annotated[int | None, typer.Option(min=0, help="the step that it comes into force with")] = None,
    run: RunOption = None,
) -> None:
    """Change live hyper-parameters: all of them with one step, the same on every replica."""
    from shared.messages import SetHyperparameters

    tell(find_run(run), SetHyperparameters(_parsed(changes), at_step))


def get(
    name: Annotated[str | None, typer.Argument(help="a field, or the beginning of some; all when left out")] = None,
    run: RunOption = None,
) -> None:
    """Show live hyper-parameters as they are in force."""
    folder = find_run(run)
    known, start = read_known(folder), first_values(folder)
    chosen = {field: value for field, value in known.values.items() if name is None or field.startswith(name)}
    if not chosen:
        console.error(f"no live field is named {name}; there are: {', '.join(sorted(known.values))}")
        raise typer.Exit(1)
    table = Table.grid(padding=(0, 2))
    for field, value in chosen.items():
        waiting = [f"{c['changes'][field]} from step {c['at_step']}" for c in known.pending if field in c["changes"]]
        notes = [f"recipe: {start[field]}"] if field in start and start[field] != value else []
        table.add_row(field, str(value), f"[dim]{'; '.join(notes + waiting)}[/]")
    console.out.print(table)


def history(run: RunArgument = None) -> None:
    """Show every revision of the hyper-parameters: when it came into force, with which step, and what it changed."""
    folder = find_run(run)
    known = read_known(folder)
    values = first_values(folder)
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("revision", "time", "from step", "change"):
        table.add_column(column)
    for revision in known.history:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(revision["at"]))
        for number, (field, value) in enumerate(revision["changes"].items()):
            first = (str(revision["revision"]), when, str(revision["step"])) if number == 0 else ("", "", "")
            table.add_row(*first, f"{field}: {values.get(field)} -> {value}")
        values.update(revision["changes"])
    for change in known.pending:
        for number, (field, value) in enumerate(change["changes"].items()):
            first = ("waits", "", str(change["at_step"])) if number == 0 else ("", "", "")
            table.add_row(*first, f"{field}: {values.get(field)} -> {value}")
    console.out.print(table if table.row_count else f"{folder.name} goes by its recipe: nothing was changed")


def revert(
    revision: Annotated[
        int | None, typer.Argument(min=0, help="the revision to go back to; the one before when left out")
    ] = None,
    at_step: Annotated[int | None, typer.Option(min=0, help="the step that it comes into force with")] = None,
    run: RunOption = None,
) -> None:
    """Go back to the values of an earlier revision: a new revision that undoes what came since."""
    from shared.messages import SetHyperparameters

    folder = find_run(run)
    known = read_known(folder)
    now = len(known.history)
    target = now - 1 if revision is None else revision
    if not 0 <= target < max(now, 1):
        console.error(f"revision {target} is none to go back to: revision {now} is in force, 0 is the recipe")
        raise typer.Exit(1)
    then = known.under(target, first_values(folder))
    changes: dict[str, Scalar] = {field: value for field, value in then.items() if known.values[field] != value}
    if not changes:
        console.note(f"nothing differs from revision {target}")
        return
    for field, value in changes.items():
        console.note(f"{field}: {known.values[field]} -> {value}")
    tell(folder, SetHyperparameters(changes, at_step))


def _parsed(texts: list[str]) -> dict[str, Scalar]:
    changes: dict[str, Scalar] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            console.error(f"{text!r}: expected NAME=VALUE, such as train.lr=1e-6; 'orrery get' lists the names")
            raise typer.Exit(2)
        try:
            changes[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[name.strip()] = value.strip()  # a bare word; the controller says what it expected
    return changes
