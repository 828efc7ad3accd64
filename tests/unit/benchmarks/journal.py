"""Journals for tests of what benchmarks read: records written out as plain maps, in the order of their times."""

from __future__ import annotations

from typing import Any

from benchmarks.live.timeline import Timeline, fold


class Story:
    """Each method adds a record with one fact or event at a time in seconds."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def timeline(self) -> Timeline:
        """What the records say."""
        return fold(sorted(self._records, key=lambda record: record["event"]["at"]))

    def term(self, at: float, term: int) -> Story:
        return self._add(at, {"type": "term_began", "term": term})

    def scaled(self, at: float, **replicas: int) -> Story:
        return self._add(at, {"type": "steered", "order": {"type": "scale_fleet", "replicas": replicas}})

    def registered(self, at: float, replica: str) -> Story:
        return self._add(at, {"type": "replica_registered", "register": {"replica": replica}})

    def mesh(self, ordered: float, formed: float, epoch: int, *members: str) -> Story:
        self._add(ordered, {"type": "mesh_id_minted", "epoch": epoch})
        for member in members:
            body = {"type": "mesh_formed", "epoch": epoch}
            self._add(formed, {"type": "message_received", "replica": member, "body": body})
        return self

    def joined(self, at: float, replica: str, incarnation: int) -> Story:
        return self._fact(at, "joined", replica=replica, role=replica.split("-")[0], incarnation=incarnation)

    def gone(self, at: float, replica: str, incarnation: int, cause: str = "killed") -> Story:
        return self._fact(at, "gone", replica=replica, incarnation=incarnation, state="lost", cause=cause)

    def leased(self, at: float, replica: str, incarnation: int) -> Story:
        return self._fact(at, "leased", replica=replica, incarnation=incarnation)

    def assigned(self, at: float, replica: str) -> Story:
        return self._fact(at, "assigned", replica=replica)

    def committed(self, at: float, step: int, lineage: int = 1) -> Story:
        return self._fact(at, "committed", lineage=lineage, step=step)

    def aborted(self, at: float, step: int) -> Story:
        return self._fact(at, "aborted", step=step)

    def rolled_back(self, at: float) -> Story:
        return self._fact(at, "rolled_back", before=1, lineage=2)

    def finished(self, at: float) -> Story:
        return self._fact(at, "finished", outcome="complete", cause="")

    def consumed(self, at: float, *groups: int) -> Story:
        return self._fact(at, "consumed", groups=list(groups))

    def compared(self, at: float, step: int, digests: dict[str, str], *different: str) -> Story:
        return self._fact(at, "compared", step=step, digests=digests, different=list(different))

    def _fact(self, at: float, name: str, **fields: Any) -> Story:
        return self._add(at, {"type": "deadline_passed"}, {"type": name, **fields})

    def _add(self, at: float, event: dict[str, Any], *facts: dict[str, Any]) -> Story:
        self._records.append({"event": {"at": at, **event}, "facts": list(facts)})
        return self
