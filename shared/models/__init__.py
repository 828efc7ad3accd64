"""Models and tokenizers of a recipe's [model]: `load_tokenizer`, `load_config`, `load_model`, `load_skeleton`."""

from __future__ import annotations

from shared.models.errors import ModelError
from shared.models.load import load_config, load_model, load_skeleton, load_tokenizer

__all__ = ["ModelError", "load_config", "load_model", "load_skeleton", "load_tokenizer"]
