"""Reading recipes: TOML text, `--set` overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomlkit
from pydantic import BaseModel, ValidationError

from shared.config.lines import key_lines, line_of
from shared.config.schema import Recipe


class RecipeError(Exception):
    """A recipe that cannot be used; the text tells what was expected, what came, and what to do."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file at `path`, `overrides` ("train.lr=1e-5") applied; RecipeError if it is not one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
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
    _anchor(tree, path.absolute().parent)
    try:
        return Recipe.model_validate(with_floats(tree))
    except ValidationError as error:
        given: dict[tuple[str | int, ...], int] = {tuple(o.partition("=")[0].strip().split(".")): 0 for o in overrides}
        raise RecipeError(f"recipe {path}:\n{explain(error, key_lines(text) | given)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every default written out: what a run folder keeps as `config.toml`."""
    return tomlkit.dumps(recipe.model_dump(exclude_none=True))


def with_floats(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree with floats for the whole numbers that a person wrote where the schema wants floats."""
    converted: dict[str, Any] = _floats(tree, Recipe)
    return converted


def explain(error: ValidationError, places: dict[tuple[str | int, ...], int] | None = None) -> str:
    """One line for each fault: where, what was expected, what came, and the nearest valid key for an unknown one.

    `places` are the lines of the recipe's keys (`key_lines`); a fault in one of them begins with its line, unless that
    is 0, as for keys that were overridden.
    """
    lines = []
    for fault in error.errors():
        place = _without_tags(fault["loc"])
        line = line_of(places or {}, place)
        where = (f"line {line}: " if line else "") + (".".join(str(part) for part in place) or "recipe")
        if fault["type"] == "extra_forbidden":
            near = _nearest(place, _at(fault["loc"][:-1]))
            hint = f"; did you mean {near}?" if near else ""
            lines.append(f"  {where}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: missing; give it a value")
        elif fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
            got = fault["input"].get("kind") if isinstance(fault["input"], dict) else None
            known = fault["ctx"].get("expected_tags") or ", ".join(map(repr, _variants(_at(fault["loc"]))))
            lines.append(f"  {where}.kind: expected one of {known} (got {got!r})")
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


def _anchor(tree: dict[str, Any], folder: Path) -> None:
    """Modules of rewards are looked for beside the recipe, wherever the run's own copy of it will lie; keys where the
    command runs.
    """
    bus = tree.get("bus")
    if isinstance(bus, dict) and isinstance(bus.get("keys"), str):
        bus["keys"] = str(Path(bus["keys"]).expanduser().absolute())
    rewards = tree.get("rewards")
    parts = rewards.get("parts") if isinstance(rewards, dict) else None
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("kind") == "python" and isinstance(part.get("path", ""), str):
            part["path"] = str(folder / Path(part.get("path", "")).expanduser())


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    """The tables of a union by their `kind`; none where the annotation is no such union."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    tables = [kind for kind in get_args(annotation) if _is_table(kind)] if get_origin(annotation) is not list else []
    return {kind.model_fields["kind"].default: kind for kind in tables} if len(tables) > 1 else {}


def _at(location: Sequence[int | str]) -> Any:
    """What the schema wants at a fault's location, in which a union is followed by a tag; None if it knows no such."""
    here: Any = Recipe
    for part in location:
        here = _inside(here, part)
    return here


def _inside(here: Any, part: int | str) -> Any:
    tables = [kind for kind in (here, *get_args(here)) if _is_table(kind)]
    if part in _variants(here):
        return _variants(here)[str(part)]
    if get_origin(here) is list:
        return get_args(here)[0]
    if get_origin(here) is dict:
        return get_args(here)[1]
    fields = tables[0].model_fields if len(tables) == 1 else {}
    return fields[str(part)].annotation if part in fields else None


def _without_tags(location: Sequence[int | str]) -> tuple[int | str, ...]:
    """A fault's location as a person wrote it: without the tags that pydantic puts after a union."""
    here: Any = Recipe
    place: list[int | str] = []
    for part in location:
        if part not in _variants(here):
            place.append(part)
        here = _inside(here, part)
    return tuple(place)


def _floats(value: Any, annotation: Any) -> Any:
    """Whole numbers become floats where the schema wants a float: `lr = 1` is no fault, `batches = 1.5` stays one."""
    if variants := _variants(annotation):
        chosen = variants.get(str(value.get("kind"))) if isinstance(value, dict) else None
        return value if chosen is None else _floats(value, chosen)
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


def _nearest(location: tuple[int | str, ...], here: Any) -> str | None:
    """The dotted valid key nearest to an unknown one, first in its own table `here`, then anywhere."""
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
