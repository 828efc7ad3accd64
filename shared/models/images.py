"""How a vision-language model reads images: the same pixels and the same tokens in every engine and in the trainer.

The tower of such a model makes a number of embeddings of an image that depends on its size alone, and each takes the
place of one *image token* of the prompt. Chat templates write one image token an image; `expand` repeats it to what
the model reads, and that is the prompt of a `Request`. Invariant: the tokens of a request are, one for one, the
positions of the model's context; nobody behind it adds any.

Hugging Face's own image processor resizes and normalises, by Pillow: its twin of torchvision rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from shared.models.errors import ImageError

FAMILIES = ("qwen2_5_vl",)
"""`model_type` of the vision-language models whose images are understood."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """The images of one prompt, as the vision tower takes them.

    `values` float32 [patches, values of a patch], of all images one after another; `grids` int64 [images, 3] are each
    one's patches in time (1), height and width; `places` says which tokens of the prompt, [start, end), are whose.
    """

    values: torch.Tensor
    grids: torch.Tensor
    places: tuple[tuple[int, int], ...]

    def names(self) -> list[str]:
        """A name of each image by its content, 16 hexadecimal digits; equal pixels in another grid have another."""
        parts = self.values.split(self.grids.prod(-1).tolist())
        return [
            blake2b(f"{grid.tolist()}".encode() + part.numpy().tobytes(), digest_size=8).hexdigest()
            for part, grid in zip(parts, self.grids, strict=True)
        ]

    def positions(self, length: int, merge: int) -> torch.Tensor:
        """Rotary positions in time, height and width, int64 [3, length], of a sequence that begins with the prompt.

        Text counts on in all three at once. An image stands still in time and counts rows and columns of its merged
        patches from there, and what follows begins after the larger of these (M-RoPE; Wang et al., "Qwen2-VL", 2024).
        """
        parts: list[torch.Tensor] = []
        done = following = 0
        for (start, end), (_, height, width) in zip(self.places, (self.grids // merge).tolist(), strict=True):
            parts.append(torch.arange(following, following + start - done).expand(3, -1))
            following += start - done
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            parts.append(following + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
            following += max(height, width)
            done = end
        parts.append(torch.arange(following, following + length - done).expand(3, -1))
        return torch.cat(parts, dim=1)


class ImageReader:
    """Reads images for one model: `processor` is its image processor, `token` the id of its image token."""

    def __init__(self, processor: Any, token: int) -> None:
        self.processor = processor
        self.token = token

    @property
    def merge(self) -> int:
        """Patches in height, and in width, that become one token."""
        return int(self.processor.merge_size)

    def tokens_of(self, image: np.ndarray) -> int:
        """How many tokens an image takes. Raises `ImageError`."""
        _check(image)
        try:
            patches = self.processor.get_number_of_image_patches(*image.shape[:2])
        except ValueError as error:  # a stripe of an image
            raise ImageError(f"an image of {_size(image)} cannot be resized: {error}; cut or pad it") from error
        return int(patches) // self.merge**2

    def expand(self, prompt: Sequence[int], images: Sequence[np.ndarray]) -> list[int]:
        """The tokens that the model reads of a prompt with one image token an image. Raises `ImageError`."""
        if (found := list(prompt).count(self.token)) != len(images):
            raise ImageError(
                f"expected one image token ({self.token}) in the prompt for each image, got {found} for {len(images)} "
                f"images; the chat template writes one where a message names an image"
            )
        left = iter(images)
        expanded: list[int] = []
        for token in prompt:
            expanded += [token] * (self.tokens_of(next(left)) if token == self.token else 1)
        return expanded

    def read(self, prompt: Sequence[int], images: Sequence[np.ndarray]) -> Pixels | None:
        """The pixels of the images of an expanded prompt, None without any. Raises `ImageError`."""
        wanted = [self.tokens_of(image) for image in images]
        places = _runs(prompt, self.token)
        found = [end - start for start, end in places]
        if found != wanted:
            raise ImageError(
                f"expected a run of image tokens ({self.token}) in the prompt for each image, of {wanted or 'no'} "
                f"tokens, got runs of {found or 'no'} tokens; make the prompt by ImageReader.expand, with another "
                f"token between two images"
            )
        if not images:
            return None
        made = self.processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        return Pixels(made["pixel_values"].float(), made["image_grid_thw"].long(), tuple(places))


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"expected an image as uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def _runs(prompt: Sequence[int], token: int) -> list[tuple[int, int]]:
    """Where `token` stands in the prompt, as [start, end) of each run."""
    marked = np.concatenate(([0], np.asarray(prompt) == token, [0])).astype(np.int8)
    edges = np.flatnonzero(np.diff(marked))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
