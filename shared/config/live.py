"""Live hyper-parameters: which fields of a recipe may change while it runs, and whether a change is valid.

A live field is named as in the recipe, `table.key`; the weight of a part of the reward is `rewards.NAME.weight`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from shared.config.load import RecipeError, explain, with_floats
from shared.config.schema import Recipe
from shared.messages import Role

Scalar = bool | int | float | str


def live_fields(recipe: Recipe) -> dict[str, str]:
    """Dotted name -> description of every live field of the tables that this recipe has."""
    found: dict[str, str] = {}
    for table_name in type(recipe).model_fields:
        table = getattr(recipe, table_name)
        if not isinstance(table, BaseModel):
            continue
        for name, field in type(table).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("live"):
                found[f"{table_name}.{name}"] = field.description or ""
    for part in recipe.rewards.parts:
        found[f"rewards.{part.name}.weight"] = f"weight of the reward's part {part.name!r}"
    return found


def live_values(recipe: Recipe) -> dict[str, Scalar]:
    """Dotted name -> current value of every live field: revision 0 of a run's hyper-parameters."""
    tree = recipe.model_dump()
    values: dict[str, Scalar] = {}
    for dotted in live_fields(recipe):
        holder, key = _place(tree, dotted)
        values[dotted] = holder[key]
    return values


def check_changes(recipe: Recipe, values: Mapping[str, Scalar], changes: Mapping[str, Any]) -> dict[str, Scalar]:
    """The changes with the schema's types, given the live `values` that they come on top of.

    RecipeError telling which field, what was expected and what came.
    """
    live = live_fields(recipe)
    tree = copy.deepcopy(recipe.model_dump())
    for dotted, value in {**values, **changes}.items():
        if dotted not in live:
            raise RecipeError(
                f"{dotted} cannot change while the run goes on; live fields are: {', '.join(sorted(live))}"
            )
        holder, key = _place(tree, dotted)
        holder[key] = value
    checked = live_values(_validated(tree))
    return {dotted: checked[dotted] for dotted in changes}


def check_scale(recipe: Recipe, replicas: Mapping[Role, int]) -> None:
    """Whether the recipe would allow so many replicas of these roles; RecipeError if not."""
    tree = copy.deepcopy(recipe.model_dump())
    for role, count in replicas.items():
        tree[role]["replicas"] = count
    _validated(tree)


def _validated(tree: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(with_floats(tree))
    except ValidationError as error:
        raise RecipeError(explain(error)) from None


def _place(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The table and the key that a live field's name stands for."""
    table, _, rest = dotted.partition(".")
    name, _, key = rest.rpartition(".")
    if table == "rewards" and key == "weight":
        return next(part for part in tree["rewards"]["parts"] if part["name"] == name), "weight"
    return tree[table], rest
