"""TensorBoard: `tensorboard --logdir RUN/tensorboard` shows what is written here, by TensorBoard's own writer.

A resumed run's figures come from the beginning again, so the file of the last supervisor, whose end may be torn, is
replaced: no step is ever there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deploy.metrics.figures import Line, Verdict, figures

FLUSH_S = 5


class TensorBoardWriter:
    """Figures of each step, and verdicts at the step that made their version; a new lineage voids what it replaces."""

    def __init__(self, run_folder: Path) -> None:
        folder = run_folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_S)
        self._lineage: int | None = None

    def line(self, number: int, line: Line) -> None:
        if self._lineage is not None and line["lineage"] != self._lineage:
            void = Event(step=line["step"], wall_time=line["time"], session_log=SessionLog(status=SessionLog.START))
            self._writer.add_event(void)
        self._lineage = line["lineage"]
        self._scalars(line["step"], line["time"], figures(line))

    def verdict(self, number: int, verdict: Verdict) -> None:
        self._scalars(verdict.step, verdict.at, verdict.values)

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, step: int, at: float, values: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._writer.add_event(Event(step=step, wall_time=at, summary=summary))
