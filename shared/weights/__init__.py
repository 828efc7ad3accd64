"""Weights on the move: staged copies, their digests, transfer over a mesh, and loading in place."""

from __future__ import annotations

from shared.weights.digest import digest_of
from shared.weights.errors import WeightsError
from shared.weights.staging import StagedWeights, TensorSpec, load_into, manifest_of, stage
from shared.weights.transfer import receive_weights, send_weights

__all__ = [
    "StagedWeights",
    "TensorSpec",
    "WeightsError",
    "digest_of",
    "load_into",
    "manifest_of",
    "receive_weights",
    "send_weights",
    "stage",
]
