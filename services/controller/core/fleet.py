"""The fleet: a replica's life.

    joining -> loading -> stale -> ready -> draining -> left           any live state -> lost

- joining: some of its ranks have registered (an engine's workers do when it has started); loading: all have, and it
  was asked for its model;
- stale: the model stands but its weights are not the published ones; ready: they were, and their digest was checked
  (a policy is ready when it holds the committed state, and stale while others do and it does not);
- *busy* is not a state of its own: a ready replica with leases or a step in hand is busy.

The transition that must not exist: lost -> ready. What comes back after a loss is a new incarnation that starts at
joining and can only become ready through stale and a weight sync (a policy: by loading, by receiving another's state,
or by proving at registration that it still holds the committed one).

Ranks live and die together: the loss of one is the replica's. A process that was lost alone proves by registering that
it lives; one of several proves it of itself alone, so that a lost replica of several ranks comes back as new processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from shared.messages import DatasetIdentity, Device, MeshMember, Position, Register, Role

ReplicaState = Literal["joining", "loading", "stale", "ready", "draining", "left", "lost"]
STARTS_KEPT = 64
"""Former starts of a replica that are remembered as such."""
LIVE: tuple[ReplicaState, ...] = ("joining", "loading", "stale", "ready", "draining")


class Replica(msgspec.Struct):
    """One incarnation of a replica. `position` is what it holds, as acknowledged; None: nothing usable.

    `nonce` is that of its start, which its ranks share; `pids` are the processes of those that have registered, by
    rank; `absent` are the ones among them that this term has not heard from.
    `doubtful`: a transfer to it was given up, so its engine may sample with weights that nobody has compared; a policy:
    what it holds differs from what the others hold, and it has yet to forget that.
    `answered` is when it last reported or returned a group. `devices` are its ranks' GPUs, by rank.
    """

    name: str
    role: Role
    incarnation: int
    world: int
    nonce: int
    pids: dict[int, int]
    host: str
    state: ReplicaState
    since: float
    position: Position | None = None
    confirmed: bool = True
    deadline: float | None = None
    doubtful: bool = False
    answered: float = 0.0
    absent: list[int] = []
    devices: dict[int, Device] = {}

    @property
    def live(self) -> bool:
        """Whether this incarnation may still act."""
        return self.state in LIVE

    @property
    def missing(self) -> list[int]:
        """Its ranks that have yet to register, in this term."""
        return [rank for rank in range(self.world) if rank not in self.pids or rank in self.absent]

    @property
    def member(self) -> MeshMember:
        """It as a member of a mesh."""
        return MeshMember(self.name, self.incarnation, 0)

    @property
    def sources(self) -> list[MeshMember]:
        """Its ranks that weights come from: each of a policy's has a part of them, an engine's rank 0 has them all."""
        ranks = range(self.world if self.role == "policy" else 1)
        return [MeshMember(self.name, self.incarnation, rank) for rank in ranks]


class Fleet(msgspec.Struct):
    """Every replica that the run has seen, by name, in its latest incarnation; and the data sets they agreed on.

    `shelves` index the live ones by role, state and what they hold, so that no event has to look at all of them:
    state, position and `confirmed` of a replica change through the fleet only. `starts` are the last nonces of each
    replica, the newest one last: an older process never takes its name back. `leaving` are live ones that were asked
    to go, with the cause, and are not draining yet.
    """

    replicas: dict[str, Replica] = {}
    shelves: dict[str, dict[str, None]] = {}
    datasets: dict[str, DatasetIdentity] = {}
    starts: dict[str, list[int]] = {}
    leaving: dict[str, str] = {}

    def live(self, role: Role | None = None) -> list[Replica]:
        """The live replicas (of a role), by name."""
        return self._on_shelves(lambda key: role is None or key.startswith(f"{role} "))

    def ready(self, role: Role) -> list[Replica]:
        """The replicas of a role that may be given work: ready, and heard from in this term."""
        return self._on_shelves(lambda key: key.startswith(f"{role} ready confirmed "))

    def ready_count(self, role: Role) -> int:
        """How many `ready` would list."""
        return sum(len(shelf) for key, shelf in self.shelves.items() if key.startswith(f"{role} ready confirmed "))

    def behind(self, role: Role, committed: Position) -> list[Replica]:
        """Those of a role whose engine stands, heard from in this term, that hold other weights than the committed."""
        loaded = (f"{role} stale confirmed ", f"{role} ready confirmed ")
        current = f" {_weights(committed)}"
        return self._on_shelves(lambda key: key.startswith(loaded) and not key.endswith(current))

    def anyone_holds(self, role: Role, lineage: int, version: int) -> bool:
        """Whether a replica of a role that was ready holds these weights, be it unconfirmed in this term."""
        wanted = f" {lineage}/{version}"
        return any(key.startswith(f"{role} ready ") and key.endswith(wanted) for key in self.shelves)

    def newest_ready(self, role: Role, lineage: int) -> int | None:
        """The newest version of a lineage that a ready replica of a role holds."""
        start = f"{role} ready confirmed {lineage}/"
        return max((int(key.removeprefix(start)) for key in self.shelves if key.startswith(start)), default=None)

    def is_current(self, name: str, incarnation: int) -> bool:
        """Whether this incarnation is the live one of that name."""
        replica = self.replicas.get(name)
        return replica is not None and replica.live and replica.incarnation == incarnation

    def goes(self, replica: Replica) -> bool:
        """Whether a replica is draining, or was asked to leave."""
        return replica.state == "draining" or replica.name in self.leaving

    def dataset_conflict(self, register: Register) -> tuple[DatasetIdentity, DatasetIdentity] | None:
        """(expected, got) of the first data set that differs from what the first registrant saw."""
        for seen in register.datasets:
            known = self.datasets.get(seen.name)
            if known is not None and known != seen:
                return known, seen
        return None

    def nccl_conflict(self, register: Register) -> tuple[Replica, str] | None:
        """A live replica that has loaded another NCCL than this rank has, and which."""
        if register.device is None:
            return None
        for replica in self.live():
            for rank, device in replica.devices.items():
                itself = (replica.name, rank) == (register.replica, register.rank)
                if device.nccl != register.device.nccl and not itself:
                    return replica, device.nccl
        return None

    def superseded(self, register: Register) -> bool:
        """Whether a newer start has this replica's name, or the one of this rank was lost, and had several ranks."""
        replica = self.replicas.get(register.replica)
        over = replica is not None and not replica.live and replica.world > 1 and replica.nonce == register.nonce
        return over or register.nonce in self.starts.get(register.replica, [])[:-1]

    def knows(self, register: Register) -> bool:
        """Whether this very start has registered before, in whatever incarnation."""
        return register.nonce in self.starts.get(register.replica, ())

    def same_start(self, register: Register) -> Replica | None:
        """The live replica that this registration is of: its rank comes back, or comes to join the others."""
        replica = self.replicas.get(register.replica)
        return replica if replica is not None and replica.live and replica.nonce == register.nonce else None

    def enter(self, register: Register, at: float) -> Replica:
        """A new incarnation begins with this rank."""
        before = self.replicas.get(register.replica)
        replica = Replica(
            name=register.replica,
            role=register.role,
            incarnation=before.incarnation + 1 if before else 1,
            world=register.world,
            nonce=register.nonce,
            pids={register.rank: register.pid},
            host=register.host,
            state="joining",
            since=at,
            devices=_devices(register),
        )
        self.replicas[replica.name] = replica
        self._shelve(replica)
        starts = self.starts.setdefault(register.replica, [])
        if register.nonce not in starts:
            starts.append(register.nonce)
        del starts[:-STARTS_KEPT]
        for seen in register.datasets:
            self.datasets.setdefault(seen.name, seen)
        return replica

    def hear(self, replica: Replica, register: Register) -> None:
        """A rank of a live replica is there, for the first time or in a new term."""
        replica.pids[register.rank] = register.pid
        replica.devices |= _devices(register)
        if register.rank in replica.absent:
            replica.absent.remove(register.rank)

    def doubt(self, replica: Replica, until: float) -> None:
        """A new term: each rank of a live replica has until then to be heard from."""
        replica.absent = sorted(replica.pids)
        self.confirm(replica, False, until)

    def move(self, replica: Replica, state: ReplicaState, at: float) -> None:
        """Change a live replica's state; the waits of the old state end, but not the one for ranks to be heard from."""
        if not replica.live:
            raise ValueError(f"{replica.name}#{replica.incarnation} is {replica.state} and cannot become {state}")
        self._unshelve(replica)
        replica.state, replica.since = state, at
        replica.deadline = None if replica.confirmed else replica.deadline
        if replica.live:
            self._shelve(replica)
        else:
            replica.position = None
            self.leaving.pop(replica.name, None)

    def hold(self, replica: Replica, position: Position | None) -> None:
        """A live replica has these weights now."""
        self._unshelve(replica)
        replica.position = position
        self._shelve(replica)

    def confirm(self, replica: Replica, confirmed: bool, deadline: float | None) -> None:
        """All ranks of a live replica were heard from in this term (or, when one begins, not yet)."""
        self._unshelve(replica)
        replica.confirmed, replica.deadline = confirmed, deadline
        self._shelve(replica)

    def _on_shelves(self, wanted: Callable[[str], bool]) -> list[Replica]:
        names = [name for key, shelf in self.shelves.items() if wanted(key) for name in shelf]
        return [self.replicas[name] for name in sorted(names)]

    def _shelve(self, replica: Replica) -> None:
        self.shelves.setdefault(_shelf(replica), {})[replica.name] = None

    def _unshelve(self, replica: Replica) -> None:
        key = _shelf(replica)
        del self.shelves[key][replica.name]
        if not self.shelves[key]:
            del self.shelves[key]


def _devices(register: Register) -> dict[int, Device]:
    return {register.rank: register.device} if register.device is not None else {}


def _shelf(replica: Replica) -> str:
    confirmed = "confirmed" if replica.confirmed else "unconfirmed"
    return f"{replica.role} {replica.state} {confirmed} {_weights(replica.position)}"


def _weights(position: Position | None) -> str:
    return f"{position.lineage}/{position.version}" if position is not None else "-"
