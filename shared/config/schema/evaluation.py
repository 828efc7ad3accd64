"""[evaluation]: held-out problems."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from shared.config.schema.base import LIVE, Positive, Table

SUITE_NAME = r"[a-z0-9][a-z0-9._-]*"


class SuiteTable(Table):
    """[evaluation.suites.NAME]: held-out problems, how they are answered, and when an answer is correct."""

    dataset: str | None = Field(
        None, description="name of a [data.NAME] table, disjoint from training; the suite's own name when left out"
    )
    problems: Positive = Field(200, description="rows judged in each evaluation")
    samples: Positive = Field(1, description="answers to each problem; accuracy is their mean (pass@1)")
    temperature: float = Field(0.0, ge=0, le=10, description="0 answers greedily")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: Positive = 64
    correct_at: float = Field(1.0, description="a verifier score of at least this counts as correct")
    category: str | None = Field(None, description="column whose values split the verdict")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, but greedy answers are all alike: "
                "set a temperature above 0, or samples = 1"
            )
        return self


class EvaluationTable(Table):
    """[evaluation]: how often held-out accuracy is judged, and on which suites."""

    every: Positive = Field(
        20, json_schema_extra=LIVE, description="batches between evaluations in RL; first and last are always judged"
    )
    suites: dict[str, SuiteTable] = Field(min_length=1, description="one table [evaluation.suites.NAME] a suite")

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        for name in self.suites:
            if not re.fullmatch(SUITE_NAME, name):
                raise ValueError(
                    f"a suite is named {name!r}: its verdicts are files of that name, so use lower-case letters, "
                    "digits, '.', '_' and '-', beginning with a letter or digit"
                )
        return self

    def dataset(self, suite: str) -> str:
        """The name of a suite's data set."""
        return self.suites[suite].dataset or suite

    @property
    def datasets(self) -> list[str]:
        """The names of all data sets that are judged on, each once."""
        return list(dict.fromkeys(self.dataset(suite) for suite in self.suites))
