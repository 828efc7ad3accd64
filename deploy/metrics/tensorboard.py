"""TensorBoard: `tensorboard --logdir RUN/tensorboard` shows what is written here, by TensorBoard's own writer.

A resumed run's figures come from the beginning again, so the file of the last supervisor, whose end may be torn, is
replaced: no step is ever there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploy.readers.figures import Line, Verdict, figures

FLUSH_S = 5


class TensorBoardWriter:
    """Figures of each step, and verdicts at the step that made their version; a new lineage voids what it replaces."""

    def __init__(self, run_folder: Path) -> None:
        # not above: the orrery command works, if without figures, where TensorBoard and its numpy are not installed
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        folder = run_folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_S)
        self._lineage: int | None = None

    def line(self, number: int, line: Line) -> None:
        if self._lineage is not None and line["lineage"] != self._lineage:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(step=line["step"], wall_time=line["time"], session_log=start))
        self._lineage = line["lineage"]
        self._scalars(line["step"], line["time"], figures(line))

    def verdict(self, number: int, verdict: Verdict) -> None:
        self._scalars(verdict.step, verdict.at, verdict.values)

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, step: int, at: float, values: Mapping[str, float]) -> None:
        value = self._summaries.Summary.Value
        summary = self._summaries.Summary(value=[value(tag=tag, simple_value=it) for tag, it in values.items()])
        self._writer.add_event(self._events.Event(step=step, wall_time=at, summary=summary))
