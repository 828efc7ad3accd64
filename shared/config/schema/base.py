"""What every table of a recipe is made of: strictness, the mark of live fields, and the common ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

LIVE: JsonDict = {"live": True}
"""Marks a field that may be changed while the run goes on (`SetHyperparameters`)."""


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A strict table: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
