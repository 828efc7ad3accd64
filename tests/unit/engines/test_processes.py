"""Watching processes that may be somebody else's children."""

from __future__ import annotations

import subprocess
import sys

import psutil

from shared.engines.processes import Watched


def test_the_end_of_one_is_seen_and_the_rest_are_killed() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    first, second = (subprocess.Popen(sleeper) for _ in range(2))
    watched = Watched([first.pid, second.pid], ranks=1)
    assert watched.ended() is None
    second.kill()
    second.wait()
    assert watched.ended() == f"process {second.pid}"
    watched.kill()
    assert watched.ended() == f"rank 1 (process {first.pid})"
    watched.close()
    assert watched.ended() is None
    assert not psutil.pid_exists(first.pid)


def test_a_process_that_is_gone_already_has_ended() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert Watched([ended.pid], ranks=1).ended() == f"rank 1 (process {ended.pid})"
