"""Which processes a run had and when each was started: looked at from a thread, several times a second."""

from __future__ import annotations

import threading

from benchmarks.live.run import LiveRun, ServiceProcess

LOOK_S = 0.2


class Watch:
    """Use as a context manager around a run. `seen` holds every service process, in the order of their starts."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._seen: dict[tuple[int, float], ServiceProcess] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def seen(self) -> list[ServiceProcess]:
        """All so far."""
        return sorted(self._seen.copy().values(), key=lambda process: process.started)

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            for process in self._run.processes():
                self._seen[process.pid, process.started] = process
