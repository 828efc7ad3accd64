"""Models of a recipe's [model] and what goes with them: `load_tokenizer`, `load_config`, `load_model`, `load_skeleton`,
and `load_images` for vision-language models."""

from __future__ import annotations

from shared.models.errors import ImageError, ModelError
from shared.models.load import load_config, load_images, load_model, load_skeleton, load_tokenizer

__all__ = ["ImageError", "ModelError", "load_config", "load_images", "load_model", "load_skeleton", "load_tokenizer"]
