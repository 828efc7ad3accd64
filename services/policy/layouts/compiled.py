"""Decoder layers compiled by torch.compile, each by itself (`policy.compile`).

Graphs have no fixed lengths, so that the layers share a few of them, however long a micro-batch is. What depends on who
has what of it stays outside and divides a layer's graph: attention over packed lines, collectives, and experts, whose
tokens are counted while they run.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.compiler import lacking
from shared.models import ModelError


def compile_layer(layer: Any) -> None:
    """Have the layer computed by compiled code; it is built when the first micro-batch comes."""
    if hasattr(layer.mlp, "experts"):
        experts = layer.mlp.experts
        experts.forward = torch.compiler.disable(experts.forward)
    layer.forward = torch.compile(layer.forward, dynamic=True)


def check_compiler() -> None:
    """ModelError unless this machine has what torch.compile builds its code with."""
    if (lacks := lacking()) is not None:
        raise ModelError(f"policy.compile: expected {lacks}, or set policy.compile to false")
