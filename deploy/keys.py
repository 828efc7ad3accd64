"""Making the keys of the bus, and changing who is on the controller's list: what `orrery keys` and launchers call.

`shared/bus/keys.py` says which files there are. Invariants: a secret is in a file of mode 0600 from its first byte on,
in a folder of mode 0700; a file is replaced in one step, so that a controller that reads the list again finds the old
one or the new one; one command at a time changes a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.bus.errors import KeysRefused
from shared.bus.keys import (
    ALLOWED,
    CONTROLLER,
    PERSON,
    ROLES,
    SUFFIX,
    check_name,
    controller_keys,
    read_allowed,
    read_pair,
    role_of,
)


@dataclass(frozen=True)
class Entry:
    """A name on the list: who may speak with its key, and whether the key's file lies in the folder still."""

    name: str
    speaks: str
    public: str
    file: str


def make_keys(folder: Path, names: tuple[str, ...] = ROLES) -> list[str]:
    """Have the controller's key, and one for each of `names`, in `folder`; what was missing and is made, by name."""
    made = []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _changing(folder):
        if not (folder / f"{CONTROLLER}{SUFFIX}").exists():
            if (folder / ALLOWED).exists():
                raise KeysRefused(
                    f"{folder}: expected {CONTROLLER}{SUFFIX} beside {ALLOWED}, found none, and the clients' files "
                    "name its public key; put it back, or begin in another folder"
                )
            _write_pair(folder, CONTROLLER, _pair())
            made.append(CONTROLLER)
        if not (folder / ALLOWED).exists():
            _write_allowed(folder, {})
        allowed = _allowed(folder)
        made += [name for name in names if check_name(name) not in allowed]
        for name in names:
            if name not in allowed:
                _give(folder, name)
    return made


def add_key(folder: Path, name: str) -> None:
    """Put a name on the list, with a key of its own; KeysRefused if it is there."""
    check_name(name)
    with _changing(folder):
        if name in _allowed(folder):
            raise KeysRefused(f"{name} has a key in {folder}: 'orrery keys renew {name}' gives it another one")
        _give(folder, name)


def renew_key(folder: Path, name: str) -> None:
    """Give a name another key; the one before is refused from then on. For `controller`, all files are made anew."""
    with _changing(folder):
        allowed = _allowed(folder)
        if name != CONTROLLER:
            _require(folder, name, allowed)
            _give(folder, name)
            return
        pair = _pair()
        _write_pair(folder, CONTROLLER, pair)
        for known in allowed:
            path = folder / f"{known}{SUFFIX}"
            if path.exists():
                keys = read_pair(path)
                _write_pair(folder, known, (keys["public"], keys["secret"]), controller=pair[0])


def remove_key(folder: Path, name: str) -> None:
    """Take a name off the list, and delete its key."""
    with _changing(folder):
        allowed = _allowed(folder)
        _require(folder, name, allowed)
        del allowed[name]
        _write_allowed(folder, allowed)
        (folder / f"{name}{SUFFIX}").unlink(missing_ok=True)


def list_keys(folder: Path) -> list[Entry]:
    """The controller's key first, then everybody on its list."""
    _check_mode(folder)
    keys = controller_keys(folder)
    entries = [Entry(CONTROLLER, "the controller", keys.public.decode(), f"{CONTROLLER}{SUFFIX}")]
    for name, public in sorted(_allowed(folder).items()):
        path = folder / f"{name}{SUFFIX}"
        entries.append(Entry(name, _whom(name), public, path.name if path.exists() else "handed over"))
    return entries


def _whom(name: str) -> str:
    role = role_of(name)
    if role == PERSON:
        return "a person, or a launcher"
    return f"any {name}-N" if name == role else f"{name} alone"


def _require(folder: Path, name: str, allowed: Mapping[str, str]) -> None:
    if name not in allowed:
        known = ", ".join(sorted(allowed)) or "nobody"
        raise KeysRefused(f"{name} is not on the list of {folder}; on it: {known}")


def _give(folder: Path, name: str) -> None:
    """A new key for a name. Its file first: a key on the list that nobody has is worse than one not yet on it."""
    public, secret = _pair()
    _write_pair(folder, name, (public, secret), controller=controller_keys(folder).public.decode())
    _write_allowed(folder, _allowed(folder) | {name: public})


def _pair() -> tuple[str, str]:
    import zmq

    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _allowed(folder: Path) -> dict[str, str]:
    return {name: public for public, name in read_allowed(folder / ALLOWED).items()}


def _write_allowed(folder: Path, allowed: Mapping[str, str]) -> None:
    lines = [f'"{name}" = "{public}"\n' for name, public in sorted(allowed.items())]
    _replace(folder / ALLOWED, "# who may connect to the controller, by public key ('orrery keys')\n" + "".join(lines))


def _write_pair(folder: Path, name: str, pair: tuple[str, str], controller: str | None = None) -> None:
    text = f'# key of {name} on the bus: whoever reads it can speak as {name}\nname = "{name}"\n'
    text += f'public = "{pair[0]}"\nsecret = "{pair[1]}"\n'
    _replace(folder / f"{name}{SUFFIX}", text + (f'controller = "{controller}"\n' if controller else ""))


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """One process at a time, in a folder that nobody else can read."""
    _check_mode(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_mode(folder: Path) -> None:
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise KeysRefused(
            f"expected a folder of keys at {folder}, got {error.strerror}; 'orrery keys make {folder}' makes it"
        ) from None
    if mode & 0o077:
        raise KeysRefused(f"folder {folder}: expected mode 0700, got {mode:04o}; run 'chmod 700 {folder}'")


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)  # of a process with this number that was killed
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(beside, path)
