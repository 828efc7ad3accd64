"""Putting a question to a run's controller: where it listens, and with which key a person connects."""

from __future__ import annotations

import tomllib
from pathlib import Path

from shared.bus import BusTimeout, ask, keys_place
from shared.bus.address import TELLS
from shared.messages import AnyMessage


def ask_run(folder: Path, message: AnyMessage, timeout_s: float) -> AnyMessage:
    """What the controller of the run in `folder` answers. As `shared.bus.ask`; BusTimeout if it has no address yet."""
    try:
        address = (folder / TELLS).read_text(encoding="utf-8").split()[0]
        recipe = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, IndexError) as error:
        raise BusTimeout(f"the controller of {folder.name} has told no address yet: {error}") from None
    return ask(address, message, timeout_s, keys=keys_place(recipe.get("bus", {}).get("keys")))
