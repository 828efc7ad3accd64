"""`orrery keys`: who may connect to a controller. Keys are made here, and handed to where services run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli import console

app = typer.Typer(help="Keys of the control plane (CURVE): needed off loopback.", no_args_is_help=True)
FOLDER = Path("keys")
FolderOption = Annotated[
    Path | None, typer.Option("--folder", "-f", help="where the keys lie (default: ORRERY_KEYS, or ./keys)")
]
NameArgument = Annotated[str, typer.Argument(help="a role (rollout), a replica (rollout-1), a person (person-alice)")]


@app.command("make")
def make(
    folder: Annotated[Path | None, typer.Argument(help="where (default: ORRERY_KEYS, or ./keys)")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--for", metavar="NAME", help="instead of one for each role; may be repeated")
    ] = None,
) -> None:
    """Make the controller's key and one for each role; what is there already stays as it is."""
    from deploy.keys import make_keys
    from shared.bus.keys import ROLES, VARIABLE

    place = _place(folder)
    made = make_keys(place, tuple(names) if names else ROLES)
    console.out.print(f"made in {place}: {', '.join(made)}" if made else f"{place} has them all", markup=False)
    console.out.print(f'use them with bus.keys = "{place}" or {VARIABLE}={place}', markup=False)


@app.command("add")
def add(name: NameArgument, folder: FolderOption = None) -> None:
    """Make a key for NAME and put it on the controller's list; a controller that runs takes it at once."""
    from deploy.keys import add_key

    add_key(_place(folder), name)
    console.out.print(f"made {_place(folder) / name}.key", markup=False)


@app.command("renew")
def renew(
    name: Annotated[str, typer.Argument(help="a name on the list, or 'controller'")], folder: FolderOption = None
) -> None:
    """Give NAME another key; the one before is refused from now on, on connections that stand too."""
    from deploy.keys import renew_key

    renew_key(_place(folder), name)
    console.out.print(f"made {_place(folder) / name}.key anew", markup=False)
    if name == "controller":
        console.out.print("the clients' files here name its new key: start the controller, then everybody, anew")


@app.command("remove")
def remove(name: NameArgument, folder: FolderOption = None) -> None:
    """Take NAME off the list and delete its key; what is connected with it is refused from now on."""
    from deploy.keys import remove_key

    remove_key(_place(folder), name)
    console.out.print(f"{name} is no longer on the list", markup=False)


@app.command("list")
def list_(folder: FolderOption = None) -> None:
    """Show who has a key, for whom it speaks, and its public half; secrets are never shown."""
    from deploy.keys import list_keys

    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("name", "speaks for", "public key", "file"):
        table.add_column(column, no_wrap=True, min_width=40 if column == "public key" else None)
    for entry in list_keys(_place(folder)):
        table.add_row(entry.name, entry.speaks, escape(entry.public), entry.file)
    console.out.print(table)


def _place(folder: Path | None) -> Path:
    from shared.bus.keys import keys_place

    return folder.absolute() if folder is not None else keys_place(str(FOLDER)) or FOLDER
