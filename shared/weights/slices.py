"""Which block of each tensor a rank of a policy replica holds: what follows from names, shapes and the layout alone.

Used by the trainer, which cuts its model this way, and by the plan of a transfer, so both sides of one know every cut
without asking. Tensors go by their names in transformers' models (Qwen2, Qwen3, Qwen3-MoE, Llama, Qwen2.5-VL). Pure
arithmetic, without torch. Invariant: the boxes of a tensor's owners tile it, each element exactly once.

The cuts are those of Megatron's tensor parallelism (Shoeybi et al., 2019) and of FSDP2 (`fully_shard`) on top:

    split       cut over tp                                 tensors
    column      dim 0                                       q, k, v, gate and up projections, with their biases
    row         dim 1                                       o and down projections; their biases are whole
    vocabulary  dim 0                                       embed_tokens, lm_head
    experts     dim 0, over ep and tp together              stacked experts: an expert is never cut inside
    whole       not at all                                  norms, router, vision tower, buffers

and what is left is cut along its dim 0 over fsdp. Every other axis repeats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from math import prod
from typing import NamedTuple, Protocol

from shared.config.schema import PolicyParallelTable

COLUMN_MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_MODULES = ("o_proj", "down_proj")
VOCABULARY_MODULES = ("embed_tokens", "lm_head")
EXPERT_STACKS = ("gate_up_proj", "down_proj")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class Spec(Protocol):
    """A tensor's name and shape, as a manifest's `TensorSpec` has them."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned block of a whole tensor: the elements from `start` up to `stop` along each dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Elements in all; a scalar's box has one."""
        return prod(self.shape)

    def cut(self, dim: int, start: int, stop: int) -> Box:
        """The part of this box from its own `start` up to its own `stop` along `dim`."""
        first = self.start[dim]
        return Box(
            (*self.start[:dim], first + start, *self.start[dim + 1 :]),
            (*self.stop[:dim], first + stop, *self.stop[dim + 1 :]),
        )

    def intersect(self, other: Box) -> Box | None:
        """What both boxes cover; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box in a tensor that holds just `outer`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


def runs(box: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The contiguous runs (start, stop) of the box in the flattened whole tensor of `shape`, in order.

    All are of one length, so run i is row i of the box's own elements seen as [runs, length].
    """
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # behind the last dimension that is cut, everything is contiguous
    last = max((dim for dim, size in enumerate(box.shape) if size < shape[dim]), default=0)
    length = prod(box.shape[last:])
    for outer in product(*map(range, box.start[:last], box.stop[:last])):
        first = sum(index * stride for index, stride in zip((*outer, *box.start[last:]), strides, strict=True))
        yield first, first + length


class Coordinates(NamedTuple):
    """A rank's place on each axis of its replica."""

    pp: int
    replicate: int
    fsdp: int
    ep: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Parallel:
    """Sizes of the axes of a policy replica; ranks count along tp first, pp last."""

    pp: int = 1
    replicate: int = 1
    fsdp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def of(cls, table: PolicyParallelTable) -> Parallel:
        """The axes of a recipe's [policy.parallel]."""
        return cls(*(getattr(table, axis) for axis in Coordinates._fields))

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ValueError(f"expected every axis of a layout to have at least 1 rank, got {self}; set it to 1")

    @property
    def sizes(self) -> Coordinates:
        """Ranks along each axis."""
        return Coordinates(self.pp, self.replicate, self.fsdp, self.ep, self.cp, self.tp)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return prod(self.sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        if not 0 <= rank < self.world:
            raise ValueError(f"expected a rank from 0 to {self.world - 1} of {self}, got {rank}")
        places = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            places.append(place)
        return Coordinates(*reversed(places))

    def rank_of(self, coordinates: Coordinates) -> int:
        """Who stands there."""
        rank = 0
        for size, place in zip(self.sizes, coordinates, strict=True):
            rank = rank * size + place
        return rank


@dataclass(frozen=True, slots=True)
class Architecture:
    """What slicing has to know of a model beside its manifest.

    `experts` is 0 for a dense model; `tied`: the manifest has embed_tokens alone, which is the head too.
    """

    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool


@dataclass(frozen=True, slots=True)
class PolicyLayout:
    """A model, and how the ranks of a policy replica share it."""

    architecture: Architecture
    parallel: Parallel


class Split(StrEnum):
    """How tensor (and expert) parallelism cuts a tensor; see the module's table."""

    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    EXPERTS = "experts"
    WHOLE = "whole"


def split_of(name: str, shape: Sequence[int]) -> Split:
    """How the tensor of that name is cut."""
    module, leaf = f".{name}".split(".")[-2:]
    if is_vision(name) or not shape:
        return Split.WHOLE
    if module == "experts" and leaf in EXPERT_STACKS:
        return Split.EXPERTS
    if ONE_EXPERT.search(name):
        raise ValueError(
            f"expected the experts of a layer in stacks, as transformers 5 has them, got {name!r}; "
            f"stack them to experts.gate_up_proj and experts.down_proj"
        )
    if module in COLUMN_MODULES:
        return Split.COLUMN
    if module in ROW_MODULES and leaf == "weight":
        return Split.ROW
    return Split.VOCABULARY if module in VOCABULARY_MODULES else Split.WHOLE


def is_vision(name: str) -> bool:
    """Whether the tensor is one of the vision tower."""
    return name.startswith(("model.visual.", "visual."))


def part(size: int, ways: int, index: int) -> tuple[int, int]:
    """Share `index` of `size` in `ways` shares whose sizes differ by 1 at most: start and stop."""
    return size * index // ways, size * (index + 1) // ways


def chunk(size: int, ways: int, index: int) -> tuple[int, int]:
    """Chunk `index` as torch.chunk makes them, hence FSDP2: all of ceil(size / ways), the last ones short or empty."""
    step = -(-size // ways)
    return min(step * index, size), min(step * (index + 1), size)


def stage_layers(layers: int, pp: int, stage: int) -> range:
    """The layers of a pipeline stage of the policy."""
    if pp > layers:
        raise ValueError(f"expected at most a stage a layer, got {pp} stages for {layers} layers; lower pp")
    return range(*part(layers, pp, stage))


def on_stage(name: str, tied: bool, layers: range, stage: int, pp: int) -> bool:
    """Whether stage `stage` of `pp`, which has those layers, computes with the tensor."""
    first, last = stage == 0, stage == pp - 1
    if is_vision(name):
        return first
    if layer := LAYER.search(name):
        return int(layer[1]) in layers
    if _is_embedding(name):
        return first or (tied and last)
    return last if name.endswith("norm.weight") or "lm_head." in name else first


def held(spec: Spec, architecture: Architecture, parallel: Parallel, rank: int) -> Box | None:
    """The box that this rank holds; None for nothing: another stage's tensor, or an empty chunk."""
    check_policy(architecture, parallel)
    at = parallel.coordinates(rank)
    layers = stage_layers(architecture.layers, parallel.pp, at.pp)
    if not on_stage(spec.name, architecture.tied, layers, at.pp, parallel.pp):
        return None
    box = Box.whole(spec.shape)
    split = split_of(spec.name, spec.shape)
    if split is Split.EXPERTS:
        box = box.cut(0, *part(spec.shape[0], parallel.ep * parallel.tp, at.ep * parallel.tp + at.tp))
    elif split is not Split.WHOLE:
        dim = 1 if split is Split.ROW else 0
        box = box.cut(dim, *part(spec.shape[dim], parallel.tp, at.tp))
    if spec.shape:
        box = box.cut(0, *chunk(box.shape[0], parallel.fsdp, at.fsdp))
    return box if box.numel else None


def owner(spec: Spec, architecture: Architecture, parallel: Parallel, rank: int) -> bool:
    """Whether this rank's box is the one copy that counts: at 0 on every axis over which the box is repeated."""
    at = parallel.coordinates(rank)
    split = split_of(spec.name, spec.shape)
    repeated = [at.replicate, at.cp]
    if split is not Split.EXPERTS:
        repeated.append(at.ep)
    if split is Split.WHOLE:
        repeated.append(at.tp)
    if not spec.shape:
        repeated.append(at.fsdp)
    if _is_embedding(spec.name):  # tied, the last stage has it too
        repeated.append(at.pp)
    return not any(repeated) and held(spec, architecture, parallel, rank) is not None


def check_policy(architecture: Architecture, parallel: Parallel) -> None:
    """ValueError for a layout by which the model cannot be cut."""
    if architecture.kv_heads % parallel.tp or architecture.heads % parallel.tp:
        raise ValueError(
            f"expected tp to divide the {architecture.heads} heads and the {architecture.kv_heads} key/value heads, "
            f"got tp = {parallel.tp}; choose a common divisor, and more of fsdp"
        )
    if architecture.experts % (parallel.ep * parallel.tp):
        raise ValueError(
            f"expected ep x tp to divide the {architecture.experts} experts, got {parallel.ep} x {parallel.tp}; "
            f"lower one of them"
        )
    stage_layers(architecture.layers, parallel.pp, 0)


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens.weight")
