"""The memory of a rollout's or an evaluator's processes: the model in its format, keys and values, workspace.

The transformers engine lives in the replica's own process. vLLM and SGLang take a share of each GPU (`rollout.memory`)
whatever the model needs, and make keys and values of what weights and workspace leave.
"""

from __future__ import annotations

from math import ceil

from deploy.plan.memory.activations import FLOAT32
from deploy.plan.memory.model import ModelShape, Weight
from deploy.plan.memory.parts import GIB, Phase, ProcessMemory
from deploy.plan.memory.policy import CONTEXT, INTERPRETER, ITEMSIZE
from shared.config import Recipe
from shared.config.schema import Quantization

PROMPT = 512
"""Tokens that a prompt is taken to have; nothing in a recipe says it."""
FIRST_ROW, PREFILL = 128, 4096
"""Tokens of the transformers engine's rows at first, and of one prefill: shared/engines/{slots,transformers}.py."""
BATCHED = 8192
"""Tokens that vLLM and SGLang compute in one step on a GPU with 70 GiB or more; fewer on a smaller one."""
GRAPHS = GIB
"""CUDA graphs of the decode step: an assumption, as nothing here was measured on a GPU."""
BYTES: dict[Quantization, float] = {
    "fp8": 1.0,
    "fp8_block": 1 + 4 / (128 * 128),
    "mxfp8": 1 + 1 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes of a weight with its share of the scales."""


def engine_processes(recipe: Recipe, shape: ModelShape, replica: str, gpu: int | None) -> list[ProcessMemory]:
    """The processes of a replica of that name that hold the model; `gpu` bytes has each GPU, None without one."""
    role = replica.rpartition("-")[0]
    slots = recipe.evaluator.slots if role == "evaluator" else recipe.rollout.slots
    quantization = recipe.rollout.quantization if role == "rollout" else None
    tokens = sequence_tokens(recipe, shape, role)
    if recipe.rollout.engine_of(replica) == "transformers":
        return [_transformers(recipe, shape, role, slots, tokens, gpu)]
    return _hosted(recipe, shape, role, slots, tokens, quantization, gpu)


def sequence_tokens(recipe: Recipe, shape: ModelShape, role: str) -> int:
    """Tokens of the longest sequence that the role generates, with its prompt."""
    asked = [suite.max_new_tokens for suite in recipe.evaluation.suites.values()] if recipe.evaluation else []
    if role == "rollout" and recipe.train is not None:
        asked.append(recipe.rollout.max_new_tokens)
    return min(shape.context, PROMPT + max(asked, default=recipe.rollout.max_new_tokens))


def engine_weights(shape: ModelShape, itemsize: int, quantization: Quantization | None) -> int:
    """Bytes of the model as an engine holds it: linear layers and experts narrow, all else as it is."""
    return sum(
        ceil(w.numel * (BYTES[quantization] if _narrow(w) and quantization else itemsize)) for w in shape.weights
    )


def _narrow(weight: Weight) -> bool:
    """Embeddings, head, norms, routers and the vision tower keep their type."""
    from shared.weights.slices import LAYER, Split, split_of

    linear = split_of(weight.name, weight.shape) in (Split.COLUMN, Split.ROW, Split.EXPERTS)
    return linear and len(weight.shape) > 1 and LAYER.search(weight.name) is not None


# --- the engine in the process ----------------------------------------------------------------------------------------


def _transformers(
    recipe: Recipe, shape: ModelShape, role: str, slots: int, tokens: int, gpu: int | None
) -> ProcessMemory:
    """One process; quantisation is emulated there and saves nothing. It computes on the CPU, also where a GPU is."""
    itemsize = ITEMSIZE[recipe.model.dtype]
    weights = itemsize * shape.parameters
    row = min(FIRST_ROW, shape.context)
    while row < tokens:
        row = min(2 * row, shape.context)
    cache = slots * row * shape.cache_bytes(itemsize)
    logits = 4 * FLOAT32 * slots * shape.vocabulary  # as they come, and three of their size to draw from
    width = max(shape.intermediate * max(1, shape.experts_per_token), shape.heads * shape.head_dim)
    prefill = PREFILL * (shape.cache_bytes(itemsize) + itemsize * (3 * width + 4 * shape.hidden))
    static = {"Python and libraries": INTERPRETER, "weights": weights}
    workspace = {"workspace": max(logits, prefill)}
    phases = (
        Phase(
            "generating",
            # rows that grow exist twice for a moment: keys of all layers, then values
            {**static, "keys and values": cache * 5 // 4, **workspace, "weights that came": weights},
        ),
        Phase("new weights", {**static, "keys and values": cache, "weights that came, last ones too": 2 * weights}),
    )
    return ProcessMemory(role, "rank 0 of 1", (), phases, ("computes on the CPU",) if gpu is not None else ())


# --- engines with processes of their own ------------------------------------------------------------------------------


def _hosted(
    recipe: Recipe,
    shape: ModelShape,
    role: str,
    slots: int,
    tokens: int,
    quantization: Quantization | None,
    gpu: int | None,
) -> list[ProcessMemory]:
    """vLLM or SGLang: rank 0 keeps what arrives in shared memory, the workers map it and hold the model."""
    ranks = recipe.rollout.parallel.ranks
    itemsize = 2 if quantization is not None else ITEMSIZE[recipe.model.dtype]
    arrived = ITEMSIZE[recipe.model.dtype] * shape.parameters
    weights = ceil(engine_weights(shape, itemsize, quantization) / ranks)
    cache_token = ceil(shape.cache_bytes(itemsize) / ranks)
    imports = {"Python and libraries": INTERPRETER}
    head = ProcessMemory(
        role, f"rank 0 of {1 + ranks}, without a model", (), (Phase("new weights", {**imports, "copies": 2 * arrived}),)
    )
    if gpu is None:
        cache = slots * shape.context * cache_token  # what prepare_process gives to the cache of a CPU
        parts = {
            **imports,
            "weights": weights,
            "keys and values": cache,
            "workspace": _workspace(shape, itemsize, slots),
        }
        worker = [
            ProcessMemory(role, f"rank {rank} of {1 + ranks}", (), (Phase("generating", parts),))
            for rank in range(1, 1 + ranks)
        ]
        return [head, *worker]
    workspace = _workspace(shape, itemsize, slots) + GRAPHS
    share = int(recipe.rollout.memory * gpu)
    room = share - CONTEXT - weights - workspace
    parts = {"CUDA context": CONTEXT, "weights": weights, "workspace and graphs": workspace}
    # an engine refuses to start if its cache cannot hold one sequence as long as the model's context
    parts["keys and values"] = max(room, shape.context * cache_token)
    parts["left alone by rollout.memory"] = gpu - share
    held = max(0, room) // cache_token
    notes = (
        f"room for keys and values of {held:,} tokens: {held // tokens} sequences of {tokens:,} tokens at a time, "
        f"of {slots} slots",
    )
    # the update of a weight maps what arrived and copies it tensor by tensor
    host = (Phase("generating", {"Python and libraries": INTERPRETER + CONTEXT}),)
    return [
        head,
        *(
            ProcessMemory(role, f"rank {rank} of {1 + ranks}", (Phase("generating", parts),), host, notes)
            for rank in range(1, 1 + ranks)
        ),
    ]


def _workspace(shape: ModelShape, itemsize: int, slots: int) -> int:
    """Activations of one step without gradients, and logits of all sequences in float32 with a copy to sort."""
    width = 3 * shape.intermediate * max(1, shape.experts_per_token) + 4 * shape.hidden
    return itemsize * BATCHED * width + 3 * FLOAT32 * slots * shape.vocabulary
