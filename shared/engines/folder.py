"""A model's folder without weights, for engines that read configurations and tokenizer from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shared.models.images import ImageReader


def write_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, images: ImageReader | None = None
) -> None:
    """Write config.json, generation_config.json and the files of the tokenizer and of what reads images.

    The model may be on the meta device.
    """
    model.config.architectures = [type(model).__name__]  # set by saving weights alone, and what engines choose code by
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if images is not None:
        images.processor.save_pretrained(folder)
