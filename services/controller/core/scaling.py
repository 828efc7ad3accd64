"""Scaling: which replicas the launcher shall keep running, by name.

A run begins with the numbers of its recipe. A person changes the number of a role: more of them take the lowest free
names, fewer give up the newest ones. Replicas that somebody started by hand have names that are not wanted; they take
part like any other, and nothing here makes them leave. The launcher decides nothing: it asks for these names.
"""

from __future__ import annotations

from collections.abc import Container

import msgspec

from shared.config import Recipe
from shared.messages import Role


class Scaling(msgspec.Struct):
    """The wanted names of each role, oldest first."""

    names: dict[Role, list[str]]

    @classmethod
    def of(cls, recipe: Recipe) -> Scaling:
        """What a recipe begins with."""
        counts: dict[Role, int] = {"policy": recipe.policy.replicas, "rollout": recipe.rollout.replicas}
        if recipe.judge == "evaluator":
            counts["evaluator"] = recipe.evaluator.replicas
        return cls({role: [f"{role}-{number}" for number in range(count)] for role, count in counts.items()})

    @property
    def wanted(self) -> list[str]:
        """Every wanted name, policies first."""
        return [name for names in self.names.values() for name in names]

    def count(self, role: Role) -> int:
        """How many replicas of a role are wanted."""
        return len(self.names.get(role, ()))

    def scale(self, role: Role, count: int, taken: Container[str]) -> list[str]:
        """Want `count` replicas of a role; the names that were given up. New ones are not among those `taken`."""
        names = self.names[role]
        given_up = names[count:][::-1]
        del names[count:]
        number = 0
        while len(names) < count:
            name = f"{role}-{number}"
            if name not in names and name not in taken:
                names.append(name)
            number += 1
        return given_up

    def give_up(self, name: str) -> None:
        """This one is not wanted any more."""
        for names in self.names.values():
            if name in names:
                names.remove(name)
