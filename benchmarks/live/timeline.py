"""What a journal says about when things happened: the facts that benchmarks need, with their times.

Read after the run, as plain maps: a journal of any core version whose facts have these names can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.records import read_journal


@dataclass(frozen=True)
class Moment:
    """A fact and when its event was journaled, in seconds since the epoch."""

    at: float
    fact: dict[str, Any]


@dataclass(frozen=True)
class Life:
    """One incarnation of a replica: registered, working (first lease or step), gone. None: it never was."""

    replica: str
    incarnation: int
    joined: float
    working: float | None
    gone: float | None
    cause: str


@dataclass(frozen=True)
class FormedMesh:
    """A mesh from the order to form it until its last member stood."""

    epoch: int
    ordered: float
    formed: float
    members: frozenset[str]


@dataclass
class Timeline:
    """Moments by the fact's name, in order; `terms` are (time, term); `began` and `ended` bound the journal."""

    facts: dict[str, list[Moment]] = field(default_factory=dict)
    terms: list[tuple[float, int]] = field(default_factory=list)
    registered: list[tuple[float, str]] = field(default_factory=list)
    steered: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    meshes: list[FormedMesh] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    def of(self, name: str, after: float = float("-inf"), before: float = float("inf")) -> list[Moment]:
        """The facts of a name with after < time <= before."""
        return [moment for moment in self.facts.get(name, []) if after < moment.at <= before]

    def life_at(self, replica: str, at: float) -> Life | None:
        """The incarnation that lived at a time: the newest that had joined by then and was not gone."""
        lives = [life for life in self.lives if life.replica == replica and life.joined <= at]
        return lives[-1] if lives and (lives[-1].gone is None or lives[-1].gone > at) else None

    def roles(self) -> dict[str, str]:
        """The role of every replica that ever joined."""
        return {moment.fact["replica"]: moment.fact["role"] for moment in self.of("joined")}


def read_timeline(folder: Path) -> Timeline:
    """The journal of the run in `folder`. JournalDamaged if it cannot be read."""
    return fold(record for _, record in read_journal(folder))


def fold(records: Iterable[dict[str, Any]]) -> Timeline:
    """Records as plain maps, in order."""
    timeline = Timeline()
    orders: dict[int, float] = {}
    members: dict[int, dict[str, float]] = {}
    for record in records:
        event = record["event"]
        at = event["at"]
        timeline.began = timeline.began or at
        timeline.ended = at
        match event["type"]:
            case "term_began":
                timeline.terms.append((at, event["term"]))
            case "replica_registered":
                timeline.registered.append((at, event["register"]["replica"]))
            case "steered":
                timeline.steered.append((at, event["order"]))
            case "mesh_id_minted":
                orders[event["epoch"]] = at
            case "message_received" if event["body"]["type"] == "mesh_formed":
                members.setdefault(event["body"]["epoch"], {})[event["replica"]] = at
        for fact in record["facts"]:
            timeline.facts.setdefault(fact["type"], []).append(Moment(at, fact))
    timeline.meshes = [
        FormedMesh(epoch, orders[epoch], max(told.values()), frozenset(told))
        for epoch, told in members.items()
        if epoch in orders
    ]
    timeline.lives = _lives(timeline)
    return timeline


def _lives(timeline: Timeline) -> list[Life]:
    """Every incarnation; a joined one that works with another's name or time is never mixed up with it."""
    gone = {(m.fact["replica"], m.fact["incarnation"]): m for m in timeline.of("gone")}
    joined = timeline.of("joined")
    lives = []
    for moment in joined:
        name, incarnation = moment.fact["replica"], moment.fact["incarnation"]
        end = gone.get((name, incarnation))
        until = end.at if end is not None else float("inf")
        lives.append(
            Life(
                name,
                incarnation,
                moment.at,
                _first_work(timeline, name, incarnation, moment.at, until),
                end.at if end is not None else None,
                end.fact["cause"] if end is not None else "",
            )
        )
    return lives


def _first_work(timeline: Timeline, replica: str, incarnation: int, after: float, before: float) -> float | None:
    leased = (
        moment.at
        for moment in timeline.of("leased", after, before)
        if moment.fact["replica"] == replica and moment.fact["incarnation"] == incarnation
    )
    assigned = (moment.at for moment in timeline.of("assigned", after, before) if moment.fact["replica"] == replica)
    return min((at for at in (next(leased, None), next(assigned, None)) if at is not None), default=None)
