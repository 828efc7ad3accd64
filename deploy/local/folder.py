"""Run folders: making them, finding them, and the lock that lets one supervisor at a time own one.

`orrery up` creates, every other command finds. Invariant: while a supervisor lives, it holds an exclusive flock on
`supervisor.pid`; the kernel drops the lock with the process, so a stale file never blocks anybody.
"""

from __future__ import annotations

import datetime
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.config import Recipe, RecipeError, dump_recipe, load_recipe

_LOCK = "supervisor.pid"
_LAUNCHER = "launcher"
KEYS = "keys"
"""Where in a run folder keys are made when neither the recipe nor ORRERY_KEYS says where they are."""
CHANGEABLE = (
    "policy.parallel.",
    "policy.nodes",
    "policy.threads",
    "policy.micro_batch_tokens",
    "policy.gradient_checkpointing",
    "policy.compile",
    "policy.optimizer_offload",
)
"""How a policy computes, not what: keys, or tables, that may differ from one start of a run to the next."""


class RunBusyError(Exception):
    """Another supervisor owns this run."""


class RunFolderError(Exception):
    """A run folder cannot be made or written."""

    def __init__(self, folder: Path, error: OSError) -> None:
        got = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        super().__init__(
            f"run folder {folder}: expected a folder that can be made and written, got {got}; mend its rights, free "
            "space, or give another place with --run-folder or run.folder"
        )


def create_run(recipe: Recipe, folder: Path | None = None) -> Path:
    """A new run folder holding the resolved recipe as `config.toml`; `runs/latest` points to it from now on.

    Without `folder` it is `<run.folder>/<name>-<date>-<time>`, with a number added if that is taken. A given `folder`
    must not hold a run already (FileExistsError). RunFolderError if it cannot be made.
    """
    if folder is not None and (folder / "config.toml").exists():
        raise FileExistsError(f"{folder} holds a run already: use 'orrery resume {folder}' or another folder")
    try:
        if folder is None:
            folder = _unused(Path(recipe.run.folder), recipe.run.name)
        folder.mkdir(parents=True, exist_ok=True)
        keep_recipe(recipe, folder)
        _point_latest(folder)
    except OSError as error:
        raise RunFolderError(folder or Path(recipe.run.folder), error) from error
    return folder


def change_recipe(folder: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run in `folder`, which nobody runs now, with `overrides` applied for good.

    Only `CHANGEABLE` may differ between two starts of a run: anything else decides what the run is. RecipeError for
    other keys, RunFolderError.
    """
    recipe = load_recipe(folder / "config.toml", overrides)
    was, now = (_leaves(each.model_dump()) for each in (load_recipe(folder / "config.toml"), recipe))
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key) and not key.startswith(CHANGEABLE):
            raise RecipeError(
                f"{key}: expected {was.get(key)!r}, which the run began with, got {now.get(key)!r}; between two starts "
                f"only {', '.join(CHANGEABLE)} may change ('orrery set' changes live values of a run that is running)"
            )
    try:
        keep_recipe(recipe, folder)
    except OSError as error:
        raise RunFolderError(folder, error) from error
    return recipe


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Replace the resolved recipe of a run folder, in one step."""
    partial = folder / "config.toml.partial"
    partial.write_text(dump_recipe(recipe), encoding="utf-8")
    partial.replace(folder / "config.toml")


def keep_keys(recipe: Recipe, folder: Path, keys: Path) -> None:
    """Have the recipe of a run folder say where the run's keys lie, for whoever asks its controller."""
    bus = recipe.bus.model_copy(update={"keys": str(keys)})
    keep_recipe(recipe.model_copy(update={"bus": bus}), folder)


def _leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def note_launcher(folder: Path, name: str) -> None:
    """Keep what starts this run's processes, for who goes on with it, or ends it."""
    try:
        (folder / _LAUNCHER).write_text(f"{name}\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(folder, error) from error


def launcher_of(folder: Path) -> str:
    """What started this run's processes last: "local" where nothing else is noted."""
    try:
        return (folder / _LAUNCHER).read_text(encoding="utf-8").strip() or "local"
    except FileNotFoundError:
        return "local"


def newest_run(runs: Path) -> Path | None:
    """What `runs/latest` points to, if it is a run."""
    latest = runs / "latest"
    return latest.resolve() if (latest / "config.toml").exists() else None


def holder(folder: Path) -> int | None:
    """The process id of the supervisor that owns this run now, or None."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(descriptor, 32).strip()
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)


class RunLock:
    """Ownership of a run for the length of a `with` block; RunBusyError if somebody else has it, or RunFolderError."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunFolderError(self._path.parent, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise RunBusyError(
                f"{self._path.parent} is already run by process {owner}: stop it with 'orrery down {self._path.parent}'"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _unused(runs: Path, name: str) -> Path:
    stamp = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        folder = runs / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{runs} has a thousand runs named {name}-{stamp}: remove some")


def _point_latest(folder: Path) -> None:
    """Replace the `latest` symlink beside `folder` in one step, so that a reader always finds one."""
    fresh = folder.parent / f".latest-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    fresh.replace(folder.parent / "latest")
