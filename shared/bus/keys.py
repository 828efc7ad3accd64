"""Keys of the bus: which files hold them, who may speak with which, and what is wrong with one that cannot be used.

    FOLDER/controller.key    the controller's pair
    FOLDER/allowed.keys      the controller's list: a public key for each name
    FOLDER/NAME.key          the pair of NAME, and the controller's public key: all that a client needs

A name is a role (`rollout`: any replica of it, as an elastic fleet wants), one replica (`rollout-1`: that alone), or a
person (`person`, `person-alice`). `ORRERY_KEYS` or `bus.keys` say where they lie; either may also name one client's
file. Invariant: what others could read or replace is not used. Files are made by `orrery keys` (deploy/keys.py).
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bus.errors import KeysRefused

if TYPE_CHECKING:
    import zmq

VARIABLE = "ORRERY_KEYS"
CONTROLLER = "controller"
PERSON = "person"
ROLES = ("policy", "rollout", "evaluator", PERSON)
ALLOWED = "allowed.keys"
SUFFIX = ".key"

_NAME = re.compile(rf"({'|'.join(ROLES)})(-[A-Za-z0-9_.]+)*")
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
"""Z85 of 32 bytes."""


@dataclass(frozen=True)
class ControllerKeys:
    """The pair that a controller shows, and where its list of public keys lies."""

    public: bytes
    secret: bytes
    allowed: Path

    def configure(self, socket: zmq.Socket[Any]) -> None:
        """Have a socket that will be bound speak CURVE only, with whom the gate (`shared.bus.gate`) lets in."""
        import zmq

        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, self.public)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)


@dataclass(frozen=True)
class ClientKeys:
    """The pair of a name, and the public key that the controller must show."""

    name: str
    public: bytes
    secret: bytes
    controller: bytes

    def configure(self, socket: zmq.Socket[Any]) -> None:
        """Have a socket that will be connected speak CURVE, with this controller only."""
        import zmq

        socket.set(zmq.CURVE_SERVERKEY, self.controller)
        socket.set(zmq.CURVE_PUBLICKEY, self.public)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)


def keys_place(configured: str | None) -> Path | None:
    """Where this process finds its keys: `ORRERY_KEYS`, else `bus.keys` of the recipe; None if it has none."""
    place = os.environ.get(VARIABLE) or configured
    return Path(place).expanduser().absolute() if place else None


def check_name(name: str) -> str:
    """`name`, if a key may have it; KeysRefused otherwise."""
    if _NAME.fullmatch(name) is None:
        raise KeysRefused(
            f"{name!r} cannot have a key: expected a role ({', '.join(ROLES)}), a replica such as rollout-1, or a "
            "person such as person-alice"
        )
    return name


def role_of(name: str) -> str:
    """The role that a key's, or a replica's, name begins with."""
    return name.partition("-")[0]


def speaks_for(name: str, sender: str) -> bool:
    """Whether the key `name` may speak as `sender`: its own name, any replica of its role, or a person's questions."""
    role = role_of(name)
    if role == PERSON:
        return sender == PERSON
    if name == role:
        return role_of(sender) == role and sender != role
    return sender == name


def controller_keys(folder: Path) -> ControllerKeys:
    """The controller's keys in a folder; KeysRefused."""
    if not folder.is_dir():
        raise KeysRefused(
            f"keys of the controller: expected a folder at {folder}, found none; 'orrery keys make {folder}' makes it"
        )
    pair = read_pair(folder / f"{CONTROLLER}{SUFFIX}")
    if pair["name"] != CONTROLLER:
        raise KeysRefused(f"{folder / CONTROLLER}{SUFFIX}: expected the controller's key, got that of {pair['name']}")
    keys = ControllerKeys(pair["public"].encode(), pair["secret"].encode(), folder / ALLOWED)
    read_allowed(keys.allowed)
    return keys


def client_keys(place: Path, sender: str) -> ClientKeys:
    """The key with which `sender` (a replica, or a person) connects: its own, else that of its role; KeysRefused."""
    path = place
    if place.is_dir():
        candidates = [place / f"{name}{SUFFIX}" for name in dict.fromkeys((sender, role_of(sender)))]
        path = next((path for path in candidates if path.exists()), candidates[-1])
    pair = read_pair(path)
    if not speaks_for(pair["name"], sender):
        raise KeysRefused(
            f"{path}: expected a key of {sender} or {role_of(sender)}, got that of {pair['name']}, which the "
            f"controller would refuse; 'orrery keys add {sender}' makes one"
        )
    if "controller" not in pair:
        raise KeysRefused(f"{path}: expected the controller's public key in it, found none; make the key again")
    return ClientKeys(pair["name"], pair["public"].encode(), pair["secret"].encode(), pair["controller"].encode())


def read_allowed(path: Path) -> dict[str, str]:
    """The controller's list: names by public key. KeysRefused."""
    tree = _read(path)
    names: dict[str, str] = {}
    for name, public in tree.items():
        check_name(name)
        if not isinstance(public, str) or _KEY.fullmatch(public) is None:
            raise KeysRefused(f"{path}: expected a public key of 40 characters for {name}, got {public!r}")
        if public in names:
            raise KeysRefused(f"{path}: expected a key of its own for each name, {name} and {names[public]} share one")
        names[public] = name
    return names


def read_pair(path: Path) -> dict[str, str]:
    """What a key's file says: name, public, secret and, but for the controller's own, controller. KeysRefused."""
    tree = _read(path)
    for field in ("name", "public", "secret"):
        if field not in tree:
            raise KeysRefused(f"{path}: expected name, public and secret, found no {field}; it is no key of the bus")
    for field, value in tree.items():
        fits = isinstance(value, str) and (field == "name" or _KEY.fullmatch(value) is not None)
        if field not in ("name", "public", "secret", "controller") or not fits:
            raise KeysRefused(f"{path}: expected a name and keys of 40 characters, not so {field}; make the key again")
    if tree["name"] != CONTROLLER:
        check_name(tree["name"])
    return tree


def _read(path: Path) -> dict[str, Any]:
    """A file of keys, once it is sure that nobody else can read or replace it."""
    try:
        _check_folder(path.parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _check_file(path, os.fstat(descriptor))
            return tomllib.loads(file.read().decode())
    except FileNotFoundError:
        raise KeysRefused(
            f"expected a file of keys at {path}, found none; 'orrery keys make {path.parent}' makes what is missing, "
            f"bus.keys or {VARIABLE} say where keys lie"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):  # whose text might quote the secret
        raise KeysRefused(f"{path}: expected a file made by 'orrery keys', got something else; make it again") from None
    except OSError as error:
        raise KeysRefused(f"{path} cannot be read: {error.strerror}; it must be of the user that runs this") from None


def _check_folder(folder: Path) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        raise KeysRefused(
            f"folder {folder}: expected mode 0700, got {mode:04o}: others could replace keys; run 'chmod 700 {folder}'"
        )


def _check_file(path: Path, about: os.stat_result) -> None:
    mode = stat.S_IMODE(about.st_mode)
    if not stat.S_ISREG(about.st_mode):
        raise KeysRefused(f"{path}: expected a regular file with mode 0600")
    if mode & 0o077:
        raise KeysRefused(f"{path}: expected mode 0600, got {mode:04o}: others could use it; run 'chmod 600 {path}'")
    if about.st_uid not in (os.geteuid(), 0):
        raise KeysRefused(f"{path}: expected a file of user {os.geteuid()}, got one of user {about.st_uid}")
