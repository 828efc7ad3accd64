"""The schema of a recipe as rows of a table, from the models themselves."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shared.config import Recipe

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "at least", "max_length": "at most"}


@dataclass(frozen=True)
class Row:
    """A table, or one of its keys."""

    key: str
    kind: str
    default: str
    live: bool
    meaning: str
    is_table: bool


def rows() -> Iterator[Row]:
    """Every table of a recipe with its keys below it."""
    yield from _of_fields(Recipe, "")


def _of_fields(model: type[BaseModel], prefix: str) -> Iterator[Row]:
    later = []
    for name, field in model.model_fields.items():
        tables = list(_tables(field.annotation, f"{prefix}{name}"))
        if tables:
            later += tables
            continue
        extra = field.json_schema_extra
        live = isinstance(extra, dict) and bool(extra.get("live"))
        yield Row(f"{prefix}{name}", _kind(field), _default(field), live, field.description or "", False)
    for path, table in later:
        meaning = (table.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        yield Row(f"[{path}]", "", "", False, meaning, True)
        yield from _of_fields(table, f"{path.strip('[]')}.")


def _tables(annotation: Any, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, table) for a field that holds tables: one, one a name, or a list of them, of one kind or several."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield path, annotation
    elif origin is Annotated:
        yield from _tables(get_args(annotation)[0], path)
    elif origin is dict:
        yield from _tables(get_args(annotation)[1], f"{path}.NAME")
    elif origin is list:
        yield from _tables(get_args(annotation)[0], f"[{path}]")
    elif origin in (Union, types.UnionType):
        for choice in get_args(annotation):
            yield from _tables(choice, path)


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {value:g}"
        for part in field.metadata
        for name, sign in _BOUNDS.items()
        if isinstance(value := getattr(part, name, None), int | float)
    ]
    return " ".join([_name(field.annotation), *dict.fromkeys(bounds)])


def _name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _name(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(json_text(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(_name(choice) for choice in get_args(annotation) if choice is not type(None))
    if origin is list:
        return f"list of {_name(get_args(annotation)[0])}"
    if origin is dict:
        return f"table of {_name(get_args(annotation)[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    return "" if value is None else json_text(value)


def json_text(value: object) -> str:
    """A value as a recipe would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)
