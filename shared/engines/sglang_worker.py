"""Inside SGLang's scheduler processes: weights from the rollout's shared memory, as a custom weight loader; ranks.

SGLang imports `load_shared` by name for updates of that format, and calls it with the model and one empty tensor, whose
name says where the weights lie: a name can be read by every rank, a tensor's memory by one. Each rank maps the same
memory and its layers' own loaders take the slices that are theirs.

At its start each scheduler calls `join_replica`, the factory of a forward hook, which makes no hook: it is the place
where SGLang lets others' code run in a scheduler whose model stands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from sglang.srt.runtime_context import get_parallel

from shared.engines.checkpoint import checkpoint_tensors
from shared.engines.ranks import join
from shared.weights import TensorSpec, area_bytes, open_shared, tensor_views

LOADER = "shared.engines.sglang_worker.load_shared"
"""The name by which SGLang knows the loader."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where weights lie (see shared.weights.memory), and the manifest of that memory.

    `taken` is a memory of `ranks` bytes, one each, in which a rank says that it has loaded them: SGLang itself answers
    once the first stage of a pipeline has.
    """

    path: str
    manifest: list[TensorSpec]
    taken: str
    ranks: int


def named_place(place: Place) -> list[tuple[str, torch.Tensor]]:
    """The place as the name of an empty tensor, which is all that an update carries."""
    return [(msgspec.json.encode(place).decode(), torch.empty(0))]


def load_shared(model: Any, named: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Map the memory and hand its tensors to the model's loader; forget what the old vision tower saw."""
    from sglang.srt.managers import mm_schedule

    [(name, _)] = named
    place = msgspec.json.decode(name, type=Place)
    memory = open_shared(place.path, area_bytes(place.manifest))
    model.load_weights(checkpoint_tensors(tensor_views(memory, place.manifest)))
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()
    here = get_parallel()
    open_shared(place.taken, place.ranks)[here.pp_rank * here.tp_size + here.tp_rank] = 1


def join_hook(invitation: bytes) -> dict[str, Any]:
    """What SGLang is given as a forward hook, so that each scheduler joins the replica."""
    return {
        "name": "ranks of the replica",
        "target_modules": ["*"],
        "hook_factory": f"{__name__}:{join_replica.__name__}",
        "config": {"invitation": invitation.decode()},
    }


def join_replica(config: dict[str, str]) -> None:
    """Be a rank of the replica, on the bus."""
    # it would warn that there is no hook in what comes back
    logging.getLogger("sglang.srt.model_executor.hook_manager").setLevel(logging.ERROR)
    join(config["invitation"].encode(), torch.distributed.get_rank())
