"""The terminal: where a person's text goes, coloured if it is one."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.markup import escape

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def error(text: str) -> None:
    """One error, in red, on stderr."""
    err.print(f"[bold red]error[/] {escape(text)}")


def note(text: str) -> None:
    """What the launcher itself does, dimmed, on stdout."""
    with contextlib.suppress(OSError):  # the terminal may be closed, and the run must be ended in order all the same
        out.print(f"[dim]orrery[/] {escape(text)}")
