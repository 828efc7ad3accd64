"""Partitions: a run in a network namespace of its own, whose packets from and to one replica can be dropped.

All replicas of a local run share one address, so packets are told apart by the control group of the process that owns
the socket: each service process is moved into the group of its replica as soon as it appears, before it opens a
socket, and an nftables rule drops what the group's sockets send or receive. Nothing is told to either side, as if a
cable had been pulled. Wants root, `ip`, `nft`, `nsenter`, `unshare` (util-linux), and control groups version 2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.live.run import LiveRun

LOOK_S = 0.1
REMOVE_S = 10.0
TOOLS = ("ip", "nft", "nsenter", "unshare", "mount")


def why_not() -> str | None:
    """What partitions would still need here; None when they can be made."""
    if os.geteuid() != 0:
        return "partitions want root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"partitions want {', '.join(missing)} (Debian: apt install iproute2 nftables)"
    if _control_groups() is None:
        return "partitions want control groups version 2 (a cgroup2 mount)"
    return None


class Namespace:
    """One network namespace, with a control group a replica. Use as a context manager.

    A thread moves new processes of `watch`ed runs into their groups.
    """

    def __init__(self) -> None:
        self._name = f"orrery-{os.getpid()}"
        mount = _control_groups()
        assert mount is not None
        self._mount = mount
        self._groups = mount / self._name
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Namespace:
        _do("ip", "netns", "add", self._name)
        try:
            _do("ip", "-n", self._name, "link", "set", "lo", "up")
            self._nft("add table inet cut")
            self._nft("add chain inet cut out { type filter hook output priority 0; }")
            self._nft("add chain inet cut in { type filter hook input priority 0; }")
            self._groups.mkdir()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._remove_groups()
        subprocess.run(["ip", "netns", "del", self._name], check=False)

    @property
    def inside(self) -> tuple[str, ...]:
        """What starts a command in here."""
        return ("nsenter", f"--net=/run/netns/{self._name}")

    def watch(self, run: LiveRun) -> None:
        """Move the processes of `run` into the groups of their replicas, from now on."""
        self._threads.append(threading.Thread(target=self._move, args=(run,), name="groups", daemon=True))
        self._threads[-1].start()

    @contextlib.contextmanager
    def cut(self, replica: str) -> Iterator[None]:
        """Drop every packet from and to `replica` while the block runs."""
        for chain in ("out", "in"):
            self._nft(f'add rule inet cut {chain} socket cgroupv2 level 2 "{self._name}/{replica}" drop')
        try:
            yield
        finally:
            for chain in ("out", "in"):
                self._nft(f"flush chain inet cut {chain}")

    def _move(self, run: LiveRun) -> None:
        moved: set[int] = set()
        while not self._done.wait(LOOK_S):
            for process in run.processes():
                if process.pid in moved:
                    continue
                moved.add(process.pid)
                group = self._groups / process.replica
                group.mkdir(exist_ok=True)
                with contextlib.suppress(OSError):  # it has ended already
                    (group / "cgroup.procs").write_text(str(process.pid))

    def _remove_groups(self) -> None:
        """A group can go once the kernel has let go of its last process, a moment after that has ended."""
        deadline = time.monotonic() + REMOVE_S
        groups = [*self._groups.glob("*/"), self._groups] if self._groups.exists() else []
        while groups and time.monotonic() < deadline:
            try:
                groups[0].rmdir()
            except OSError:
                time.sleep(LOOK_S)
            else:
                groups.pop(0)

    def _nft(self, command: str) -> None:
        # nft looks for groups in /sys/fs/cgroup alone, where version 2 need not be mounted
        script = f"mount --bind {self._mount} /sys/fs/cgroup && exec nft -f -"
        unshare = () if self._mount == Path("/sys/fs/cgroup") else ("unshare", "--mount", "sh", "-c", script)
        subprocess.run([*self.inside, *(unshare or ("nft", "-f", "-"))], input=command, text=True, check=True)


def _control_groups() -> Path | None:
    """Where version 2 is mounted."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, where, kind, *_ = line.split()
            if kind == "cgroup2":
                return Path(where)
    return None


def _do(*command: str) -> None:
    subprocess.run(command, check=True)
