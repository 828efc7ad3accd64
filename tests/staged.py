"""A staged copy of a whole model, as an engine receives it."""

from __future__ import annotations

from torch import nn

from shared.weights import StagedWeights, digest_of, manifest_of
from shared.weights.staging import allocate, load_tensors, named_weights


def stage(model: nn.Module) -> StagedWeights:
    """Copy the model's weights as they are now."""
    area = allocate(manifest_of(model))
    load_tensors(area.tensors, named_weights(model))
    return StagedWeights(area, digest_of(area.tensors))
