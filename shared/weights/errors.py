"""The error of everything that moves weights."""

from __future__ import annotations


class WeightsError(Exception):
    """Weights that do not fit the model or did not arrive; the text says what was expected and what came."""
