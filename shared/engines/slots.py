"""The KV cache of the transformers engine: a fixed number of rows, each as long as its own sequence.

Owned by the engine alone. Rows in use are always the first ones, so that attention reads plain views of the cache,
cut to the longest sequence, and nothing is copied in a decode step. Invariant: memory that no sequence has written is
finite (zero or an older sequence's), since attention multiplies masked values by an exact 0.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache

FIRST_CAPACITY = 128
"""Tokens a row can hold at first; the rows double, up to the model's context, when a sequence outgrows them."""


class SlotCache(Cache):
    """Keys and values of all layers, each [slots, kv_heads, capacity, head_dim], presented to a model as its cache."""

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._context = context
        self._capacity = min(FIRST_CAPACITY, context)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows = 0
        self._span = 0
        self._targets = torch.empty(0, dtype=torch.int64)

    def place(self, prefill: DynamicCache, sources: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy prompts into rows: row `rows[i]` gets the keys and values of prompt `sources[i]`, padding and all."""
        first = prefill.layers[0].keys
        length = first.shape[2]
        self.reserve(length)
        if not self._keys:
            shape = (self._slots, first.shape[1], self._capacity, first.shape[3])
            self._keys = [first.new_zeros(shape) for _ in prefill.layers]
            self._values = [first.new_zeros(shape) for _ in prefill.layers]
        for layer, keys, values in zip(prefill.layers, self._keys, self._values, strict=True):
            keys[rows, :, :length] = layer.keys[sources]
            values[rows, :, :length] = layer.values[sources]

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` tokens of rows `sources` over rows `targets`; the two sets are disjoint."""
        for stored in (*self._keys, *self._values):
            stored[targets, :, :length] = stored[sources, :, :length]

    def reserve(self, length: int) -> None:
        """Make every row at least `length` tokens long."""
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity = min(2 * self._capacity, self._context)
        self._keys = [self._grown(keys) for keys in self._keys]
        self._values = [self._grown(values) for values in self._values]

    def _grown(self, stored: torch.Tensor) -> torch.Tensor:
        slots, heads, capacity, dimension = stored.shape
        grown = stored.new_zeros((slots, heads, self._capacity, dimension))
        grown[:, :, :capacity] = stored
        return grown

    def begin_step(self, positions: torch.Tensor, span: int) -> None:
        """Prepare a decode step: row i < len(positions) writes at `positions[i]`, all attend to the first `span`."""
        self.reserve(span)
        self._rows = positions.shape[0]
        self._span = span
        heads = self._keys[0].shape[1]
        starts = torch.arange(self._rows * heads).view(self._rows, heads) * self._capacity
        self._targets = (starts + positions[:, None]).flatten()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer in a decode step: write one token a row, return what to attend to.

        Both arguments are [rows, kv_heads, 1, head_dim], both views [rows, kv_heads, span, head_dim].
        """
        views = []
        for stored, states in ((self._keys[layer_idx], key_states), (self._values[layer_idx], value_states)):
            dimension = stored.shape[3]
            stored.view(-1, dimension).index_copy_(0, self._targets, states.reshape(-1, dimension))
            views.append(stored[: self._rows, :, : self._span])
        return views[0], views[1]
