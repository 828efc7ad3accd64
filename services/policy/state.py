"""The whole state of a policy replica: everything that decides what the coming batches do.

Parameters, the optimizer's moments, masters and step count, the stage, the reference weights, the CPU's random
generator: scalars (`Head`) and tensors by name. Tensors are whole here, whatever the replica's layout: each rank writes
the parts that it owns into them, and takes its own parts out of them, so that a checkpoint fits every layout and
policies of different layouts can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from services.policy.layouts.compose import Layout
from services.policy.trainer import Snapshot, Stage, Trainer
from shared.messages import Position
from shared.weights import StagedWeights, TensorSpec, digest_of
from shared.weights.digest import MODULUS, box_sum, hexadecimal
from shared.weights.staging import allocate, load_tensors, spec_of

MODEL, OPTIMIZER, REFERENCE, RANDOM = "model/", "optimizer/", "reference/", "random/cpu"
RANDOM_DEVICE = "random/cuda:0"


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scalars of a state. `reference` is where the stage's reference weights were taken."""

    position: Position
    stage: Stage | None
    steps: int
    reference: Position | None


def head_of(trainer: Trainer) -> Head:
    """The scalars of the trainer's state; it must be between two steps."""
    steps = trainer.optimizer.steps if trainer.optimizer is not None else 0
    return Head(trainer.position, trainer.stage, steps, trainer.reference.position if trainer.reference else None)


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of this rank's part of the state by name; not copies."""
    found = {MODEL + name: tensor for name, tensor in trainer.layout.weights().items()}
    if trainer.optimizer is not None:
        found |= {OPTIMIZER + name: tensor for name, tensor in trainer.optimizer.tensors().items()}
    if trainer.reference is not None:
        found |= {REFERENCE + name: tensor for name, tensor in trainer.reference.tensors.items()}
    return {**found, RANDOM: torch.get_rng_state()}


def random_of_device(trainer: Trainer) -> dict[str, Tensor]:
    """The random generator of this rank's GPU: a checkpoint keeps it too, though no step draws from it."""
    device = trainer.device
    return {RANDOM_DEVICE: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}


def write(trainer: Trainer, targets: Mapping[str, Tensor]) -> None:
    """Copy those of this rank's parts that it owns into whole tensors."""
    layout = trainer.layout
    for name, part in tensors_of(trainer).items():
        if name != RANDOM:
            layout.write(parameter_of(name), part, targets[name])
        elif layout.grid.rank == 0:
            targets[name].copy_(part)


def stage(layout: Layout) -> tuple[StagedWeights, int]:
    """A copy of what this rank owns of the weights, and what that adds to their digest."""
    parts = layout.weights()
    specs = {spec.name: spec for spec in layout.manifest if spec.name in parts}
    owned = ((name, layout.owned(name, layout.grid.rank)) for name in specs)
    boxes = {name: box for name, box in owned if box is not None}
    area = allocate([spec_of(name, parts[name]) for name in boxes])
    load_tensors(area.tensors, {name: parts[name] for name in boxes})
    sums = (box_sum(name, area.tensors[name], specs[name].shape, box) for name, box in boxes.items())
    total = sum(sums) % MODULUS
    return StagedWeights(area, hexadecimal(total), None if layout.whole else layout.shared), total


def parameter_of(name: str) -> str:
    """The parameter that a tensor of the state belongs to: "optimizer/exp_avg/NAME" -> NAME."""
    kind, _, rest = name.partition("/")
    return rest.partition("/")[2] if kind + "/" == OPTIMIZER else rest


def kinds(whole: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state as "model", "optimizer", "reference" and "random", by the names that they have there."""
    found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "reference": {}, "random": {}}
    for name, tensor in whole.items():
        kind, _, rest = name.partition("/")
        found[kind][rest] = tensor
    return found


def state_digest(head: Head, tensors: Mapping[str, Tensor]) -> str:
    """The digest of a whole state: of its tensors, and of its scalars."""
    scalars = hashlib.blake2b(msgspec.msgpack.encode(head), digest_size=8).hexdigest()
    return f"{digest_of(tensors)}{scalars}"


def manifest_for(head: Head, layout: Layout) -> list[TensorSpec]:
    """What a whole state with this head holds, of the model of `layout`."""
    found = [TensorSpec(MODEL + spec.name, spec.dtype, spec.shape) for spec in layout.manifest]
    for spec in layout.manifest if head.stage is not None else ():
        moments = ["exp_avg", "exp_avg_sq"] if head.steps else []
        masters = ["master"] if spec.dtype != "float32" else []
        found += [TensorSpec(f"{OPTIMIZER}{kind}/{spec.name}", "float32", spec.shape) for kind in (*moments, *masters)]
    if head.reference is not None:
        found += [TensorSpec(REFERENCE + spec.name, spec.dtype, spec.shape) for spec in layout.manifest]
    return [*found, spec_of(RANDOM, torch.get_rng_state())]


def cut(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of a whole state; not copies."""
    own = layout.weights()
    return {
        name: tensor if name == RANDOM else layout.cut(parameter_of(name), tensor)
        for name, tensor in tensors.items()
        if name == RANDOM or parameter_of(name) in own
    }


def restore(trainer: Trainer, head: Head, parts: Mapping[str, Tensor]) -> None:
    """Put this rank's parts of a state into the trainer, which holds the head's position afterwards."""
    layout = trainer.layout
    found: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}, REFERENCE: {}}
    for name, part in parts.items():
        kind = name.partition("/")[0] + "/"
        if name != RANDOM:  # parts of the optimizer and the model are copied by whoever takes them
            found[kind][name.removeprefix(kind)] = part.to(trainer.device, copy=True) if kind == REFERENCE else part
    load_tensors(layout.weights(), found[MODEL])
    reference = Snapshot(head.reference, found[REFERENCE]) if head.reference is not None else None
    trainer.restore(head.position, head.stage, head.steps, found[OPTIMIZER], reference)
    torch.set_rng_state(parts[RANDOM].clone())
