"""A partition cuts one replica off, both ways and silently, and what it sent arrives when it is healed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from benchmarks.chaos.partition import Namespace, why_not
from benchmarks.live.run import LiveRun, ServiceProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
]

# both open their sockets after a line on stdin, once they are in their groups
LISTENER = """
import socket, sys
sys.stdin.readline()
server = socket.create_server(("127.0.0.1", 7801))
print("listens", flush=True)
while True:
    connection, _ = server.accept()
    while (name := connection.recv(1)):
        print(name.decode(), flush=True)
"""
TALKER = """
import socket, sys, time
sys.stdin.readline()
connection = socket.create_connection(("127.0.0.1", 7801))
while True:
    connection.sendall(sys.argv[1].encode())
    time.sleep(0.05)
"""


class TwoProcesses(LiveRun):
    """Stands for a run: processes that are given, none of them a service."""

    def __init__(self, processes: list[ServiceProcess]) -> None:
        self._processes = processes

    def processes(self) -> list[ServiceProcess]:
        return self._processes


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def make(*command: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield make


def test_a_cut_replica_is_silent_until_it_is_healed_and_nothing_is_lost(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    with Namespace() as namespace:
        listener = start(*namespace.inside, sys.executable, "-c", LISTENER)
        talker = start(*namespace.inside, sys.executable, "-c", TALKER, "a")
        there = [
            ServiceProcess("controller", "controller", 0, listener.pid, 0.0),
            ServiceProcess("rollout", "rollout-0", 0, talker.pid, 0.0),
        ]
        namespace.watch(TwoProcesses(there))
        time.sleep(1.0)
        for process in (listener, talker):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            if process is listener:
                assert process.stdout is not None
                assert process.stdout.readline() == "listens\n"
        arrivals: list[float] = []
        threading.Thread(target=_note, args=(listener, arrivals), daemon=True).start()
        _wait_for(lambda: len(arrivals) >= 5)
        with namespace.cut("rollout-0"):
            began = time.monotonic()
            time.sleep(1.5)
            before = len(arrivals)
            assert not [at for at in arrivals if at > began + 0.2]
        # what was sent meanwhile (30 or so) and since then
        _wait_for(lambda: len(arrivals) >= before + 30)
        for process in (talker, listener):
            process.kill()
            process.wait()


def _note(listener: subprocess.Popen[str], arrivals: list[float]) -> None:
    assert listener.stdout is not None
    for _ in listener.stdout:
        arrivals.append(time.monotonic())


def _wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
