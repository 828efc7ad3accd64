"""What a plan has to know of a model: every weight's name and shape, and the widths that activations have.

Read from its configuration alone, by building it without memory for weights: what is planned is what transformers would
make.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from shared.config.schema import ModelTable

if TYPE_CHECKING:
    from shared.weights.slices import Architecture


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter; tied ones come once."""

    name: str
    shape: Sequence[int]

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model without its weights. `experts` is 0 for a dense one, and `intermediate` an expert's width for others."""

    name: str
    source: str
    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    experts_per_token: int
    normed_heads: bool
    vocabulary: int
    context: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def architecture(self) -> Architecture:
        """What cutting the weights has to know."""
        from shared.weights.slices import Architecture

        return Architecture(self.layers, self.heads, self.kv_heads, self.experts, self.tied)

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def shape_of(model: ModelTable) -> ModelShape:
    """The shape of [model]: from its folder, the hub's cache, the table of published models, or the hub. ModelError."""
    from shared.models.load import load_config, skeleton_of

    config, source = _known_config(model) or (load_config(model), "the hub")
    text: Any = config.get_text_config()
    skeleton = skeleton_of(config, model)
    heads = int(text.num_attention_heads)
    names = [name for name, _ in skeleton.named_parameters()]
    experts = int(getattr(text, "num_experts", 0) or 0)
    return ModelShape(
        name=model.path or f"a built {config.model_type}",
        source=source,
        weights=tuple(Weight(name, tuple(p.shape)) for name, p in skeleton.named_parameters()),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        heads=heads,
        kv_heads=int(text.num_key_value_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate=int(text.moe_intermediate_size if experts else text.intermediate_size),
        experts=experts,
        experts_per_token=int(text.num_experts_per_tok) if experts else 0,
        normed_heads=any(name.endswith("q_norm.weight") for name in names),
        vocabulary=int(text.vocab_size),
        context=int(text.max_position_embeddings),
        tied=bool(text.tie_word_embeddings),
    )


def _known_config(model: ModelTable) -> tuple[Any, str] | None:
    """The configuration, and where it is from, if it is at hand without the network."""
    from pathlib import Path

    from transformers import AutoConfig

    from deploy.plan.memory.published import published
    from shared.models.load import load_config

    if model.path is None:
        return load_config(model), "[model.build]"
    if Path(model.path).expanduser().is_dir() or model.path.startswith((".", "/", "~")):
        return load_config(model), "its config.json"
    try:
        return AutoConfig.from_pretrained(model.path, local_files_only=True), "the hub's cache"
    except (OSError, ValueError):
        known = published(model.path)
    if known is None:
        return None
    sizes = copy.deepcopy(known)  # of which a configuration keeps parts
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes), "the table of published models"
