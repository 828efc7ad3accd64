"""Meshes of real processes over loopback, with the rendezvous store in the test."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shared.messages import StoreGet, StoreSet, StoreValue

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


class StoreServer:
    """Keeps rendezvous values as the controller does: a question waits for its value, at most as long as it says."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            while head := stream.read(4):
                question = msgspec.msgpack.decode(stream.read(struct.unpack("<I", head)[0]), type=StoreSet | StoreGet)
                with self.changed:
                    if isinstance(question, StoreSet):
                        self.values[question.key] = question.value
                        self.changed.notify_all()
                    else:
                        self.changed.wait_for(lambda key=question.key: key in self.values, question.timeout_s)
                    value = self.values.get(question.key)
                body = msgspec.msgpack.encode(StoreValue(epoch=question.epoch, key=question.key, value=value))
                stream.write(struct.pack("<I", len(body)) + body)
                stream.flush()


class Member:
    """A process that runs mesh_member.py; its lines, read with a limit."""

    def __init__(self, port: int, rank: int, size: int, task: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mesh_member.py")), str(port), str(rank), str(size), task],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._buffer = b""

    def line(self) -> list[str]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the member said nothing for {PATIENCE_S} s"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, f"the member ended with code {self.process.wait(PATIENCE_S)}"
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode().split(" ", 2)

    def release(self) -> None:
        self.process.stdin.write(b"go\n")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def store() -> Iterator[StoreServer]:
    server = StoreServer()
    yield server
    server.listener.close()


@pytest.fixture
def members(store: StoreServer) -> Iterator:
    started: list[Member] = []

    def start(size: int, task: str, present: int | None = None) -> list[Member]:
        started.extend(Member(store.port, rank, size, task) for rank in range(present or size))
        return started

    yield start
    for member in started:
        member.end()


def test_three_processes_broadcast_sum_and_pass_tensors(members) -> None:
    group = members(3, "collectives")
    for rank, member in enumerate(group):
        assert member.line() == ["formed"]
        assert member.line() == ["sum", "3.0"]
        assert member.line() == ["float8", "1.5"]
        assert member.line() == ["token", "41" if rank == 1 else str(rank)]
    assert [member.process.wait(PATIENCE_S) for member in group] == [0, 0, 0]


def test_the_keys_of_the_rendezvous_carry_the_unique_id(members, store) -> None:
    for member in members(2, "collectives"):
        assert member.line() == ["formed"]
    assert store.values
    assert all(key.startswith(b"once".hex()) for key in store.values)


@pytest.mark.parametrize("task", ["abort", "abort_recv"])
def test_abort_ends_a_blocked_wait_within_a_second(members, task) -> None:
    group = members(2, task)
    assert [member.line() for member in group] == [["formed"], ["formed"]]
    kind, seconds, text = group[0].line()
    assert kind == "error"
    assert float(seconds) < 1.3
    assert "revoked by the test" in text
    assert group[0].line()[0] == "spent"
    assert group[0].process.wait(PATIENCE_S) == 0
    group[1].release()
    assert group[1].process.wait(PATIENCE_S) == 0


def test_a_killed_member_is_an_error_to_who_waits_for_it(members) -> None:
    group = members(3, "killed")
    assert [member.line() for member in group] == [["formed"]] * 3
    os.kill(group[1].process.pid, signal.SIGKILL)
    for member in (group[0], group[2]):
        kind, seconds, text = member.line()
        assert kind == "error"
        assert float(seconds) < 10
        assert "member-1 (mesh rank 1)" in text


def test_an_operation_that_nobody_joins_ends_at_its_timeout(members) -> None:
    group = members(2, "timeout")
    assert [member.line() for member in group] == [["formed"]] * 2
    kind, seconds, text = group[0].line()
    assert kind == "error"
    assert 1.5 < float(seconds) < 5
    assert "member-0 (mesh rank 0) waited for a broadcast from member-1 (mesh rank 1) (up to 2 s)" in text


def test_forming_without_a_member_ends_at_its_timeout_and_names_it(members) -> None:
    (alone,) = members(2, "absent", present=1)
    kind, seconds, text = alone.line()
    assert kind == "error"
    assert 1.5 < float(seconds) < 6
    assert "waited 2 s for member-1 to join" in text


def test_weights_arrive_as_staged_with_equal_digests(members) -> None:
    group = members(2, "weights")
    assert [member.line() for member in group] == [["formed"]] * 2
    assert int(group[0].line()[1]) > 300 * 200 * 6
    digests = {member.line()[1] for member in group}
    assert len(digests) == 1
    assert group[1].line() == ["checked", *digests]
