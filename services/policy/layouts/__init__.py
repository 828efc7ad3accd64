"""A policy replica of several ranks: who has what of the model, one file an axis; `compose` puts them together.

Invariant: loss and gradients of every layout are those of one process, within rounding; `make parallel-table` shows it.
"""
