"""Follows a run's files and hands every line and verdict to each writer, once.

A thread of the supervisor's process, started by `orrery up` and `orrery resume`. A writer that fails is left out from
then on, with one note: figures must never end a run. Writers get everything from the run's beginning again and leave
out by themselves what they wrote before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from deploy.readers.evaluations import read_evaluations
from deploy.readers.figures import Line, StepOfVersion, Verdict
from deploy.readers.lines import LineFollower
from shared.config import Recipe

LOOK_S = 1.0
CLOSE_S = 30.0
"""Longest wait for writers that still send at the end of a run."""


class Writer(Protocol):
    """One place that figures go to."""

    def line(self, number: int, line: Line) -> None:
        """The metrics line `number` (from 0) of the run."""

    def verdict(self, number: int, verdict: Verdict) -> None:
        """A verdict; `number` lines came before it."""

    def close(self) -> None:
        """Nothing more comes."""


class MetricsWriters:
    """Runs the writers that the recipe asks for, for the length of a `with` block."""

    def __init__(self, run_folder: Path, recipe: Recipe, tell: Callable[[str], None]) -> None:
        self._folder = run_folder
        self._tell = tell
        self._makers = _makers(run_folder, recipe)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)

    def __enter__(self) -> MetricsWriters:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._tell(f"metrics are still being sent after {CLOSE_S:g} s: going on without the rest")

    def _work(self) -> None:
        writers: dict[str, Writer] = {}
        for name, make in self._makers.items():
            self._guard(writers, name, partial(_open, writers, name, make))
        follower = Follower(self._folder)
        over = False
        while writers and not over:
            over = self._closing.wait(LOOK_S)
            lines, verdicts = follower.look()
            for name, writer in list(writers.items()):
                self._guard(writers, name, partial(_hand, writer, lines, verdicts))
        for name, writer in list(writers.items()):
            self._guard(writers, name, writer.close)

    def _guard(self, writers: dict[str, Writer], name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a service on the network, a full disk, a package that is missing
            writers.pop(name, None)
            self._tell(f"{name} gets no figures any more: {str(error) or type(error).__name__}")


class Follower:
    """Numbered lines and verdicts of a run that were added since the last look."""

    def __init__(self, run_folder: Path) -> None:
        self._lines = LineFollower(run_folder / "metrics.jsonl")
        self._evaluations = run_folder / "eval"
        self._steps = StepOfVersion()
        self._judged: set[tuple[str, int, int]] = set()
        self._count = 0

    def look(self) -> tuple[list[tuple[int, Line]], list[tuple[int, Verdict]]]:
        """What is new, in order."""
        lines = []
        for text in self._lines.new():
            try:
                line = json.loads(text)
                self._steps.take([line])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a full disk
            lines.append((self._count, line))
            self._count += 1
        fresh = [e for e in read_evaluations(self._evaluations) if e.key not in self._judged]
        self._judged.update(e.key for e in fresh)
        return lines, [(self._count, self._steps.of(e)) for e in fresh]


def _open(writers: dict[str, Writer], name: str, make: Callable[[], Writer]) -> None:
    writers[name] = make()


def _hand(writer: Writer, lines: list[tuple[int, Line]], verdicts: list[tuple[int, Verdict]]) -> None:
    for number, line in lines:
        writer.line(number, line)
    for number, verdict in verdicts:
        writer.verdict(number, verdict)


def _makers(run_folder: Path, recipe: Recipe) -> dict[str, Callable[[], Writer]]:
    """What the recipe asks for; each is imported and opened in the thread."""

    def tensorboard() -> Writer:
        from deploy.metrics.tensorboard import TensorBoardWriter

        return TensorBoardWriter(run_folder)

    def wandb() -> Writer:
        from deploy.metrics.wandb import WandbWriter

        assert recipe.metrics.wandb is not None
        return WandbWriter(run_folder, recipe.metrics.wandb, recipe.model_dump(exclude_none=True))

    def prometheus() -> Writer:
        from deploy.metrics.prometheus import PrometheusWriter

        return PrometheusWriter(run_folder.name, recipe.metrics.prometheus_host, recipe.metrics.prometheus_port)

    makers: dict[str, Callable[[], Writer]] = {"TensorBoard": tensorboard}
    if recipe.metrics.wandb is not None:
        makers["W&B"] = wandb
    if recipe.metrics.prometheus_port:
        makers["Prometheus"] = prometheus
    return makers
