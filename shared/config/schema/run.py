"""[run]: the run as a whole."""

from __future__ import annotations

from pydantic import Field

from shared.config.schema.base import Table


class RunTable(Table):
    """[run]: the run as a whole."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="prefix of the run's id")
    seed: int = Field(0, ge=0, description="seed of everything random")
    deterministic: bool = Field(
        False, description="equal bits on CPU in two runs; wants max_staleness 0, one replica a role"
    )
    folder: str = Field("runs", description="where run folders are made")
