"""Reading recipes: TOML text, `--set` overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tomlkit
from pydantic import BaseModel, ValidationError

from shared.config.schema import Recipe


class RecipeError(Exception):
    """A recipe that cannot be used; the text tells what was expected, what came, and what to do."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file at `path`, `overrides` ("train.lr=1e-5") applied; RecipeError if it is not one."""
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"no recipe at {path}: give the path of a TOML file, for example recipes/quickstart.toml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(_floats(tree, Recipe))
    except ValidationError as error:
        raise RecipeError(f"recipe {path}:\n{explain(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every default written out: what a run folder keeps as `config.toml`."""
    return tomlkit.dumps(recipe.model_dump(exclude_none=True))


def explain(error: ValidationError) -> str:
    """One line for each fault: where, what was expected, what came, and the nearest valid key for an unknown one."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            near = _nearest(fault["loc"])
            hint = f"; did you mean {near}?" if near else ""
            lines.append(f"  {where}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: missing; give it a value")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            got = "" if isinstance(fault["input"], dict) else f" (got {fault['input']!r})"
            lines.append(f"  {where}: {message}{got}")
    return "\n".join(lines)


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set {override!r}: expected table.key=value, for example train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is meant as a string
    *tables, key = dotted.strip().split(".")
    kinds = _kinds([*tables, key])
    if str in kinds and type(value) not in kinds:
        value = text.strip()  # a name like 7 or true, where the schema wants a string
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override!r}: {table} is a value, not a table")
    tree[key] = value


def _floats(value: Any, annotation: Any) -> Any:
    """Whole numbers become floats where the schema wants a float: `lr = 1` is no fault, `batches = 1.5` stays one."""
    models = [kind for kind in (annotation, *get_args(annotation)) if _is_table(kind)]
    if isinstance(value, dict) and models:
        fields = models[0].model_fields
        return {k: _floats(v, fields[k].annotation) if k in fields else v for k, v in value.items()}
    if isinstance(value, dict) and any(_is_table(a) for a in get_args(annotation)[1:]):
        return {k: _floats(v, get_args(annotation)[1]) for k, v in value.items()}
    if isinstance(value, list) and get_args(annotation):
        return [_floats(item, get_args(annotation)[0]) for item in value]
    if (
        type(value) is int
        and (annotation is float or float in get_args(annotation))
        and int not in get_args(annotation)
    ):
        return float(value)
    return value


def _kinds(path: Sequence[str]) -> tuple[Any, ...]:
    """The types that the schema takes at a dotted path; none for a path that it does not know."""
    here: Any = Recipe
    for part in path:
        tables = [kind for kind in (here, *get_args(here)) if _is_table(kind)]
        if get_origin(here) is dict:
            here = get_args(here)[1]
        elif tables and part in tables[0].model_fields:
            here = tables[0].model_fields[part].annotation
        else:
            return ()
    return (here, *get_args(here))


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nearest(location: tuple[int | str, ...]) -> str | None:
    """The dotted valid key nearest to an unknown one, first in its own table, then anywhere."""
    here: Any = Recipe
    for part in location[:-1]:
        if _is_table(here) and part in here.model_fields:
            here = here.model_fields[str(part)].annotation
        candidates = [kind for kind in (here, *get_args(here)) if _is_table(kind)]
        here = candidates[0] if candidates else here
    name = str(location[-1])
    prefix = ".".join(str(part) for part in location[:-1])
    if _is_table(here):
        close = difflib.get_close_matches(name, list(here.model_fields), n=1, cutoff=0.6)
        if close:
            return f"{prefix}.{close[0]}" if prefix else close[0]
    everywhere = {}
    for table, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if _is_table(kind):
                everywhere.update({key: f"{table}.{key}" for key in kind.model_fields})
    close = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.8)
    return everywhere[close[0]] if close else None
