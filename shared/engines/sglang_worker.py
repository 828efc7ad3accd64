"""Inside SGLang's scheduler processes: weights from the rollout's shared memory, as a custom weight loader; ranks.

SGLang imports `load_shared` by name for updates of that format, and calls it with the model and one small tensor, which
says where the weights lie. Each rank maps the same memory and its layers' own loaders take the slices that are theirs.

At its start each scheduler calls `join_replica`, the factory of a forward hook, which makes no hook: it is the place
where SGLang lets others' code run in a scheduler whose model stands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from shared.engines.checkpoint import checkpoint_tensors
from shared.engines.ranks import join
from shared.weights import TensorSpec, area_bytes, open_shared, tensor_views

LOADER = "shared.engines.sglang_worker.load_shared"
"""The name by which SGLang knows the loader."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where weights lie (see shared.weights.memory), and the manifest of that memory."""

    path: str
    manifest: list[TensorSpec]


def place_tensor(place: Place) -> torch.Tensor:
    """The place as a tensor of bytes (uint8), which is all that an update carries."""
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(place)), dtype=torch.uint8)


def load_shared(model: Any, named: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Map the memory and hand its tensors to the model's loader."""
    [(_, raw)] = named
    place = msgspec.msgpack.decode(raw.numpy().tobytes(), type=Place)
    memory = open_shared(place.path, area_bytes(place.manifest))
    model.load_weights(checkpoint_tensors(tensor_views(memory, place.manifest)))


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
