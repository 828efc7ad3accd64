"""What is known of a run right now: its metrics lines, its verdicts, and what the controller answers.

Owned by the display's thread (and `orrery status --watch`). Everything is read from files but the replicas' states,
which the controller is asked for; a run without a controller shows what its files tell.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.readers.evaluations import Evaluation, read_evaluations
from deploy.readers.figures import Line
from deploy.readers.lines import LineFollower
from shared.messages import Status, StatusRequest

HISTORY = 4000
"""Lines of metrics.jsonl that are remembered; the sparklines of a longer run show its last part."""
ASK_S = 1.0
"""How long the controller is waited for; it is on this machine and answers at once, or is not there."""


@dataclass(frozen=True)
class StageView:
    """The stage in force: `done` of its `batches` are trained; `line` is its last one of metrics.jsonl."""

    name: str
    batches: int
    done: int
    line: Line

    @classmethod
    def of(cls, line: Line) -> StageView:
        """From a line of metrics.jsonl; KeyError, TypeError or ValueError if it is none."""
        return cls(str(line["stage"]), int(line["batches"]), int(line["batch"]), line)


@dataclass
class Picture:
    """What the panels show. `lines` are metrics lines, `status` the controller's last answer, `silent_s` its age."""

    run: str
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=HISTORY))
    evaluations: list[Evaluation] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0

    def stage_lines(self) -> list[Line]:
        """The lines of the stage that the newest one belongs to."""
        if not self.lines:
            return []
        stage = self.lines[-1].get("stage")
        return [line for line in self.lines if line.get("stage") == stage]

    def series(self, key: str) -> list[float]:
        """The values of one figure in the stage in force."""
        return [float(line[key]) for line in self.stage_lines() if isinstance(line.get(key), int | float)]

    def seconds_left(self) -> float | None:
        """How long the stage in force takes still, by the pace of its last batches; None before there is a pace."""
        recent = self.stage_lines()[-20:]
        if len(recent) < 2:
            return None
        first, last = recent[0], recent[-1]
        batches = int(last["batch"]) - int(first["batch"])
        if batches < 1:
            return None
        return (float(last["time"]) - float(first["time"])) / batches * (int(last["batches"]) - int(last["batch"]))


class Sources:
    """Reads what is new into a `Picture`."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._metrics = LineFollower(run_folder / "metrics.jsonl")
        self._answered = time.monotonic()
        self.picture = Picture(run_folder.name)

    def look(self) -> None:
        """Read the files; cheap."""
        for text in self._metrics.new():
            try:
                line = json.loads(text)
                StageView.of(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a full disk cut short
            self.picture.lines.append(line)
        self.picture.evaluations = read_evaluations(self._folder / "eval")

    def ask(self) -> bool:
        """Ask the controller; False if it does not answer within ASK_S, or not to this person."""
        from shared.bus import KeysRefused, TurnedAway

        status = None
        with contextlib.suppress(KeysRefused, TurnedAway):  # a view of the files is better than none
            status = ask_controller(self._folder, ASK_S)
        if status is not None:
            self.picture.status, self._answered = status, time.monotonic()
        self.picture.silent_s = time.monotonic() - self._answered
        return status is not None


def ask_controller(run_folder: Path, timeout_s: float) -> dict[str, Any] | None:
    """What the run's controller answers to StatusRequest; None if it has no address yet, or does not answer.

    TurnedAway or KeysRefused for a person without a key that it takes.
    """
    from deploy.local.asking import ask_run
    from shared.bus import BusError, TurnedAway

    try:
        answer = ask_run(run_folder, StatusRequest(), timeout_s)
    except TurnedAway:
        raise
    except BusError:
        return None
    return answer.run if isinstance(answer, Status) else None
