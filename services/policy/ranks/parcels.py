"""Parts of states that travel between rank 0 and a far rank, one tensor after the other.

Ranks of rank 0's node write into its memory, and read it; the others send, and are sent, what they would have written
or read. Both sides go through the names in alphabetical order, and know from the layout whose part is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from services.policy.layouts.compose import Layout
from services.policy.state import RANDOM, parameter_of, tensors_of
from services.policy.trainer import Trainer
from shared.weights import TensorSpec
from shared.weights.slices import Box


def give(trainer: Trainer) -> None:
    """On a far rank: send rank 0 what this one owns of the replica's state."""
    layout = trainer.layout
    parts = tensors_of(trainer)
    for name in sorted(parts.keys() - {RANDOM}):
        if layout.owned(parameter_of(name), layout.grid.rank) is not None:
            dist.send(_raw(parts[name]), 0)


def collect(layout: Layout, rank: int, targets: Mapping[str, Tensor]) -> None:
    """On rank 0: put what a far rank gives into whole tensors."""
    for name in sorted(targets.keys() - {RANDOM}):
        box = layout.owned(parameter_of(name), rank)
        if box is not None:
            whole = targets[name]
            part = torch.empty(box.shape, dtype=whole.dtype)
            dist.recv(_raw(part), rank)
            whole[box.within(Box.whole(whole.shape))].copy_(part)


def hand_out(layout: Layout, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """On rank 0: send a far rank its parts of a whole state."""
    for name in sorted(tensors):
        if name == RANDOM:
            dist.send(_raw(tensors[name]), rank)
        elif (box := layout.box(parameter_of(name), rank)) is not None:
            dist.send(_raw(tensors[name][box.within(Box.whole(tensors[name].shape))]), rank)


def accept(layout: Layout, manifest: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """On a far rank: its parts of the whole state that the manifest lists."""
    own = layout.weights()
    found: dict[str, Tensor] = {}
    for spec in sorted(manifest, key=lambda spec: spec.name):
        shape = tuple(spec.shape)
        if spec.name != RANDOM:
            parameter = parameter_of(spec.name)
            if parameter not in own:
                continue
            shape = tuple(own[parameter].shape)
        found[spec.name] = torch.empty(shape, dtype=getattr(torch, spec.dtype))
        if found[spec.name].numel():
            dist.recv(_raw(found[spec.name]), 0)
    return found


def _raw(tensor: Tensor) -> Tensor:
    """Its bytes, which every backend carries, whatever its type."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8)
