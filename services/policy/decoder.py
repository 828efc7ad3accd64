"""A decoder-only model, or the layers of one pipeline stage, from a micro-batch to log-probabilities.

Walks a Hugging Face model as it is - embeddings, layers, norm, head - so that layers can be anybody's: of one process,
or of a rank that has a part of each. The families that it knows are built alike (Qwen2, Qwen3, Qwen3-MoE, Llama, and
the text model of Qwen2.5-VL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.policy.attention import PACKED, Line
from services.policy.layouts.collectives import cut_gather, gather_cut, gather_uneven
from services.policy.layouts.grid import Grid
from services.policy.logprobs import token_logprobs
from services.policy.packing import MicroBatch
from shared.weights.slices import part


class Decoder(nn.Module):
    """`grid` says which layers the model has left, and who shares what of a micro-batch. Weights stay the model's."""

    def __init__(self, model: PreTrainedModel, grid: Grid, *, sequence: bool = False) -> None:
        super().__init__()
        self.model = model
        self.text: Any = text_model(model)
        self._grid = grid
        self._context, self._tensor = grid.axis("cp"), grid.axis("tp")
        self._sequence = sequence
        config: Any = self.text.config
        config._attn_implementation = PACKED
        self._vocabulary = int(config.vocab_size)
        self._axes = 3 if text_model(model) is not model.model else 1  # of rotary positions

    def forward(self, micro: MicroBatch, hidden: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [T] of the response tokens; before the last stage, its hidden states.

        `hidden` [1, S here, H] comes from the stage before. With context or sequence parallelism S here is a rank's
        part of the line.
        """
        context = self._context
        first, last = part(micro.size, context.size, context.index)
        if self._grid.first:
            hidden = self._embedded(micro)[:, first:last]
            if self._sequence:
                hidden = cut_gather(hidden, self._tensor, 1)
        assert hidden is not None
        positions = micro.positions[..., first:last]
        positions = positions.expand(3, -1)[:, None] if self._axes == 3 else positions[None]
        blocks = micro.blocks if context.group is None else micro.blocks_between(first, last)
        rotary = self.text.rotary_emb(hidden, positions)
        line = Line.of(blocks, context, hidden.dtype)
        for layer in self.text.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False, line=line)
        if not self._grid.last:
            return hidden
        return self._scored(micro, self.text.norm(hidden))

    def _embedded(self, micro: MicroBatch) -> Tensor:
        """Embeddings [1, S, H] of the whole line, those of images in their places."""
        embedded: Tensor = self.text.embed_tokens(micro.inputs[None])
        base: Any = self.model.model
        if micro.pixels is not None:
            found = base.get_image_features(micro.pixels, micro.grids).pooler_output
            places = (micro.inputs == self.model.config.image_token_id)[None, :, None]
            return embedded.masked_scatter(places, torch.cat(list(found)).to(embedded.dtype))
        if self._axes == 3 and self._grid.axis("fsdp").group is not None:
            # every rank of the axis has to sum gradients of the vision tower when one of them has an image
            vision = self.model.config.vision_config
            merge, patch = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size
            blank = embedded.new_zeros((merge**2, patch * vision.patch_size**2))
            grid = torch.tensor([[1, merge, merge]], device=embedded.device)
            (nothing,) = base.get_image_features(blank, grid).pooler_output
            return embedded + 0.0 * nothing.sum()
        return embedded

    def _scored(self, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self._sequence:
            hidden = gather_cut(hidden, self._tensor, 1)
        context, tensor = self._context, self._tensor
        # who has the place of each token's distribution, and how many places they have
        bounds = [part(micro.size, context.size, index)[1] for index in range(context.size)]
        whose = torch.bucketize(micro.picks, torch.tensor(bounds, device=hidden.device), right=True)
        mine = whose == context.index
        first, _ = part(micro.size, context.size, context.index)
        weight: Tensor = self.model.get_output_embeddings().weight
        found = token_logprobs(
            hidden[0, micro.picks[mine] - first],
            weight,
            micro.targets[mine],
            micro.temperatures[mine],
            axis=tensor,
            first=part(self._vocabulary, tensor.size, tensor.index)[0],
        )
        if context.group is None:
            return found
        sizes = torch.bincount(whose, minlength=context.size).tolist()
        back = torch.argsort(torch.argsort(whose, stable=True))
        logprobs, entropy = (gather_uneven(each, context, sizes)[back] for each in found)
        return logprobs, entropy


def text_model(model: PreTrainedModel) -> Any:
    """The part of a model that has embeddings, layers and norm."""
    base: Any = model.model
    return base.language_model if hasattr(base, "language_model") else base
