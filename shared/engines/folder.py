"""A model's folder without weights, for engines that read configuration and tokenizer from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files; the model may be on the meta device."""
    model.config.architectures = [type(model).__name__]  # set by saving weights alone, and what engines choose code by
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
