"""Weights: who gets which version from whom.

    paired (their mesh forms) -> transferring -> loaded(digest) -> ready, a source for others

Every transfer is an *edge*: one source, one receiver, a mesh of the two; many are under way at a time. Whoever holds
the version that is published, digest checked, may be the source of the next edges, so that a tree of relays grows by
itself: from the policies, which stage a copy, over the receivers that are done. The first digest that a policy tells of
a position is the one that everybody is compared with, whoever they had it from.

The transition that must not exist: transferring -> ready without a digest.

`waiting`, `free` and `resting` spare every event a look at all replicas. Whoever could be a receiver, or a relay with
room, is on them; who is on them and is not fit is struck off when it is looked at.
"""

from __future__ import annotations

import msgspec

from shared.messages import Position, Role


class Edge(msgspec.Struct):
    """`source` and `receiver` meet in the mesh of `epoch` since `since`; `position` is None until weights travel.

    `sent`: the source has answered; `loaded` is the digest that the receiver told, `deadline` the transfer's.
    """

    epoch: int
    source: str
    receiver: str
    since: float
    position: Position | None = None
    deadline: float = 0.0
    sent: bool = False
    loaded: str | None = None


class Publication(msgspec.Struct):
    """A position that is, or was last, handed round since `began`: its true digest, and the bytes it has taken.

    `complete`: everybody had it at the end of a turn; who gets it later opens its account anew. `suspects` are sources,
    by the receiver that loaded something else from them; `barred` are those that another source has proven wrong.
    """

    position: Position
    began: float
    digest: str | None = None
    bytes: int = 0
    complete: bool = False
    suspects: dict[str, str] = {}
    barred: dict[str, None] = {}

    def accuse(self, source: str, receiver: str) -> None:
        """A receiver has loaded wrong weights: the second time from one source, it is the source that is wrong.

        From two sources in a row, it is the receiver.
        """
        before = self.suspects.pop(receiver, None)
        if before is None:
            self.suspects[receiver] = source
        elif before == source:
            self.barred[source] = None

    def acquit(self, source: str, receiver: str) -> None:
        """A receiver has loaded the true weights: what another source had sent it was wrong on that side."""
        before = self.suspects.pop(receiver, None)
        if before is not None and before != source:
            self.barred[before] = None


class Weights(msgspec.Struct):
    """The edges by epoch, what is published, the candidates for more edges, and what the last publication took.

    `target` is the (lineage, version) that the candidates are kept for. `waiting` may be behind it, by role; `resting`
    may be too, but an attempt failed a moment ago; `free` may serve it (policies are few, and not kept here).
    `interval`: versions that a rollout has to be behind to be sent this one.
    """

    edges: dict[int, Edge] = {}
    publications: list[Publication] = []
    target: tuple[int, int] = (0, 0)
    interval: int = 1
    waiting: dict[Role, dict[str, None]] = {}
    resting: dict[str, Role] = {}
    free: dict[str, None] = {}
    last_seconds: float = 0.0
    last_bytes: int = 0
    mismatches: int = 0

    def publication(self, position: Position) -> Publication | None:
        """What is known of a position that is published, or whose transfers are still under way."""
        return next((known for known in self.publications if known.position == position), None)

    def publish(self, position: Position, at: float) -> Publication:
        """A position is handed round from now on; it, and older ones that still travel, are remembered."""
        known = self.publication(position)
        if known is None:
            travelling = [edge.position for edge in self.edges.values()]
            self.publications = [old for old in self.publications if old.position in travelling]
            known = Publication(position, at)
            self.publications.append(known)
        elif known.complete:
            known.began, known.bytes, known.complete = at, 0, False
        return known

    def newest(self, lineage: int, version: int) -> Publication | None:
        """The publication of a version, if its true digest is known."""
        for known in reversed(self.publications):
            if (known.position.lineage, known.position.version) == (lineage, version):
                return known if known.digest is not None else None
        return None

    def aim(self, target: tuple[int, int], behind: dict[Role, list[str]]) -> None:
        """Another version is to be handed round: these are behind it, and nobody can serve it yet."""
        self.target = target
        self.waiting = {role: dict.fromkeys(names) for role, names in behind.items()}
        self.resting, self.free = {}, {}

    def want(self, name: str, role: Role) -> None:
        """A replica may be behind."""
        self.waiting.setdefault(role, {})[name] = None

    def rest(self, name: str, role: Role) -> None:
        """A replica has to pause before its next attempt."""
        self.waiting.get(role, {}).pop(name, None)
        self.resting[name] = role

    def over(self, epochs: list[int]) -> list[Edge]:
        """The edges over these meshes, such as all that a replica is in."""
        return [self.edges[epoch] for epoch in epochs if epoch in self.edges]

    def travelling_to(self, name: str, held: Position | None, epochs: list[int]) -> bool:
        """Whether other weights than it holds are on their way to a replica, over one of the meshes that it is in."""
        return any(edge.receiver == name and edge.position not in (None, held) for edge in self.over(epochs))
