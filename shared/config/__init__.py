"""Recipes: TOML files checked against one strict schema. Importable without torch."""

from shared.config.live import check_changes, check_scale, live_fields, live_values
from shared.config.load import RecipeError, dump_recipe, load_recipe
from shared.config.schema import Recipe

__all__ = [
    "Recipe",
    "RecipeError",
    "check_changes",
    "check_scale",
    "dump_recipe",
    "live_fields",
    "live_values",
    "load_recipe",
]
