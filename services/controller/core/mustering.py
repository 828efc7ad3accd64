"""Mustering: how many replicas of a role a run waits for before it first gives them work.

    waiting -> mustered

The recipe says how many. The wait ends when they are ready, or `timeouts.load_s` after the first of them was: a run
begins with those that have come. Once mustered, a role is never waited for again, whoever is lost later.
"""

from __future__ import annotations

import msgspec

from shared.messages import Role


class Mustering(msgspec.Struct):
    """Roles that have mustered, and until when the others are waited for."""

    done: list[Role] = []
    until: dict[Role, float] = {}
