"""The errors of everything that makes models, and of what goes into them."""

from __future__ import annotations


class ModelError(Exception):
    """A model or tokenizer that cannot be had; the text says what was expected, what came, what to do."""


class ImageError(Exception):
    """An image that cannot be read, or that its prompt has no place for; the text says what was expected, what came."""
