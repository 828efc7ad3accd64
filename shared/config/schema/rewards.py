"""[rewards]: what a completion is worth."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.config.schema.base import Positive, Seconds, Table


class PartTable(Table):
    """What every kind of [[rewards.parts]] has; the reward is the weighted sum of the parts."""

    name: str = Field(
        "", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", description="its name in the metrics; its kind when left out"
    )
    weight: float = Field(1.0, ge=-100, le=100)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, table: object) -> object:
        return {"name": cls._own_name(table), **table} if isinstance(table, dict) else table

    @classmethod
    def _own_name(cls, table: dict[str, object]) -> object:
        return cls.model_fields["kind"].default


class VerifierPart(PartTable):
    """The data set's own judgement of the text inside `<answer>`."""

    kind: Literal["verifier"] = "verifier"


class ExactPart(PartTable):
    """Whether the text inside `<answer>` is the reference answer."""

    kind: Literal["exact"] = "exact"


class FormatPart(PartTable):
    """Whether the completion is `<think>..</think><answer>..</answer>`."""

    kind: Literal["format"] = "format"


class ChoicePart(PartTable):
    """Whether the completion chooses the option (a letter) that the reference answer names."""

    kind: Literal["choice"] = "choice"
    options: int = Field(10, ge=2, le=10, description="how many options there are, from A on")


class MathPart(PartTable):
    r"""Whether the last `\boxed{..}` equals the reference answer as mathematics; needs math-verify."""

    kind: Literal["math"] = "math"


class NumberPart(PartTable):
    """Whether the number that the completion ends in is the reference answer's."""

    kind: Literal["number"] = "number"
    tolerance: float = Field(0.0, ge=0, description="largest difference that still counts as equal")


class LengthPart(PartTable):
    """DAPO's soft punishment of overlong completions."""

    kind: Literal["length"] = "length"
    max_length: Positive = Field(description="tokens from which on the part is -1")
    cache_length: Positive = Field(description="tokens before max_length over which it falls from 0 to -1")

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.cache_length > self.max_length:
            raise ValueError(f"cache_length is {self.cache_length}, more than max_length = {self.max_length}")
        return self


class PythonPart(PartTable):
    """A function of yours."""

    kind: Literal["python"] = "python"
    function: str = Field(description="module:function, such as my_rewards:score")
    path: str | None = Field(None, description="folder of the module; the recipe's own when left out")

    @field_validator("function")
    @classmethod
    def _is_named(cls, function: str) -> str:
        module, _, name = function.partition(":")
        if not name.isidentifier() or not all(word.isidentifier() for word in module.split(".")):
            raise ValueError("expected module:function, such as my_rewards:score")
        return function

    @classmethod
    def _own_name(cls, table: dict[str, object]) -> object:
        return str(table.get("function", "")).rpartition(":")[2] or "python"


RewardPart = VerifierPart | ExactPart | FormatPart | ChoicePart | MathPart | NumberPart | LengthPart | PythonPart
"""One of [[rewards.parts]]: `kind` says which."""


def _verifier_alone() -> list[RewardPart]:
    return [VerifierPart()]


class RewardsTable(Table):
    """[rewards]: what a completion is worth, computed in worker processes with limits."""

    parts: list[Annotated[RewardPart, Field(discriminator="kind")]] = Field(
        default_factory=_verifier_alone, min_length=1
    )
    workers: Positive = 1
    timeout_s: Seconds = Field(10.0, description="longest time for one completion")
    memory_mb: Positive = Field(2048, description="most memory of one worker")
    failure_limit: Positive = Field(
        20, description="prompt groups in a row whose rewards fail in one rollout, after which the run ends"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.name for part in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two parts are named {name!r}: give one of them another `name`")
        return self
