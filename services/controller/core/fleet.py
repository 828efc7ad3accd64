"""The fleet: a replica's life.

    joining -> loading -> stale -> ready -> draining -> left           any live state -> lost

- joining: some of its ranks have registered; loading: all have, the model is being made;
- stale: the model stands but its weights are not the published ones; ready: they were, and their digest was checked
  (a policy is ready when it holds the committed state, and stale while others do and it does not);
- *busy* is not a state of its own: a ready replica with leases or a step in hand is busy.

The transition that must not exist: lost -> ready. What comes back after a loss is a new incarnation that starts at
joining and can only become ready through stale and a weight sync (a policy: by loading, by receiving another's state,
or by proving at registration that it still holds the committed one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from shared.messages import DatasetIdentity, MeshMember, Position, Register, Role

ReplicaState = Literal["joining", "loading", "stale", "ready", "draining", "left", "lost"]
PROCESSES_KEPT = 64
"""Former processes of a rank that are remembered as such."""
LIVE: tuple[ReplicaState, ...] = ("joining", "loading", "stale", "ready", "draining")


class Replica(msgspec.Struct):
    """One incarnation of a replica. `position` is what it holds, as acknowledged; None: nothing usable.

    `doubtful`: a transfer to it was given up, so its engine may sample with weights that nobody has compared; a policy:
    what it holds differs from what the others hold, and it has yet to forget that.
    `answered` is when it last reported or returned a group.
    """

    name: str
    role: Role
    incarnation: int
    world: int
    nonces: dict[int, int]
    pids: dict[int, int]
    host: str
    state: ReplicaState
    since: float
    position: Position | None = None
    confirmed: bool = True
    deadline: float | None = None
    doubtful: bool = False
    answered: float = 0.0

    @property
    def live(self) -> bool:
        """Whether this incarnation may still act."""
        return self.state in LIVE

    @property
    def member(self) -> MeshMember:
        """It as a member of a mesh."""
        return MeshMember(self.name, self.incarnation, 0)


class Fleet(msgspec.Struct):
    """Every replica that the run has seen, by name, in its latest incarnation; and the data sets they agreed on.

    `shelves` index the live ones by role, state and what they hold, so that no event has to look at all of them:
    state, position and `confirmed` of a replica change through the fleet only. `processes` are the last nonces of each
    rank, the newest one last: an older process never takes its name back. `leaving` are live ones that were asked to
    go, with the cause, and are not draining yet.
    """

    replicas: dict[str, Replica] = {}
    shelves: dict[str, dict[str, None]] = {}
    datasets: dict[str, DatasetIdentity] = {}
    processes: dict[str, list[int]] = {}
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

    def superseded(self, register: Register) -> bool:
        """Whether a newer process has taken this rank's name."""
        known = self.processes.get(f"{register.replica}/{register.rank}", [])
        return register.nonce in known[:-1]

    def knows(self, register: Register) -> bool:
        """Whether this very process has registered before, in whatever incarnation."""
        return register.nonce in self.processes.get(f"{register.replica}/{register.rank}", ())

    def same_process(self, register: Register) -> Replica | None:
        """The live replica that this registration continues: same name, same process for this rank."""
        replica = self.replicas.get(register.replica)
        if replica is None or not replica.live:
            return None
        return replica if replica.nonces.get(register.rank) == register.nonce else None

    def next_rank_of(self, register: Register) -> Replica | None:
        """The joining replica that this registration completes: same name, a rank not seen yet."""
        replica = self.replicas.get(register.replica)
        if replica is None or replica.state != "joining" or register.rank in replica.nonces:
            return None
        return replica if replica.world == register.world else None

    def enter(self, register: Register, at: float) -> Replica:
        """A new incarnation begins with this rank."""
        before = self.replicas.get(register.replica)
        replica = Replica(
            name=register.replica,
            role=register.role,
            incarnation=before.incarnation + 1 if before else 1,
            world=register.world,
            nonces={register.rank: register.nonce},
            pids={register.rank: register.pid},
            host=register.host,
            state="joining",
            since=at,
        )
        self.replicas[replica.name] = replica
        self._shelve(replica)
        self._note_process(register)
        for seen in register.datasets:
            self.datasets.setdefault(seen.name, seen)
        return replica

    def add_rank(self, replica: Replica, register: Register) -> None:
        """A further rank of a joining replica is there."""
        replica.nonces[register.rank], replica.pids[register.rank] = register.nonce, register.pid
        self._note_process(register)

    def _note_process(self, register: Register) -> None:
        """This process is the rank now."""
        known = self.processes.setdefault(f"{register.replica}/{register.rank}", [])
        if register.nonce not in known:
            known.append(register.nonce)
        del known[:-PROCESSES_KEPT]

    def move(self, replica: Replica, state: ReplicaState, at: float) -> None:
        """Change a live replica's state; the waits of the old state end."""
        if not replica.live:
            raise ValueError(f"{replica.name}#{replica.incarnation} is {replica.state} and cannot become {state}")
        self._unshelve(replica)
        replica.state, replica.since, replica.deadline = state, at, None
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
        """A live replica was heard from in this term (or, when one begins, not yet)."""
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


def _shelf(replica: Replica) -> str:
    confirmed = "confirmed" if replica.confirmed else "unconfirmed"
    return f"{replica.role} {replica.state} {confirmed} {_weights(replica.position)}"


def _weights(position: Position | None) -> str:
    return f"{position.lineage}/{position.version}" if position is not None else "-"
