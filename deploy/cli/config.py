"""`orrery config check` and `orrery config schema`: is a recipe good, what would it run, and what may be in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli import console

app = typer.Typer(help="Look at recipes without running them.", no_args_is_help=True)


@app.command("check")
def check(
    recipe: Annotated[Path, typer.Argument(help="TOML file that describes a run")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key")] = None,
    recipe_only: Annotated[bool, typer.Option("--recipe-only", help="do not open data sets and model")] = False,
) -> None:
    """Tell everything that is wrong with a recipe, its data and its model at once, then what it would run."""
    from deploy.checks import recipe as checks
    from shared.config import load_recipe

    checked = load_recipe(recipe, set_ or [])
    found = checks.Findings([], []) if recipe_only else checks.look(checked)
    for fact in found.facts:
        console.out.print(f"[green]ok[/]    {escape(fact)}")
    for fault in found.faults:
        console.error(fault)
    if found.faults:
        raise typer.Exit(2)
    for line in checks.plan_lines(checked):
        console.out.print(f"      {escape(line)}")


@app.command("schema")
def schema(
    table: Annotated[bool, typer.Option("--table", help="a table for people instead of a JSON schema")] = False,
) -> None:
    """Print every key of a recipe: as a JSON schema, or as a table with type, range, default and meaning."""
    if not table:
        from shared.config import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    from deploy.checks.schema import rows

    shown = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column(max_width=30)
    shown.add_column(max_width=22)
    shown.add_column()
    for row in rows():
        if row.is_table:
            shown.add_row("")
            shown.add_row(f"[bold]{escape(row.key)}[/]", "", "", f"[bold]{escape(row.meaning)}[/]")
            continue
        live = " [green]live[/]" if row.live else ""
        name = row.key.rpartition(".")[2]
        shown.add_row(f"  {escape(name)}", escape(row.kind) + live, escape(row.default), escape(row.meaning))
    console.out.print(shown)
