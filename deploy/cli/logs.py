"""`orrery logs`: the JSON lines of all services of a run as one coloured story, in the order of time."""

from __future__ import annotations

import heapq
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run
from deploy.readers.lines import LineFollower

_LEVELS = {"debug": "dim", "info": "green", "warning": "yellow", "error": "bold red", "critical": "bold red"}
_COLOURS = ("cyan", "magenta", "blue", "green", "yellow", "bright_cyan", "bright_magenta")
_SHOWN = ("time", "level", "event", "run", "replica", "exception")
_LOOK_S = 0.3


def logs(
    run: RunArgument = None,
    service: Annotated[str, typer.Option("--service", "-s", help="only this service or replica")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with new lines until Ctrl-C")] = False,
) -> None:
    """Show the logs of a run's services as one story."""
    folder = find_run(run) / "logs"
    followers: dict[Path, LineFollower] = {}
    wait = False
    try:
        while True:
            for path in sorted(folder.glob(f"{service}*.jsonl")):
                followers.setdefault(path, LineFollower(path))
            for _, line in heapq.merge(*(_parsed(lines) for lines in followers.values()), key=lambda item: item[0]):
                _show(line)
            if not followers and not follow:
                console.error(f"no logs of {service or 'any service'} in {folder}")
                raise typer.Exit(1)
            if not follow:
                return
            wait = True
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        if not wait:
            raise


def _parsed(lines: LineFollower) -> Iterator[tuple[str, dict[str, Any]]]:
    """(time, event) of each new line; a line cut short by a full disk is passed over."""
    for text in lines.new():
        try:
            event = json.loads(text)
            yield str(event["time"]), event
        except (ValueError, KeyError, TypeError):
            continue


def _show(event: dict[str, Any]) -> None:
    replica = str(event.get("replica", "?"))
    colour = _COLOURS[zlib.crc32(replica.encode()) % len(_COLOURS)]
    level = str(event.get("level", "info"))
    extras = " ".join(f"[dim]{escape(str(k))}=[/]{escape(str(v))}" for k, v in event.items() if k not in _SHOWN)
    console.out.print(
        f"[dim]{event['time'][11:23]}[/] [{colour}]{escape(f'{replica:<12}')}[/] "
        f"[{_LEVELS.get(level, 'white')}]{escape(str(event.get('event', '')))}[/] {extras}"
    )
    if event.get("exception"):
        console.out.print(f"[red]{escape(str(event['exception']))}[/]")
