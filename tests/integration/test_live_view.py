"""What a person sees of `orrery up`: a live view in a terminal, lines elsewhere, a summary and a report at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import PATIENCE_S, ROOT, Run

pytestmark = pytest.mark.integration
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The other end of a pseudo-terminal that a command runs in."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *command],
            cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def read(self, seconds: float) -> None:
        """Take what comes for so long at most."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the last process has closed its end
                time.sleep(0.02)

    @property
    def text(self) -> str:
        """All that was shown so far, without colours and cursor movements."""
        return ESCAPES.sub("", self.seen)

    def wait_for(self, there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}; seen:\n{self.text[-4000:]}"
            self.read(0.1)

    def wait(self) -> int:
        """The command's exit code."""
        self.wait_for(lambda: self.process.poll() is not None, "the command's end")
        for _ in range(20):
            self.read(0.05)
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # the services ask the kernel to go with it
            self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(*command: str, cwd: Path) -> Iterator[Terminal]:
    it = Terminal(*command, cwd=cwd)
    try:
        yield it
    finally:
        it.close()


def test_a_terminal_shows_a_live_view_and_ctrl_c_stops_with_a_checkpoint_and_a_report(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "seen"
    sets = ("--set", "train.batches=4000", "--set", "evaluation.every=20")
    with terminal("up", str(recipe), "--run-folder", str(folder), *sets, cwd=tmp_path) as shown:
        shown.wait_for(lambda: "rollout-0" in shown.text and "reward" in shown.text, "the live view of RL")
        shown.wait_for(lambda: re.search(r"generate \d+ %", shown.text) is not None, "where time goes")
        assert "Ctrl-C: stop with a checkpoint, twice: kill at once" in shown.text
        shown.wait_for(lambda: "/4000 batches" in shown.text and "left" in shown.text, "how far it is")
        shown.wait_for(lambda: any(bar in shown.text for bar in "▂▃▅▆"), "a curve")
        os.kill(shown.process.pid, signal.SIGINT)
        shown.wait_for(lambda: "Ctrl-C once more" in shown.text, "what a second Ctrl-C does")
        assert shown.wait() == 130, shown.text[-4000:]
        end = shown.text[shown.text.rindex("audit   clean") :]
    assert "'orrery resume seen' goes on" in end
    assert (folder / "report" / "index.html").exists() and (folder / "report" / "curves.png").exists()
    assert list((folder / "checkpoints").iterdir())
    assert list((folder / "tensorboard").iterdir())


def test_two_ctrl_c_end_a_run_at_once_though_it_is_shown(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    with terminal("up", str(recipe), "--run-folder", str(folder), cwd=tmp_path) as shown:
        shown.wait_for(lambda: "policy-0" in shown.text, "the live view")
        os.kill(shown.process.pid, signal.SIGINT)
        os.kill(shown.process.pid, signal.SIGINT)
        asked = time.monotonic()
        assert shown.wait() == 130
    assert time.monotonic() - asked < 30


def test_a_terminal_that_takes_no_output_does_not_hold_up_the_run(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deaf"
    with terminal("up", str(recipe), "--run-folder", str(folder), cwd=tmp_path) as shown:
        run = Run(folder)
        run.wait_for(lambda: (folder / "export").exists(), "the end of a run that nobody looks at")
        assert shown.wait() == 0
        assert "audit   clean" in shown.text


def test_without_a_terminal_there_are_lines_and_the_same_summary(recipe: Path, new_run: NewRun) -> None:
    run = new_run().up(recipe, "evaluation.every=4")
    assert run.wait() == 0, run.story()
    said = run.outputs.read_text()
    assert "\x1b" not in said and "╭" not in said
    order = ["train  batch 10/10", "before", "after", "best", "worst", "next", "audit   clean", "report"]
    places = [re.search(rf"^ *{word}", said, re.MULTILINE).start() for word in order]  # type: ignore[union-attr]
    assert places == sorted(places), said
    page = (run.folder / "report" / "index.html").read_text()
    assert "<svg" in page and "What to try next" in page


def test_a_run_is_looked_at_from_another_terminal(recipe: Path, new_run: NewRun, tmp_path: Path) -> None:
    run = new_run().up(recipe, "train.batches=4000")
    run.wait_for_steps(40, "train")
    with terminal("status", str(run.folder), "--watch", cwd=tmp_path) as shown:
        shown.wait_for(lambda: "rollout-0" in shown.text and "policy-0" in shown.text, "the live view")
        os.kill(shown.process.pid, signal.SIGINT)
        assert shown.wait() == 0
    listed = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "mesh", "ls", str(run.folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "weights" in listed.stdout and "policy-0, rollout-0" in listed.stdout
    step = run.metrics()[-1]["step"]
    chosen = ["samples", str(run.folder), "--step", str(step), "--best", "-n", "1"]
    for_a_person, as_read = (
        subprocess.run(
            [sys.executable, "-m", "deploy.cli", *chosen, *options],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        ).stdout
        for options in ([], ["--raw"])
    )  # fmt: skip
    assert "reward" in for_a_person and "reference: " in for_a_person and "<|im_start|>user" not in for_a_person
    assert "reward" in as_read and "<|im_start|>user" in as_read
    run.kill("supervisor", signal.SIGINT)
    assert run.wait() == 130
