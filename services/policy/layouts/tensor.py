"""Tensor parallelism: each rank has some heads, some columns of each MLP and a part of the vocabulary.

Weights are cut already; here the layers learn to sum. With sequence parallelism (Korthikanti et al., arXiv 2205.05198)
what lies between attention and MLP exists once: each rank keeps its part of the line and gathers it where it is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from services.policy.layouts.collectives import (
    cut_gather,
    gather_cut,
    gather_scatter,
    keep_sum,
    scatter_gather,
    sum_keep,
)
from services.policy.layouts.grid import Axis

LINE = 1
"""The dimension of hidden states along the line."""


def share_layer(layer: nn.Module, axis: Axis, *, sequence: bool) -> None:
    """Have a decoder layer with cut weights compute what a whole one does; nothing to do on an axis of one rank."""
    if axis.group is None:
        return

    def enter(hidden: Tensor) -> Tensor:
        return gather_scatter(hidden, axis, LINE) if sequence else keep_sum(hidden, axis)

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return scatter_gather(output, axis, LINE) if sequence else sum_keep(output, axis)

    attention: Any = layer.self_attn
    attention.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "hidden_states": enter(kwargs["hidden_states"])}),
        with_kwargs=True,
    )
    attention.o_proj.register_forward_hook(leave)
    mlp: Any = layer.mlp
    if hasattr(mlp, "experts"):  # the router needs all tokens, and what experts make of them is summed there
        if sequence:
            mlp.register_forward_pre_hook(lambda _module, args: (gather_cut(args[0], axis, LINE),))
            mlp.register_forward_hook(lambda _module, _args, output: cut_gather(output, axis, LINE))
    else:
        mlp.register_forward_pre_hook(lambda _module, args: (enter(args[0]),))
        mlp.down_proj.register_forward_hook(leave)


def share_embedding(embedding: nn.Embedding, axis: Axis, first: int) -> None:
    """Look up the tokens `first` ... of which this rank has the embeddings, and sum over the ranks."""
    if axis.group is None:
        return
    size = embedding.weight.shape[0]
    elsewhere: list[Tensor] = []
    if embedding.padding_idx is not None:
        own = embedding.padding_idx - first
        embedding.padding_idx = own if 0 <= own < size else None

    def enter(_module: nn.Module, args: Any) -> tuple[Tensor]:
        places = args[0] - first
        outside = (places < 0) | (places >= size)
        elsewhere.append(outside)
        return (places.masked_fill(outside, 0),)

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return sum_keep(output.masked_fill(elsewhere.pop()[..., None], 0.0), axis)

    embedding.register_forward_pre_hook(enter)
    embedding.register_forward_hook(leave)
