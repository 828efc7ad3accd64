"""Whether the replicas that a run begins with are there; asked before the first step and the first lease of a role."""

from __future__ import annotations

from services.controller.core.outcome import Mustered
from services.controller.core.state import Turn
from shared.messages import Role


def muster(turn: Turn) -> bool:
    """Note the roles whose replicas are ready, or were waited for long enough since the first of them was."""
    state, mustering = turn.state, turn.state.mustering
    wanted: dict[Role, int] = {
        "policy": turn.recipe.policy.replicas,
        "rollout": turn.recipe.rollout.replicas,
        "evaluator": turn.recipe.evaluator.replicas,
    }
    acted = False
    for role, count in wanted.items():
        if role in mustering.done:
            continue
        ready = state.fleet.ready_count(role)
        if ready and ready < count:
            until = mustering.until.setdefault(role, state.now + turn.recipe.timeouts.load_s)
            if until > state.now:
                continue
        if ready:
            mustering.done.append(role)
            mustering.until.pop(role, None)
            turn.fact(Mustered(role, count, ready))
            acted = True
    return acted


def mustered(turn: Turn, role: Role) -> bool:
    """Whether replicas of this role may be given their first work."""
    return role in turn.state.mustering.done
