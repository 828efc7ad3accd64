"""What this machine can run: each check gives one finding, and how to mend it. Nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.local.environments import SOURCE, python_for
from shared.config import RecipeError
from shared.nccl.library import NcclError, find, open_library

NEEDED = {
    "torch": "policy and rollouts",
    "transformers": "policy and rollouts",
    "safetensors": "weights and checkpoints",
    "numpy": "policy and rollouts",
    "pyzmq": "the bus",
}
OPTIONAL = {
    "reasoning-gym": ("generated tasks with verifiers", "pip install 'orrery[data]'"),
    "datasets": ("Hugging Face data sets", "pip install 'orrery[data]'"),
    "pyarrow": ("parquet files", "pip install 'orrery[data]'"),
    "math-verify": ('the reward kind "math"', "pip install math-verify"),
    "matplotlib": ("curves in reports", "pip install 'orrery[cli]'"),
    "tensorboard": ("looking at RUN/tensorboard", "pip install tensorboard"),
    "wandb": ("[metrics.wandb]", "pip install 'orrery[wandb]'"),
    "prometheus-client": ("metrics.prometheus_port", "pip install 'orrery[prometheus]'"),
}
ENGINE_VERSIONS = """
import importlib, importlib.metadata as known, sys
engine = sys.argv[1]
for name in ("torch", "transformers", "zmq", "msgspec", engine):
    importlib.import_module(name)
importlib.import_module(f"shared.engines.{engine}")
names = [name for name in (engine, f"{engine}-cpu") if any(d.metadata["Name"] == name for d in known.distributions())]
print(", ".join(f"{name} {known.version(name)}" for name in (*names, "torch", "transformers")))
"""
"""Imports what a rollout with the engine needs, in the engine's environment, and prints versions."""
MEMORY_GB = 4.0
DISK_GB = 2.0
SHM_MB = 64.0
State = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """`missing` keeps a run from working, `note` takes something away; `advice` is how to get it."""

    state: State
    what: str
    detail: str
    advice: str = ""


def look(runs: Path) -> Iterator[Finding]:
    """Every finding, the machine first, then packages, then what a run needs of the system."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _cores_and_memory,
        _gpus,
        _nccl,
        _needed_packages,
        _optional_packages,
        _engines,
        lambda: _disk(runs),
        _loopback,
        _shared_memory,
        _open_files,
    )
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("ok" if good else "missing", "python", version, "" if good else "install Python 3.11 or newer")
    linux = sys.platform.startswith("linux")
    yield Finding(
        "ok" if linux else "missing", "system", sys.platform, "" if linux else "the local launcher needs Linux (pidfd)"
    )


def _cores_and_memory() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok" if cores >= 2 else "note", "cores", str(cores), "" if cores >= 2 else "runs, but slowly")
    memory = _memory_gb()
    if memory is not None:
        enough = memory >= MEMORY_GB
        advice = "" if enough else f"the quickstart wants {MEMORY_GB:g} GB: end other programs"
        yield Finding("ok" if enough else "note", "memory free", f"{memory:.1f} GB", advice)


def _memory_gb() -> float | None:
    """MemAvailable, or what the container's limit leaves, whichever is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit
    return free / 1e9


def _gpus() -> Iterator[Finding]:
    command = shutil.which("nvidia-smi")
    if command is None:
        yield Finding("note", "GPU", "none found", "everything runs on CPUs; larger models want a GPU")
        return
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("note", "GPU", f"nvidia-smi fails: {error}", "check the driver")
        return
    for line in told.strip().splitlines():
        yield Finding("ok", "GPU", f"{line} (for policies, vLLM and SGLang)")


def _nccl() -> Iterator[Finding]:
    """Which libnccl this environment's services would load, and mint ids with."""
    try:
        library = open_library(find())
    except NcclError as error:
        first = str(error).partition(";")[0]
        advice = "pip install nvidia-nccl-cu13, or set weights.nccl_library"
        yield Finding("note", "NCCL", f"{first}; for weights.backend = 'nccl' or 'auto'", advice)
        return
    yield Finding("ok", "NCCL", f"{library.version} at {library.path}")


def _needed_packages() -> Iterator[Finding]:
    for name, use in NEEDED.items():
        version = _version(name)
        if version is None:
            yield Finding(
                "missing", name, f"not installed; needed by {use}", "pip install -c requirements.lock 'orrery[all]'"
            )
        else:
            yield Finding("ok", name, version)


def _optional_packages() -> Iterator[Finding]:
    for name, (use, command) in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Finding("note", name, f"not installed; for {use}", command)
        else:
            yield Finding("ok", name, version)


def _engines() -> Iterator[Finding]:
    """Engines with an environment of their own: does it start, and which versions has it?"""
    for engine in ("vllm", "sglang"):
        try:
            python = python_for(engine)
        except RecipeError:
            yield Finding("note", engine, f"no environment; for rollout.engine = {engine!r}", f"make env-{engine}")
            continue
        try:
            told = subprocess.run(
                [python, "-c", ENGINE_VERSIONS, engine],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
                cwd=SOURCE,
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            advice = f"rm -rf .venv-{engine}; make env-{engine}"
            yield Finding("note", engine, f"its environment is broken: {str(why).strip().splitlines()[-1]}", advice)
            continue
        yield Finding("ok", engine, told.strip())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk(runs: Path) -> Iterator[Finding]:
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    advice = f"a run's checkpoints and logs need room: free some, or set run.folder (looked at {place})"
    yield Finding(
        "ok" if free >= DISK_GB else "missing", "disk free", f"{free:.1f} GB", "" if free >= DISK_GB else advice
    )
    if not os.access(place, os.W_OK):
        yield Finding("missing", "run folders", f"{place} cannot be written to", "set run.folder to a folder of yours")


def _loopback() -> Iterator[Finding]:
    try:
        with socket.socket() as listening, socket.socket() as connecting:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            connecting.settimeout(2.0)
            connecting.connect(listening.getsockname())
        names = {name for _, name in socket.if_nameindex()}
    except OSError as error:
        yield Finding("missing", "loopback", f"no connection to 127.0.0.1: {error}", "ip link set lo up")
        return
    if "lo" in names:
        yield Finding("ok", "loopback", "ports can be opened and reached; interface lo")
    else:
        yield Finding(
            "note", "loopback", f"interfaces: {', '.join(sorted(names))}", "set weights.interface to one of them"
        )


def _shared_memory() -> Iterator[Finding]:
    try:
        free = shutil.disk_usage("/dev/shm").free / 1e6
    except OSError:
        yield Finding("note", "/dev/shm", "not there", "mount -t tmpfs tmpfs /dev/shm")
        return
    enough = free >= SHM_MB
    advice = "" if enough else "docker run --shm-size=1g"
    yield Finding("ok" if enough else "note", "/dev/shm free", f"{free:.0f} MB", advice)


def _open_files() -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 1024
    yield Finding("ok" if enough else "note", "open files", f"{soft} (of {hard})", "" if enough else "ulimit -n 4096")
