"""Watching processes that may be somebody else's children."""

from __future__ import annotations

import subprocess
import sys

import psutil

from shared.engines.processes import Watched


def test_the_end_of_one_is_seen_and_the_rest_are_killed() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    first, second = (subprocess.Popen(sleeper) for _ in range(2))
    watched = Watched([first.pid, second.pid])
    assert watched.ended() is None
    second.kill()
    second.wait()
    assert watched.ended() == second.pid
    watched.kill()
    assert watched.ended() in (first.pid, second.pid)
    watched.close()
    assert watched.ended() is None
    assert not psutil.pid_exists(first.pid)


def test_a_process_that_is_gone_already_has_ended() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert Watched([ended.pid]).ended() == ended.pid
