"""What a run leaves for people: metrics.jsonl, eval/*.json, controller.address.

Written after the journal, so a crash may leave a line out; recovery offers every replayed line again, and what is there
already is not written twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from shared.bus.address import TELLS


class Outputs:
    """The files of one run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = folder / "metrics.jsonl"
        self._known = self._read_keys()

    def metrics(self, line: dict[str, Any]) -> None:
        """Append a committed step's line unless it is there."""
        key = (line["lineage"], line["step"])
        if key in self._known:
            return
        self._known.add(key)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def evaluation(self, result: dict[str, Any]) -> None:
        """Write an evaluation's file."""
        name = f"{result['lineage']}-{result['version']}-{result['suite']}.json"
        _replace(self._folder / "eval" / name, json.dumps(result, indent=1) + "\n")

    def address(self, address: str, term: int) -> None:
        """Tell where the controller listens, and in which term."""
        _replace(self._folder / TELLS, f"{address} {term}\n")

    def _read_keys(self) -> set[tuple[int, int]]:
        """What the file holds; a last line without its end is cut off."""
        if not self._metrics.exists():
            return set()
        data = self._metrics.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._metrics, len(whole))
        keys = set()
        for text in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError):
                line = json.loads(text)
                keys.add((line["lineage"], line["step"]))
        return keys


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
