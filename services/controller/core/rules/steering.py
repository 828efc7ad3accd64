"""What persons ask of a run that goes on: whether it can be, taking it, and saying what became of it."""

from __future__ import annotations

from typing import Literal

from services.controller.core.events import SteeringOrder
from services.controller.core.rules.losing import ask_to_leave
from services.controller.core.state import State, Turn
from shared.config import Recipe
from shared.messages import (
    CheckpointRun,
    DrainReplica,
    EvaluateRun,
    PauseRun,
    Refused,
    ResumeRun,
    ScaleFleet,
)


def judge_order(state: State, recipe: Recipe, order: SteeringOrder) -> Refused | Literal["fresh", "duplicate"]:
    """Whether an order is new, done or under way already, or cannot be; changes nothing."""
    steering, fleet = state.steering, state.fleet
    if state.stages.outcome:
        advice = "'orrery resume' starts it again; steer it then"
        return Refused("state", "a run that goes on", f"one that is {state.stages.outcome}", advice)
    match order:
        case PauseRun():
            return "duplicate" if steering.paused else "fresh"
        case ResumeRun():
            return "fresh" if steering.paused else "duplicate"
        case CheckpointRun():
            known = steering.checkpoint or (_idle(state) and state.lineages.settled == state.lineages.committed)
            return "duplicate" if known else "fresh"
        case EvaluateRun():
            if recipe.evaluation is None:
                advice = "add a suite to the recipe, or judge an export with 'orrery eval'"
                return Refused("state", "a recipe with [evaluation.suites.NAME]", "one without", advice)
            known = steering.evaluate or state.evaluation.judged(state.lineage, state.version)
            return "duplicate" if known else "fresh"
        case DrainReplica(replica=name):
            replica = fleet.replicas.get(name)
            if replica is None or not replica.live:
                there = ", ".join(r.name for r in fleet.live()) or "none"
                now = f"{name}, which has {replica.state}" if replica is not None else name
                return Refused("replica", f"one of {there}", now, "name a replica that is there")
            kept = state.scaling.names["policy"]  # one that somebody started by hand is started again by nobody
            others = [r.name for r in fleet.live("policy") if r.name != name and not fleet.goes(r)]
            if replica.role == "policy" and not any(name not in kept or other in kept for other in others):
                advice = "'orrery scale policy=2' first, and drain this one when the other is ready"
                return Refused("replica", "a policy that another one can replace", f"{name}, the only one", advice)
            return "duplicate" if fleet.goes(replica) and name not in state.scaling.wanted else "fresh"
        case ScaleFleet(replicas=counts):
            for role in counts:
                if role not in state.scaling.names:
                    known_roles = ", ".join(state.scaling.names)
                    advice = 'evaluators are part of a run with evaluator.engine = "own"'
                    return Refused("role", f"one of {known_roles}", role, advice)
            return "duplicate" if all(state.scaling.count(r) == n for r, n in counts.items()) else "fresh"


def take_order(turn: Turn, order: SteeringOrder) -> None:
    """A person steers."""
    state = turn.state
    match order:
        case PauseRun(cause=cause):
            state.steering.paused = cause or "a person paused it"
        case ResumeRun():
            state.steering.paused = ""
            turn.progress()  # the pause was no stall
        case CheckpointRun():
            state.steering.checkpoint = True
        case EvaluateRun():
            state.steering.evaluate = True
        case DrainReplica(replica=name, cause=cause):
            state.scaling.give_up(name)
            _dismiss(turn, name, cause or "a person drains it")
        case ScaleFleet(replicas=counts):
            taken = {replica.name for replica in state.fleet.live()}
            for role, count in sorted(counts.items()):
                for name in state.scaling.scale(role, count, taken):
                    _dismiss(turn, name, f"the fleet is scaled to {count} {role} replicas")


def became(state: State, order: SteeringOrder) -> str:
    """What an order came to, for the person who gave it."""
    committed = state.lineages.committed
    under_way = "the batch in hand is finished first" if not _idle(state) else "at once"
    match order:
        case PauseRun():
            return (
                f"paused after version {committed.version}: no new batch begins ({under_way}); 'orrery resume' ends it"
            )
        case ResumeRun():
            return f"goes on from version {committed.version}"
        case CheckpointRun():
            if state.steering.checkpoint:
                return f"a checkpoint is written: {under_way}"
            return f"the checkpoint of version {state.lineages.settled.version} holds everything already"
        case EvaluateRun():
            if state.evaluation.judged(state.lineage, state.version):
                return f"version {committed.version} was judged already"
            return "the newest version that the judges hold is judged next"
        case DrainReplica(replica=name):
            replica = state.fleet.replicas[name]
            wanted = state.scaling.count(replica.role)
            return f"{name} leaves when nothing waits for it; {wanted} {replica.role} replicas are wanted from now on"
        case ScaleFleet(replicas=counts):
            parts = [f"{role}: {', '.join(state.scaling.names[role])}" for role in sorted(counts)]
            return f"wanted are {'; '.join(parts)}"


def _dismiss(turn: Turn, name: str, cause: str) -> None:
    replica = turn.state.fleet.replicas.get(name)
    if replica is not None and replica.live:
        ask_to_leave(turn, replica, cause)


def _idle(state: State) -> bool:
    return state.steps.batch is None and state.steps.step is None
