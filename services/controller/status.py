"""The answer to `StatusRequest`: the run as plain maps, for a person and for tools."""

from __future__ import annotations

from services.controller.core.state import State
from services.controller.liveness import Liveness


def status(state: State, liveness: Liveness, counters: dict[str, int], now: float) -> dict[str, object]:
    """What is going on. `now` is the monotonic clock that `liveness` uses."""
    committed, settled = state.lineages.committed, state.lineages.settled
    replicas = []
    for replica in sorted(state.fleet.replicas.values(), key=lambda r: r.name):
        heard = liveness.heartbeat(replica.name, replica.incarnation, now) if replica.live else None
        replicas.append(
            {
                "name": replica.name,
                "role": replica.role,
                "state": replica.state,
                "incarnation": replica.incarnation,
                "version": replica.position.version if replica.position else None,
                "leases": len(state.ledger.held_by(replica.name)),
                "doing": heard[0] if heard else "",
                "heard_s": round(heard[1], 1) if heard else None,
            }
        )
    groups: dict[str, int] = {}
    for group in state.ledger.groups.values():
        groups[group.state] = groups.get(group.state, 0) + 1
    return {
        "run": state.run,
        "term": state.term,
        "stage": state.stages.name,
        "outcome": state.stages.outcome,
        "stopping": state.stages.stopping,
        "lineage": committed.lineage,
        "version": committed.version,
        "step": committed.step,
        "settled_version": settled.version,
        "revision": state.hyperparameters.revision,
        "groups": groups,
        "replicas": replicas,
        "evaluations": [
            {"version": v.version, "lineage": v.lineage, "why": v.why, "n": v.n, "accuracy": v.accuracy}
            for v in state.evaluation.verdicts
        ],
        "refused": counters,
    }
