"""Shows a run while it goes on, from a thread of its own: a live view in a terminal, plain lines elsewhere.

`orrery up` is the supervisor's process: a terminal that takes no output (Ctrl-S, a full pipe) must hold up this thread
and nobody else. So everything printed while a run goes on comes through here: `tell` puts a text into a queue and
returns at once. Invariant: after `close`, or the end of the `with` block, this thread writes nothing more, unless the
terminal kept it longer than CLOSE_S.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.live import Live

from deploy.cli import console
from deploy.cli.live.panels import view
from deploy.cli.live.sources import Sources
from deploy.cli.progress import PlainProgress, RunView, verdict_line
from shared.telemetry import get_logger

LOOK_S = 0.5
ASK_EVERY_S = 1.0
CLOSE_S = 3.0
UP_HINT = "Ctrl-C: stop with a checkpoint, twice: kill at once"
STOPPING_HINT = "stopping; Ctrl-C once more: kill at once"
WATCH_HINT = "Ctrl-C: leave, the run goes on"


class Display:
    """Shows the run in `run_folder` for the length of a `with` block. `extra` gives further lines, with markup."""

    def __init__(self, run_folder: Path, *, extra: Callable[[], Iterator[str]] | None = None) -> None:
        self._folder = run_folder
        self._extra = extra
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._live = LiveView(run_folder, UP_HINT) if console.out.is_terminal else None
        self._thread = threading.Thread(target=self._work, name="display", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(CLOSE_S)

    def tell(self, text: str) -> None:
        """Show a note of the supervisor; returns at once."""
        self._texts.put(text)

    def stopping(self) -> None:
        """The first Ctrl-C came: say what a second one does."""
        if self._live is not None:
            self._live.hint = STOPPING_HINT

    def _work(self) -> None:
        try:
            with self._live or contextlib.nullcontext():
                self._show(self._live or PlainProgress(self._folder))
        except OSError:
            pass  # the terminal is gone, and the run goes on
        except Exception as error:  # a picture that cannot be drawn is no reason to show nothing
            get_logger().exception("the live view failed")
            with contextlib.suppress(OSError):
                console.note(f"the live view failed ({type(error).__name__}: {error}): going on with lines")
                self._show(PlainProgress(self._folder))

    def _show(self, shown: LiveView | PlainProgress) -> None:
        while not self._closing.wait(LOOK_S):
            self._print_texts()
            shown.refresh()
        self._print_texts()
        shown.refresh(final=True)

    def _print_texts(self) -> None:
        if self._extra is not None:
            for line in self._extra():
                console.out.print(line)
        with contextlib.suppress(queue.Empty):
            while True:
                console.note(self._texts.get_nowait())


class LiveView:
    """The view that redraws itself in a terminal. Use as a context manager; `refresh` several times a second."""

    def __init__(self, run_folder: Path, hint: str) -> None:
        self.hint = hint
        self.sources = Sources(run_folder)
        self._verdicts = RunView(run_folder)
        self._verdicts.look()  # what an earlier supervisor has shown already
        self._ask_at = 0.0
        self._live = Live(console=console.out, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def refresh(self, *, final: bool = False) -> None:
        """Look, ask, draw."""
        if not final and time.monotonic() >= self._ask_at:
            self.sources.ask()
            self._ask_at = time.monotonic() + ASK_EVERY_S
        self.sources.look()
        for verdict in self._verdicts.look()[1]:
            console.out.print(verdict_line(verdict))
        self._live.update(view(self.sources.picture, "" if final else self.hint), refresh=True)
