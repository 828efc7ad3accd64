"""[data.NAME]: rows to ask."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.config.schema.base import Positive, Table


class DataTable(Table):
    """[data.NAME]: rows to ask. `kind` chooses the source, the other keys belong to it."""

    kind: Literal["reasoning_gym", "jsonl", "parquet", "huggingface"]
    task: str | None = Field(None, description="reasoning_gym: the task's name")
    size: Positive = Field(1000, description="reasoning_gym: number of rows")
    seed: int = Field(0, ge=0, description="reasoning_gym: seed of the rows")
    options: dict[str, bool | int | float | str | list[int] | list[float] | list[str]] = Field(
        default_factory=dict, description="reasoning_gym: the task's own settings"
    )
    path: str | None = Field(None, description="jsonl, parquet: the file; huggingface: the data set's name")
    split: str = Field("train", description="huggingface: the split")
    prompt: str = Field("prompt", description="column with the question (text) or the chat messages (list)")
    answer: str = Field("answer", description="column with the reference answer")
    response: str = Field("response", description="column with the worked answer that SFT learns")
    system: str | None = Field(None, description="system message put before each prompt")
    part: list[float] = Field(
        default_factory=lambda: [0.0, 1.0],
        min_length=2,
        max_length=2,
        description="keep the rows whose question hashes between these; disjoint parts never share a question",
    )

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.kind == "reasoning_gym" and not self.task:
            raise ValueError('kind "reasoning_gym" wants `task`')
        if self.kind != "reasoning_gym" and not self.path:
            raise ValueError(f'kind "{self.kind}" wants `path`')
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part wants two rising numbers from 0 to 1, such as [0.0, 0.9]; got {self.part}")
        return self
