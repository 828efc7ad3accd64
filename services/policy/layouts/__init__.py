"""A policy replica of several ranks: which of them has what of the model, one file an axis; `compose` puts them together.

Invariant: loss and gradients of every layout are those of one process, within rounding; `make parallel-table` shows it.
"""
