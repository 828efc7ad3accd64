"""The error of everything that makes models."""

from __future__ import annotations


class ModelError(Exception):
    """A model or tokenizer that cannot be had; the text says what was expected, what came, what to do."""
