"""The ranks of one replica as a grid: where a rank stands on each axis, and with whom it shares an axis.

Every rank makes the same groups in the same order, so that they find each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations, product

import torch.distributed as dist
from torch.distributed import ProcessGroup

from shared.weights.slices import Coordinates, Parallel

AXES = Coordinates._fields
"""From the one whose neighbours are farthest apart to the one whose ranks follow each other."""
DATA = ("replicate", "fsdp", "ep")
"""Axes whose ranks compute different samples."""
SUMS = ("replicate", "ep", "cp", "tp")
"""Axes over any of which gradients may have to be summed once a step."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks that differ from this one along some axes alone. `group` is None where there is no other."""

    size: int
    index: int
    group: ProcessGroup | None


class Grid:
    """This rank's place among the ranks of its replica."""

    def __init__(self, parallel: Parallel, rank: int, groups: dict[tuple[str, ...], ProcessGroup]) -> None:
        self.parallel, self.rank = parallel, rank
        self.place = parallel.coordinates(rank)
        self._groups = groups

    @classmethod
    def alone(cls) -> Grid:
        """The grid of a replica of one rank."""
        return cls(Parallel(), 0, {})

    @classmethod
    def form(cls, parallel: Parallel, rank: int, timeout_s: float) -> Grid:
        """Make all groups out of torch's default one, which the replica's ranks, and they alone, have formed."""
        groups: dict[tuple[str, ...], ProcessGroup] = {}
        some_sums = [axes for count in range(1, len(SUMS) + 1) for axes in combinations(SUMS, count)]
        for axes in sorted({_several(parallel, axes) for axes in (("pp",), ("fsdp",), DATA, *some_sums)} - {()}):
            for members in _lines(parallel, axes):
                group = dist.new_group(members, timeout=timedelta(seconds=timeout_s))
                if rank in members:
                    groups[axes] = group
        if parallel.pp > 2:  # the two ends share a tied embedding
            for members in _lines(parallel, ("pp",)):
                group = dist.new_group([members[0], members[-1]], timeout=timedelta(seconds=timeout_s))
                if rank in (members[0], members[-1]):
                    groups["ends",] = group
        if parallel.pp > 1:
            for members in _lines(parallel, ("pp",)):
                group = dist.new_group(members, timeout=timedelta(seconds=timeout_s))
                if rank in members:
                    groups["back",] = group
        return cls(parallel, rank, groups)

    def axis(self, *names: str) -> Axis:
        """The axis of that name, or several taken as one."""
        axes = _several(self.parallel, names)
        size, index = 1, 0
        for name in axes:
            ways = getattr(self.parallel, name)
            size, index = size * ways, index * ways + getattr(self.place, name)
        return Axis(size, index, self._groups[axes] if axes else None)

    @property
    def back(self) -> ProcessGroup | None:
        """This rank's pipeline once more, for what goes back.

        NCCL carries what two ranks send each other one after the other, in the order in which each of them asked for
        it: in one group the two ways would wait for each other.
        """
        return self._groups.get(("back",))

    @property
    def ends(self) -> ProcessGroup | None:
        """The first and the last stage of this pipeline, for those two."""
        if self.parallel.pp == 2:
            return self._groups.get(("pp",))
        return self._groups.get(("ends",))

    @property
    def first(self) -> bool:
        """Whether this rank has the first layers."""
        return self.place.pp == 0

    @property
    def last(self) -> bool:
        """Whether this rank has the last layers, and the loss."""
        return self.place.pp == self.parallel.pp - 1

    def neighbour(self, step: int) -> int:
        """The rank at the same place of the stage that is `step` stages on."""
        return self.rank + step * (self.parallel.world // self.parallel.pp)


def _several(parallel: Parallel, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of the axes that have more than one rank, in the grid's order."""
    return tuple(name for name in AXES if name in axes and getattr(parallel, name) > 1)


def _lines(parallel: Parallel, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of each group that differ along `axes` alone."""
    lines: dict[tuple[int, ...], list[int]] = {}
    places = product(*(range(getattr(parallel, name)) for name in AXES))
    for rank, place in enumerate(places):
        rest = tuple(index for name, index in zip(AXES, place, strict=True) if name not in axes)
        lines.setdefault(rest, []).append(rank)
    return list(lines.values())
