"""Which container is which replica: one service of Compose for each role and engine, numbered by Compose from 1.

    rollout 1, 2, 3            rollout-0, rollout-1, rollout-2   (engine "transformers")
    rollout-vllm 1, 2          rollout-0, rollout-1              (engine "vllm")
    engine ["vllm", "sglang"]  rollout-vllm 1 is rollout-0, rollout-sglang 1 is rollout-1, rollout-vllm 2 is rollout-2

Pure; both sides compute it: the launcher from names to containers, a container from its number to its name.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from shared.config import Recipe

CONTROLLER = "controller"


class Container(NamedTuple):
    """A service of Compose, and the number that Compose gives one of its containers."""

    service: str
    number: int


def container_of(recipe: Recipe, replica: str) -> Container:
    """The container of a replica, given its name; ValueError for a name that is not ROLE-NUMBER."""
    role, _, number = replica.rpartition("-")
    if role not in ("policy", "rollout", "evaluator") or not number.isdigit():
        raise ValueError(f"{replica!r}: expected the name of a replica, such as rollout-1")
    service = _service(recipe, role, int(number))
    before = sum(_service(recipe, role, earlier) == service for earlier in range(int(number)))
    return Container(service, before + 1)


def replica_of(recipe: Recipe, container: Container) -> str:
    """The name of the replica that a container is; ValueError if the recipe has no such service."""
    role = container.service.partition("-")[0]
    engines = len(recipe.rollout.engines)
    if all(_service(recipe, role, number) != container.service for number in range(engines)):
        known = ", ".join(sorted({_service(recipe, role, number) for number in range(engines)}))
        raise ValueError(
            f"service {container.service}: expected one that the recipe has replicas for ({known}); "
            "rollout.engine decides which engine a replica runs"
        )
    alike = (number for number in itertools.count() if _service(recipe, role, number) == container.service)
    return f"{role}-{next(itertools.islice(alike, container.number - 1, None))}"


def _service(recipe: Recipe, role: str, number: int) -> str:
    engine = "transformers" if role == "policy" else recipe.rollout.engine_of(f"{role}-{number}")
    return role if engine == "transformers" else f"{role}-{engine}"
