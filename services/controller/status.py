"""The answer to `StatusRequest`: the run as plain maps, for a person and for tools."""

from __future__ import annotations

from msgspec.structs import asdict

from services.controller.core.fleet import Replica
from services.controller.core.state import State
from services.controller.liveness import Liveness
from shared.config import Recipe

REVOKED_SHOWN = 16
"""Meshes that were revoked last, in what a person is told."""


def status(state: State, recipe: Recipe, liveness: Liveness, counters: dict[str, int], now: float) -> dict[str, object]:
    """What is going on. `now` is the monotonic clock that `liveness` uses."""
    committed, settled = state.lineages.committed, state.lineages.settled
    groups: dict[str, int] = {}
    for group in state.ledger.groups.values():
        groups[group.state] = groups.get(group.state, 0) + 1
    table = getattr(recipe, state.stages.name, None)
    book = state.ledger.books.get(state.lineage)
    return {
        "run": state.run,
        "term": state.term,
        "stage": state.stages.name,
        "batch": committed.version - state.stages.began if table is not None else None,
        "batches": table.batches if table is not None else None,
        "outcome": state.stages.outcome,
        "cause": state.stages.cause,
        "stopping": state.stages.stopping,
        "lineage": committed.lineage,
        "version": committed.version,
        "step": committed.step,
        "settled_version": settled.version,
        "revision": state.hyperparameters.revision,
        "hyperparameters": dict(state.hyperparameters.values),
        "history": [asdict(revision) for revision in state.hyperparameters.history],
        "pending": [asdict(change) for change in state.hyperparameters.pending],
        "paused": state.steering.paused,
        "wanted": {role: len(names) for role, names in state.scaling.names.items()},
        "groups": groups,
        "discarded": dict(sorted(book.discarded.items())) if book is not None else {},
        "sync_seconds": state.weights.last_seconds,
        "sync_bytes": state.weights.last_bytes,
        "sync_mismatches": state.weights.mismatches,
        "replicas": [
            _replica(state, liveness, replica, now)
            for replica in sorted(state.fleet.replicas.values(), key=lambda r: r.name)
        ],
        "meshes": _meshes(state),
        "evaluations": [
            {
                "suite": v.suite,
                "version": v.version,
                "lineage": v.lineage,
                "why": v.why,
                "n": v.n,
                "accuracy": v.accuracy,
            }
            for v in state.evaluation.verdicts
        ],
        "refused": counters,
    }


def _replica(state: State, liveness: Liveness, replica: Replica, now: float) -> dict[str, object]:
    heard = liveness.heartbeat(replica.name, replica.incarnation, now) if replica.live else None
    return {
        "name": replica.name,
        "role": replica.role,
        "state": replica.state,
        "incarnation": replica.incarnation,
        "ranks": replica.world,
        "missing": replica.missing if replica.live else [],
        "version": replica.position.version if replica.position else None,
        "leases": len(state.ledger.held_by(replica.name)),
        "doing": heard[0] if heard else "",
        "heard_s": round(heard[1], 1) if heard else None,
        "seconds": liveness.spent(replica.name, replica.incarnation),
    }


def _meshes(state: State) -> list[dict[str, object]]:
    """Live meshes, then those revoked last, whose purpose nobody remembers."""
    edges = state.weights.edges
    travelling = {e: edge.position.version for e, edge in edges.items() if edge.position is not None}
    live: list[dict[str, object]] = [
        {
            "epoch": mesh.epoch,
            "purpose": mesh.purpose,
            "backend": mesh.backend,
            "state": mesh.state,
            "members": mesh.replicas,
            "formed": list(mesh.formed),
            "transfer": travelling.get(mesh.epoch),
        }
        for mesh in state.meshes.meshes.values()
    ]
    last = list(state.meshes.revoked.items())[-REVOKED_SHOWN:]
    revoked = [{"epoch": epoch, "state": "revoked", "members": names} for epoch, names in last]
    return [*live, *revoked]
