"""The plan of a transfer: which rank of a policy sends which block of which tensor to which rank of an engine.

Both sides compute it from the manifest and the two layouts, and it comes out the same, so nothing has to be agreed on.
Invariant: each element that an engine's rank takes is sent to it once, by its owner, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.weights.engine_slices import EngineLayout, engine_held
from shared.weights.slices import Architecture, Box, Parallel, Spec, held, owner


@dataclass(frozen=True, slots=True)
class Transfer:
    """One block on its way: `source` is a rank of the policy, `target` one of the engine, `box` in the whole tensor."""

    name: str
    source: int
    target: int
    box: Box


def plan(
    manifest: Sequence[Spec], architecture: Architecture, source: Parallel, target: EngineLayout
) -> list[Transfer]:
    """All transfers: by tensor as in the manifest, then by target, then by its boxes, then by source."""
    return [
        Transfer(spec.name, rank, taker, common)
        for spec in manifest
        for owners in [_owners(spec, architecture, source)]
        for taker in range(target.parallel.world)
        for taken in engine_held(spec, architecture, target.engine, target.parallel, taker)
        for rank, box in owners
        if (common := box.intersect(taken)) is not None
    ]


def gather(manifest: Sequence[Spec], architecture: Architecture, source: Parallel) -> list[tuple[int, str, Box]]:
    """The owners' boxes as (rank, name, box), by tensor as in the manifest, then by rank: together the whole model."""
    return [(rank, spec.name, box) for spec in manifest for rank, box in _owners(spec, architecture, source)]


def _owners(spec: Spec, architecture: Architecture, parallel: Parallel) -> list[tuple[int, Box]]:
    return [
        (rank, box)
        for rank in range(parallel.world)
        if owner(spec, architecture, parallel, rank) and (box := held(spec, architecture, parallel, rank)) is not None
    ]
