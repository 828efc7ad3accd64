"""Logs that tools can read and that never end a process; exit codes of a service."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from shared import service
from shared.config import RecipeError
from shared.service import EXIT_RECIPE, ServiceArguments, run_service
from shared.telemetry import LineFile, configure_logging, get_logger, log_path


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    handlers, hook = list(logging.getLogger().handlers), service.threading.excepthook
    yield
    logging.getLogger().handlers = handlers
    service.threading.excepthook = hook
    structlog.reset_defaults()


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service inside the test's own process: its stderr has no file descriptor to dump stacks to."""
    monkeypatch.setattr(service.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(service.faulthandler, "register", lambda _: None)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_replicas_file_is_named_after_it(tmp_path: Path) -> None:
    assert log_path(tmp_path, "rollout", "rollout-1") == tmp_path / "logs" / "rollout-1.jsonl"
    assert log_path(tmp_path, "controller", "controller") == tmp_path / "logs" / "controller.jsonl"
    assert log_path(tmp_path, "rollout", "left") == tmp_path / "logs" / "rollout-left.jsonl"


def test_every_line_carries_the_run_and_the_replica(tmp_path: Path) -> None:
    log = get_logger()  # taken before the configuration, as modules do
    configure_logging(tmp_path / "run-1", "rollout", "rollout-0", console=False)
    log.info("weights loaded", version=3, path=Path("x"), bad=float("nan"))
    log.debug("too small to be kept")
    logging.getLogger("library").warning("careful: %s", "hot")
    first, second = lines(tmp_path / "run-1" / "logs" / "rollout-0.jsonl")
    assert (first["run"], first["replica"], first["event"]) == ("run-1", "rollout-0", "weights loaded")
    assert (first["version"], first["bad"]) == (3, None)
    assert (second["event"], second["library"], second["replica"]) == ("careful: hot", "library", "rollout-0")


def test_an_exception_is_logged_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(tmp_path, "policy", "policy-0")
    try:
        raise ValueError("no good")
    except ValueError:
        get_logger().exception("failed", numbers={(1, 2): 3})
    (line,) = lines(tmp_path / "logs" / "policy-0.jsonl")
    assert "ValueError: no good" in str(line["exception"])
    assert "ValueError: no good" in capsys.readouterr().err


def test_a_full_disk_costs_lines_not_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LineFile(tmp_path / "log")
    whole = os.write

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_full(descriptor: int, data: bytes) -> int:
        return whole(descriptor, data[:4])

    file.write(b"before")
    for write in (full, half_full, whole):
        monkeypatch.setattr("shared.telemetry.os.write", write)
        file.write(b"line of " + write.__name__.encode())
    assert (tmp_path / "log").read_bytes() == b"before\nline\nline of write\n"
    assert file.lost == 2
    file.close()


def test_a_folder_that_cannot_be_written_leaves_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    configure_logging(tmp_path / "run", "policy", "policy-0")
    get_logger().info("still here")
    assert "still here" in capsys.readouterr().err


RECIPE = (
    '[model.build]\n[data.a]\nkind = "jsonl"\npath = "a.jsonl"\n'
    '[sft]\ndataset = "a"\nbatches = 1\nbatch_size = 1\nlr = 1e-3\n'
)


def fenced(_: ServiceArguments) -> int:
    return 4


def unusable(_: ServiceArguments) -> int:
    raise RecipeError("no such data set")


def broken(_: ServiceArguments) -> int:
    raise RuntimeError("broken")


@pytest.mark.usefixtures("_in_process")
@pytest.mark.parametrize(("main", "code"), [(fenced, 4), (unusable, EXIT_RECIPE), (broken, 1)])
def test_how_a_service_ends_is_told_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[ServiceArguments], int], code: int
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    options = ["--recipe", str(recipe), "--run-folder", str(tmp_path), "--controller", "tcp://127.0.0.1:1"]
    monkeypatch.setattr(sys, "argv", ["rollout", *options])
    with pytest.raises(SystemExit) as ended:
        run_service("rollout", main)
    assert ended.value.code == code


@pytest.mark.usefixtures("_in_process")
def test_a_bad_recipe_ends_a_service_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rollout", "--recipe", str(tmp_path / "none"), "--controller", "tcp://h:1"])
    with pytest.raises(SystemExit) as ended:
        run_service("rollout", broken)
    assert ended.value.code == EXIT_RECIPE
    assert "no recipe at" in capsys.readouterr().err
