"""The memory of each rank of a policy replica: what services/policy holds in each phase of a step.

Letters: N elements of the rank's part of the weights, e bytes of each (2 in bfloat16), P those of the whole model. Of a
model in bfloat16 N takes e N for the weights, 4 N for float32 masters, 8 N for AdamW's moments, 4 N for the gradients
that micro-batches are added up in, and in RL e N for the reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from deploy.plan.memory.activations import FLOAT32, Line
from deploy.plan.memory.model import ModelShape
from deploy.plan.memory.parts import GIB, MIB, Phase, ProcessMemory
from shared.config import Recipe

if TYPE_CHECKING:
    from shared.weights.slices import Parallel

ITEMSIZE = {"float32": 4, "bfloat16": 2}
SUMS = 32 * MIB
"""Gradients that are summed in one go inside a replica: SUM_BYTES of services/policy/layouts/compose.py."""
CONTEXT = 3 * GIB // 4
"""A CUDA context with cuBLAS's workspaces: an assumption, as nothing here was measured on a GPU."""
INTERPRETER = GIB // 2
"""Python with torch and transformers imported."""
KERNELS = 128 * MIB
"""What oneDNN keeps, which computes in bfloat16 on a CPU: as many primitives as services/policy/heap.py allows, of 0.2
to 2 MB, when batches of different shapes have filled the cache. Measured; float32 is left to MKL, which keeps none."""
SLACK = 0.05
"""Gaps that an allocator leaves, as a share of what comes and goes within a step."""


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's weights in elements. `owned`: what it hands on, of what others have too; `gathered`: as if FSDP did not
    cut them; `layer`: of the largest layer.
    """

    own: int
    owned: int
    largest: int
    gathered_layer: int
    gathered_rest: int
    head: int
    layers: int


def policy_processes(recipe: Recipe, shape: ModelShape, *, gpu: bool) -> list[ProcessMemory]:
    """Every rank of one policy replica. ValueError for a layout that the model cannot have."""
    from shared.weights.slices import Parallel

    parallel = Parallel.of(recipe.policy.parallel)
    world = parallel.world
    return [
        ProcessMemory(
            role="policy",
            rank=f"rank {rank} of {world}",
            device=tuple(_device(recipe, shape, parallel, rank)) if gpu else (),
            host=tuple(_host(recipe, shape, parallel, rank) if gpu else _together(recipe, shape, parallel, rank)),
        )
        for rank in range(world)
    ]


def held_by(shape: ModelShape, parallel: Parallel, rank: int) -> Held:
    """What a rank has of the model."""
    from shared.weights.slices import LAYER, Coordinates, held, owner, stage_layers

    architecture, place = shape.architecture, parallel.coordinates(rank)
    uncut = replace(parallel, fsdp=1)
    same = uncut.rank_of(Coordinates(*place._replace(fsdp=0)))
    own = owned = largest = rest = head = 0
    layers: Counter[str] = Counter()
    for weight in shape.weights:
        mine, whole = (held(weight, architecture, cut, index) for cut, index in ((parallel, rank), (uncut, same)))
        own += mine.numel if mine is not None else 0
        owned += mine.numel if mine is not None and owner(weight, architecture, parallel, rank) else 0
        largest = max(largest, mine.numel if mine is not None else 0)
        if whole is None:
            continue
        if (layer := LAYER.search(weight.name)) is not None:
            layers[layer[1]] += whole.numel
        else:
            rest += whole.numel
            if weight.name.endswith("lm_head.weight") or (shape.tied and weight.name.endswith("embed_tokens.weight")):
                head = whole.numel
    count = len(stage_layers(shape.layers, parallel.pp, place.pp))
    return Held(own, owned, largest, max(layers.values(), default=0), rest, head, count)


# --- phases -----------------------------------------------------------------------------------------------------------


def _device(recipe: Recipe, shape: ModelShape, parallel: Parallel, rank: int) -> Iterator[Phase]:
    """What a GPU holds."""
    has = held_by(shape, parallel, rank)
    static = {"CUDA context": CONTEXT, **_kept(recipe, has)}
    yield Phase("gradients", {**static, **_gradients(recipe, shape, parallel, rank, has, "cuda")})
    yield from _after(recipe, has, static, 4 * has.own)  # AdamW takes the roots of all second moments at a time


def _host(recipe: Recipe, shape: ModelShape, parallel: Parallel, rank: int) -> Iterator[Phase]:
    """What is beside a GPU: the weights as they are read, and the copies that go out."""
    has = held_by(shape, parallel, rank)
    static = {"Python and libraries": INTERPRETER + CONTEXT}
    yield Phase("loading", {**static, "weights as they are read": _read(recipe, shape, has)})
    yield from _copies(recipe, shape, rank, has, static)


def _together(recipe: Recipe, shape: ModelShape, parallel: Parallel, rank: int) -> Iterator[Phase]:
    """A process without a GPU."""
    has = held_by(shape, parallel, rank)
    itemsize = ITEMSIZE[recipe.model.dtype]
    interpreter = {"Python and libraries": INTERPRETER}
    yield Phase(
        "loading",
        {**interpreter, "weights": itemsize * has.own, "weights as they are read": _read(recipe, shape, has)},
    )
    static = {
        **interpreter,
        "compiled kernels": KERNELS if itemsize < FLOAT32 else 0,
        **_kept(recipe, has),
    }
    copies = {"copy for publishing": itemsize * has.owned, "copy for checkpoints": _saved(recipe, shape, rank)}
    gradients = _gradients(recipe, shape, parallel, rank, has, "cpu")
    yield Phase("gradients", {**static, **copies, **gradients})
    yield from _after(recipe, has, {**static, **copies}, 2 * FLOAT32 * has.largest)
    yield from _copies(recipe, shape, rank, has, static)


def _read(recipe: Recipe, shape: ModelShape, has: Held) -> int:
    """Pages of the files that a rank reads its part from; a model that is drawn from a seed is there whole first."""
    return ITEMSIZE[recipe.model.dtype] * (has.own if recipe.model.build is None else shape.parameters)


def _kept(recipe: Recipe, has: Held) -> dict[str, int]:
    """What stays from step to step."""
    train = recipe.train
    several = train is not None and train.mu * train.minibatches > 1
    behaviour = ITEMSIZE[recipe.model.dtype] * has.own if several else 0
    return {**_state(recipe, has.own), "behaviour weights": behaviour}


def _state(recipe: Recipe, elements: int) -> dict[str, int]:
    """What a checkpoint holds of so many elements."""
    itemsize = ITEMSIZE[recipe.model.dtype]
    return {
        "weights": itemsize * elements,
        "float32 masters": FLOAT32 * elements if itemsize < FLOAT32 else 0,
        "optimizer moments": 2 * FLOAT32 * elements,
        "reference weights": itemsize * elements if recipe.train is not None else 0,
    }


def _gradients(
    recipe: Recipe, shape: ModelShape, parallel: Parallel, rank: int, has: Held, device: str
) -> dict[str, int]:
    """The fullest moment of a backward pass, of a micro-batch that is not the first.

    It is one of these: the loss is computed; the last layer goes backward, when all activations are still there; the
    first does, when all gradients are. A stage of a pipeline has as many micro-batches under way as stages behind it.
    """
    itemsize, place = ITEMSIZE[recipe.model.dtype], parallel.coordinates(rank)
    line = Line(shape, recipe.policy.parallel, line_tokens(recipe), itemsize)
    last, sharded = place.pp == parallel.pp - 1, parallel.fsdp > 1
    checkpointed = recipe.policy.gradient_checkpointing
    kept = line.entering_layer() if checkpointed else line.kept_by_layer()
    again = line.kept_by_layer() if checkpointed else 0
    backward = again + line.backward_of_layer()
    under_way = (parallel.pp - place.pp) * has.layers * kept
    tail = line.after_layers() if last else 0
    forward_block, backward_block = line.logprobs(device) if last else (0, 0)
    head = itemsize * has.head if last else 0
    layer = itemsize * (has.gathered_layer // parallel.fsdp if sharded else has.gathered_layer)
    lookup = itemsize * has.head if shape.tied and place.pp == 0 and last else 0
    everything = itemsize * (has.own + (has.gathered_rest if sharded else 0))
    moments = {
        "loss": (under_way + tail, max(forward_block, backward_block), head if backward_block else 0),
        "last layer": (under_way + backward, 0, head + layer),
        "first layer": (under_way - (has.layers - 1) * kept + backward, 0, everything + lookup),
    }
    activations, block, gradients = max(moments.values(), key=sum)
    found = {
        "activations": activations,
        "log-probs, a block of logits": block,
        "gradients of a micro-batch": gradients,
        "gradients added up": FLOAT32 * has.own,
        "gathered by FSDP": _gathered(itemsize, has) if sharded else 0,
    }
    return {**found, "allocator": int(SLACK * (activations + block + gradients))}


def _gathered(itemsize: int, has: Held) -> int:
    """Weights of the layer at work and of the next one, and of embeddings and head, which stay gathered all along.

    Gradients of a unit are summed in float32.
    """
    weights = itemsize * (has.gathered_rest + 2 * has.gathered_layer)
    return weights + FLOAT32 * max(has.gathered_layer, has.gathered_rest) + itemsize * has.gathered_layer


def _after(recipe: Recipe, has: Held, static: dict[str, int], roots: int) -> Iterator[Phase]:
    """Between backward and the next step."""
    gradients = {"gradients added up": FLOAT32 * has.own}
    if bucket := _bucket(recipe, has):
        yield Phase("summing gradients", {**static, **gradients, "communication bucket": bucket})
    yield Phase("optimizer step", {**static, **gradients, "AdamW's own": roots})


def _bucket(recipe: Recipe, has: Held) -> int:
    """A tensor larger than a bucket goes in one of its own."""
    found = 0
    if recipe.policy.replicas > 1:
        found = max(recipe.weights.bucket_mb * MIB, FLOAT32 * has.largest)
    table = recipe.policy.parallel
    if prod((table.replicate, table.ep, table.cp, table.tp)) > 1:
        found = max(found, min(max(SUMS, FLOAT32 * has.largest), FLOAT32 * has.own))
    return found


def _copies(recipe: Recipe, shape: ModelShape, rank: int, has: Held, static: dict[str, int]) -> Iterator[Phase]:
    """Copies that others read: of the weights, the next beside the last; of the state, one for each who asks."""
    saved = _saved(recipe, shape, rank)
    published = ITEMSIZE[recipe.model.dtype] * has.owned
    yield Phase("publishing", {**static, "copies for publishing": 2 * published, "copy for checkpoints": saved})
    if recipe.policy.replicas > 1 and rank == 0:
        copies = {"copy for publishing": published, "copy for checkpoints": saved, "copy for a joiner": saved}
        yield Phase("state for a joiner", {**static, **copies})


def _saved(recipe: Recipe, shape: ModelShape, rank: int) -> int:
    """The replica's whole state, in memory that rank 0 keeps from the first checkpoint on."""
    return sum(_state(recipe, shape.parameters).values()) if rank == 0 else 0


def line_tokens(recipe: Recipe) -> int:
    """Tokens of a micro-batch: of several rows, or of a single one that is longer."""
    longest = recipe.rollout.max_new_tokens if recipe.train is not None else 0
    return max(recipe.policy.micro_batch_tokens, longest)
