"""Steering: what persons have asked of the run that it has yet to do.

    asked -> done        (a checkpoint, an evaluation)        going <-> paused

A pause holds back new batches and nothing else: the batch in hand is finished, leases go on as far as the staleness
bound lets them, what was asked for besides is done. It outlives the controller, and ends when a run that had ended is
resumed.
"""

from __future__ import annotations

import msgspec


class Steering(msgspec.Struct):
    """`paused` is the cause of a pause, "" without one; `checkpoint` and `evaluate` are asked for and due."""

    paused: str = ""
    checkpoint: bool = False
    evaluate: bool = False
