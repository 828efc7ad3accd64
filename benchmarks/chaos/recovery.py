"""What each fault cost, from the run's own records: who noticed when, what was done again, when training went on.

Everything is looked for between the fault and the next one, so that no fault is blamed for another's work.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.chaos.inject import Delivered
from benchmarks.chaos.schedule import KINDS, Kind
from benchmarks.live.run import ServiceProcess
from benchmarks.live.timeline import Timeline

CONTROLLER = "controller"


@dataclass(frozen=True)
class Recovery:
    """Seconds; None: it was not needed, or did not come before the next fault.

    - `detect_s`: from the fault until the controller wrote that the replica is gone; for the controller, until its
      next process was started.
    - `restart_s`: from the start of the new process until it registered (the controller: until its term began):
      Python, its imports, and whatever else the machine did meanwhile.
    - `remesh_s`: from the order to form a mesh until its last member stood, for the first mesh that the replica was
      in again (the controller: the first one at all).
    - `redo_s`: from the step's abort, or from the rollback, until that step was committed.
    - `commit_s`: from the fault until the next committed step.
    - `apart_s`: the same without the restart, where training had to wait for all of it.
    - `pause_s`: the longest time without a committed step, from the fault until the next one: a step whose votes are
      in may commit just after a fault that then holds up those that follow.
    - `back_s`: from the fault until the replica was given work again.
    """

    name: str
    kind: Kind
    at: float
    detect_s: float | None
    restart_s: float | None
    remesh_s: float | None
    redo_s: float | None
    commit_s: float | None
    apart_s: float | None
    pause_s: float | None
    back_s: float | None
    rolled_back: bool


def recoveries(
    delivered: Sequence[Delivered], timeline: Timeline, processes: Sequence[ServiceProcess]
) -> list[Recovery]:
    """One for each fault, in order."""
    # once the run is over its replicas leave, which is nobody's fault
    over = min((moment.at for moment in timeline.of("finished")), default=float("inf"))
    ends = [min(end, over) for end in (*(done.at for done in delivered[1:]), over)]
    return [_recovery(done, end, timeline, processes) for done, end in zip(delivered, ends, strict=True)]


def median_apart(found: Sequence[Recovery], kinds: Sequence[Kind] = (*KINDS, "cut")) -> float | None:
    """The median time to the next committed step, restarts apart, over the faults after which one came."""
    values = [it.apart_s for it in found if it.kind in kinds and it.apart_s is not None]
    return statistics.median(values) if values else None


def _recovery(done: Delivered, end: float, timeline: Timeline, processes: Sequence[ServiceProcess]) -> Recovery:
    at, replica = done.at, done.process.replica
    again = next((p.started for p in processes if p.replica == replica and at < p.started <= end), None)
    commits = timeline.of("committed", at, end)
    commit = commits[0].at if commits else None
    if replica == CONTROLLER:
        detected = again
        registered = next((began for began, _ in timeline.terms if again is not None and began >= again), None)
        meshes = [mesh for mesh in timeline.meshes if at < mesh.ordered <= end]
        working = commit if registered is not None else None
    else:
        life = timeline.life_at(replica, at)
        gone = life.gone if life is not None else None
        detected = gone if gone is not None and gone < end else None
        later = [life for life in timeline.lives if life.replica == replica and at < life.joined <= end]
        registered = later[0].joined if later else None
        meshes = [
            mesh for mesh in timeline.meshes if later and replica in mesh.members and mesh.ordered > later[0].joined
        ]
        working = next((life.working for life in later if life.working is not None), None)
    restart = registered - again if again is not None and registered is not None else None
    waited = restart is not None and commit is not None and registered is not None and registered <= commit
    rolled_back = bool(timeline.of("rolled_back", at, end))
    return Recovery(
        name=done.name,
        kind=done.fault.kind,
        at=at,
        detect_s=_since(at, detected),
        restart_s=restart,
        remesh_s=meshes[0].formed - meshes[0].ordered if meshes else None,
        redo_s=_redo(timeline, at, end),
        commit_s=_since(at, commit),
        apart_s=_since(at, commit - restart if waited and commit is not None and restart is not None else commit),
        pause_s=max((after - before for before, after in pairwise((at, *(it.at for it in commits)))), default=None),
        back_s=_since(at, working),
        rolled_back=rolled_back,
    )


def _redo(timeline: Timeline, at: float, end: float) -> float | None:
    """A rollback takes more than its step's abort: it is over when the step reached before is reached again."""
    for moment in timeline.of("rolled_back", at, end):
        before = [m.fact["step"] for m in timeline.of("committed", before=moment.at)]
        reached = max(before, default=-1)
        return next((m.at - moment.at for m in timeline.of("committed", moment.at) if m.fact["step"] >= reached), None)
    for moment in timeline.of("aborted", at, end):
        step = moment.fact["step"]
        return next((m.at - moment.at for m in timeline.of("committed", moment.at) if m.fact["step"] == step), None)
    return None


def _since(at: float, when: float | None) -> float | None:
    return None if when is None else when - at
