"""Weights on the move: staged copies, their digests, transfer over a mesh, and loading in place."""

from __future__ import annotations

from shared.weights.digest import digest_of
from shared.weights.errors import WeightsError
from shared.weights.memory import open_shared
from shared.weights.staging import (
    StagedWeights,
    TensorSpec,
    area_bytes,
    load_into,
    manifest_of,
    tensor_views,
)
from shared.weights.transfer import receive_weights, send_weights

__all__ = [
    "StagedWeights",
    "TensorSpec",
    "WeightsError",
    "area_bytes",
    "digest_of",
    "load_into",
    "manifest_of",
    "open_shared",
    "receive_weights",
    "send_weights",
    "tensor_views",
]
