"""Staged copies of a model's weights, so that a transfer or a checkpoint never sees a step half applied.

A staged copy is one stretch of memory with the tensors as views into it: it travels without further copies. Invariant:
a manifest lists what a model holds in the model's own order - parameters and persistent buffers, tied ones once - so
that two models of the same architecture have equal manifests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import msgspec
import torch
from torch import Tensor, nn

from shared.weights.errors import WeightsError
from shared.weights.memory import shared_memory
from shared.weights.plan import gather
from shared.weights.slices import Box, PolicyLayout

ALIGNMENT = 64
"""Bytes that each tensor's start is a multiple of."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its first name in the model, torch's name of its type ("bfloat16"), and its shape."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Area:
    """Room for what a manifest lists: `tensors` are views into `memory` (uint8), which others may open by `path`."""

    manifest: list[TensorSpec]
    memory: Tensor
    tensors: dict[str, Tensor]
    path: str


@dataclass(frozen=True, slots=True)
class Shared:
    """Weights that the ranks of a policy replica have between them: `manifest` lists them whole."""

    manifest: list[TensorSpec]
    layout: PolicyLayout

    @property
    def ranks(self) -> int:
        """How many they are."""
        return self.layout.parallel.world

    def owned(self) -> list[dict[str, Box]]:
        """By rank, the boxes whose one copy that counts it has, in the manifest's order."""
        found: list[dict[str, Box]] = [{} for _ in range(self.ranks)]
        for rank, name, box in gather(self.manifest, self.layout.architecture, self.layout.parallel):
            found[rank][name] = box
        return found

    def part(self, boxes: Mapping[str, Box]) -> list[TensorSpec]:
        """What a staged copy of these boxes holds."""
        return [
            TensorSpec(spec.name, spec.dtype, list(boxes[spec.name].shape))
            for spec in self.manifest
            if spec.name in boxes
        ]


@dataclass(frozen=True, slots=True)
class StagedWeights:
    """A copy that nobody changes; `digest` is of the weights.

    With `shared` it is the part of one rank, and `area` holds just the boxes that it owns.
    """

    area: Area
    digest: str
    shared: Shared | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, in the manifest's order."""
        return self.area.tensors


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, tied ones under their first name only."""
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # tied modules hold one parameter, or views of the same memory
        place = (tensor.data_ptr() or id(tensor), tensor.element_size(), tuple(tensor.shape), tensor.stride())
        if place not in seen:
            seen.add(place)
            weights[name] = tensor
    return weights


def manifest_of(model: nn.Module) -> list[TensorSpec]:
    """What a staged copy of `model` would hold."""
    return [spec_of(name, tensor) for name, tensor in named_weights(model).items()]


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """What a manifest says of a tensor."""
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))


def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the model's weights in place: no reallocation, ties stay tied, every holder sees the new values."""
    load_tensors(named_weights(model), tensors)


def load_tensors(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy each source over the target of its name; nothing is written unless all names, types and shapes agree."""
    for name in targets.keys() | sources.keys():
        target, source = targets.get(name), sources.get(name)
        if target is None or source is None or target.dtype != source.dtype or target.shape != source.shape:
            raise WeightsError(f"weights {name!r}: expected {_described(target)}, got {_described(source)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])


def allocate(manifest: Sequence[TensorSpec]) -> Area:
    """Zeroed memory for the manifest, with the tensors in its order."""
    memory = shared_memory(area_bytes(manifest))
    return Area(list(manifest), memory.data, tensor_views(memory.data, manifest), memory.path)


def area_bytes(manifest: Sequence[TensorSpec]) -> int:
    """Bytes of memory that the manifest's tensors take, each aligned."""
    return sum(_aligned(spec.nbytes) for spec in manifest)


def tensor_views(memory: Tensor, manifest: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The manifest's tensors as views into `memory` (uint8, of `area_bytes`)."""
    views: dict[str, Tensor] = {}
    start = 0
    for spec in manifest:
        views[spec.name] = memory[start : start + spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)
        start += _aligned(spec.nbytes)
    return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _described(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
