"""Logs of one process: JSON lines in the run folder for tools, coloured lines on stderr for a person.

Owned by the process that calls `configure_logging` once at its start; every other module takes `get_logger()`. Every
line carries the run and the replica. Logging never ends a process: a full disk or a closed terminal costs lines, which
are counted, and a line cut short by a full disk never swallows the next one. Imports neither torch nor numpy.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, cast

import msgspec
import structlog

Event = MutableMapping[str, Any]


def log_path(run_folder: Path, service: str, replica: str) -> Path:
    """Where a replica's JSON lines go: `logs/<service>-<index>.jsonl`; a service without replicas has no index."""
    name = replica if replica == service or replica.startswith(f"{service}-") else f"{service}-{replica}"
    return run_folder / "logs" / f"{name}.jsonl"


def configure_logging(
    run_folder: Path, service: str, replica: str, level: str = "INFO", *, console: bool = True
) -> None:
    """Send this process's logs to the run folder and, unless `console` is off, to stderr.

    `run_folder.name` is the run's id. `level` is a name of the standard library's ("DEBUG", "INFO", ...). Warnings of
    libraries that use `logging` take the same way.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    path = log_path(run_folder, service, replica)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: LineFile | None = LineFile(path)
    except OSError as error:
        _tell_stderr(f"logs cannot be written to {path}: {error}; going on without them\n")
        lines = None
    bound = {"run": run_folder.resolve().name, "replica": replica}
    _set_up(_Outputs(lines, console), number, bound)


def log_to_stderr() -> None:
    """For a command whose answer goes to stdout, and which belongs to no run: logs are for the person alone."""
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger: `log.info("weights loaded", version=3, seconds=0.4)`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger())


class LineFile:
    """Appends whole lines to a file with one write each, so that a kill -9 loses no line that was logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._torn = False

    def write(self, line: bytes) -> None:
        """Append `line` (without its newline). A line that the disk refuses is counted in `lost`, never raised."""
        wanted = (b"\n" if self._torn else b"") + line + b"\n"
        try:
            written = os.write(self._descriptor, wanted)
        except OSError as error:
            if self.lost == 0:
                _tell_stderr(f"logs cannot be written to {self.path}: {error}; going on, lines are lost\n")
            self.lost += 1
            return
        if written < len(wanted):
            self._torn = True
            self.lost += 1
        else:
            self._torn = False

    def close(self) -> None:
        """Close the file; later lines are counted as lost."""
        os.close(self._descriptor)
        self._descriptor = -1


class _Outputs:
    """The end of structlog's chain: both renderings of one event, each written if it can be."""

    def __init__(self, lines: LineFile | None, console: bool) -> None:
        self._lines = lines
        self._console = console
        colours = not os.environ.get("NO_COLOR") and (sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR")))
        self._human = structlog.dev.ConsoleRenderer(
            # the richer formatter prints local variables: whole tensors
            colors=colours,
            pad_event_to=0,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )

    def render(self, _logger: object, method: str, event: Event) -> tuple[tuple[Event], dict[str, Any]]:
        """Last processor: hands the event itself to `write`, which structlog calls as the logger's method."""
        return (event,), {}

    def write(self, event: Event) -> None:
        if self._lines is not None:
            first = {"time": event["timestamp"], "level": event["level"], "event": event["event"]}
            flat = first | {key: value for key, value in event.items() if key not in ("exc_info", "timestamp")}
            if event.get("exc_info"):
                flat["exception"] = structlog.processors.ExceptionRenderer()(None, "", dict(event))["exception"]
            if self._lines.lost:
                flat["lines_lost"] = self._lines.lost
            self._lines.write(_as_json(flat))
        if self._console:
            shown = {key: value for key, value in event.items() if key != "run"}
            shown["timestamp"] = str(shown["timestamp"])[11:23]
            _tell_stderr(str(self._human(None, "", shown)).rstrip("\n") + "\n")

    debug = info = warning = error = critical = exception = msg = write


class _LibraryRecords(logging.Handler):
    """Takes what libraries say through `logging` (transformers, asyncio) into the same two outputs."""

    def emit(self, record: logging.LogRecord) -> None:
        log = get_logger().bind(library=record.name)
        try:
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)
        except Exception:  # a logging handler must not raise into the library that logged
            self.handleError(record)


def _set_up(outputs: _Outputs, level: int, bound: dict[str, str]) -> None:
    # run and replica are added by a processor: context variables would not reach the bus thread
    def add_bound(_logger: object, _method: str, event: Event) -> Event:
        return {**bound, **event}

    # cached loggers of an earlier configuration would go on writing to its file
    structlog.reset_defaults()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _exception_info,
            add_bound,
            cast(Callable[..., Any], outputs.render),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: outputs,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _LibraryRecords):
            root.removeHandler(handler)
    root.addHandler(_LibraryRecords(level=logging.WARNING))


def _exception_info(_logger: object, _method: str, event: Event) -> Event:
    """Replace `exc_info=True` by the exception itself while it is still the current one."""
    if event.get("exc_info") is True:
        event["exc_info"] = sys.exc_info()
    return event


def _as_json(event: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=repr)
    except (TypeError, ValueError):  # a map with keys that JSON does not know
        return msgspec.json.encode({str(key): repr(value) for key, value in event.items()})


def _tell_stderr(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # the terminal is gone; the JSON lines remain
