"""Live hyper-parameters: which fields of a recipe may change while it runs, and whether a change is valid."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import BaseModel, ValidationError

from shared.config.load import RecipeError, explain
from shared.config.schema import Recipe

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
    return found


def live_values(recipe: Recipe) -> dict[str, Scalar]:
    """Dotted name -> current value of every live field: revision 0 of a run's hyper-parameters."""
    values: dict[str, Scalar] = {}
    for dotted in live_fields(recipe):
        table, name = dotted.split(".")
        values[dotted] = getattr(getattr(recipe, table), name)
    return values


def check_changes(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Scalar]:
    """The changes with the schema's types, or RecipeError telling which field, what was expected and what came."""
    live = live_fields(recipe)
    tree = copy.deepcopy(recipe.model_dump())
    for dotted, value in changes.items():
        if dotted not in live:
            raise RecipeError(
                f"{dotted} cannot change while the run goes on; live fields are: {', '.join(sorted(live))}"
            )
        table, name = dotted.split(".")
        tree[table][name] = value
    try:
        changed = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error)) from None
    values = live_values(changed)
    return {dotted: values[dotted] for dotted in changes}
