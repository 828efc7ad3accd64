"""What the transformers engine does for a vision-language model: the embeddings and positions of prompts with images.

Owned by the engine. Images go through the vision tower once a request, however many samples it has and whenever these
get their slots; only new weights have them read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from shared.models.images import ImageReader, Pixels


@dataclass(slots=True)
class Sight:
    """The images of a request, and what the vision tower of the moment makes of them: None until it is asked.

    `offset` leads from a place behind the prompt to its rotary position, which images take fewer of than tokens;
    `features` is [image tokens, hidden], of all images one after another.
    """

    pixels: Pixels
    offset: int
    features: torch.Tensor | None = None


class Vision:
    """Makes a model's inputs of token ids and images."""

    def __init__(self, model: PreTrainedModel, reader: ImageReader) -> None:
        self._model = model
        self._merge = reader.merge

    def sight(self, pixels: Pixels | None, length: int) -> Sight | None:
        """The images of a prompt of `length` tokens."""
        if pixels is None:
            return None
        return Sight(pixels, int(pixels.positions(length + 1, self._merge)[0, -1]) - length)

    def inputs(self, padded: torch.Tensor, sights: Sequence[Sight | None]) -> dict[str, torch.Tensor]:
        """Embeddings and rotary positions of sequences [rows, length] that begin with prompts of these images.

        An image token that the model wrote itself is a token like any other: only the prompt's become images.
        """
        rows, length = padded.shape
        embeddings = self._model.get_input_embeddings()(padded)
        positions = torch.arange(length).repeat(3, rows, 1)
        for row, sight in enumerate(sights):
            if sight is not None:
                places = torch.cat([torch.arange(*place) for place in sight.pixels.places])
                embeddings[row, places] = self._features(sight)
                positions[:, row] = sight.pixels.positions(length, self._merge)
        return {"inputs_embeds": embeddings, "position_ids": positions}

    def _features(self, sight: Sight) -> torch.Tensor:
        if sight.features is None:
            pixels = sight.pixels
            seen = self._model.get_image_features(pixels.values, pixels.grids, return_dict=True)
            sight.features = torch.cat(seen.pooler_output).to(self._model.dtype)
        return sight.features
