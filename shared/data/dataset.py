"""What every source of rows offers: `Dataset`, its `Row`s, and `DataError`.

Rollouts and policies open a data set by its name in the recipe, tell the controller its identity, and load the rows
that leases name. Invariant: the same recipe gives the same rows under the same fingerprint in every process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from shared.config.schema import DataTable
from shared.messages import DatasetIdentity

Messages = list[dict[str, str]]


class DataError(Exception):
    """Rows that cannot be read or used; the text says where, what was expected, what came, what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question: chat `messages`, the reference `answer` ("" if there is none), a worked `response` for SFT.

    `columns` is the whole record that it was read from, for whoever wants more of it than that.
    """

    messages: Messages
    answer: str
    response: str | None
    index: int
    columns: Mapping[str, object] = field(default_factory=dict)


class Dataset(ABC):
    """Rows by number, with a verifier. Opening is cheap in memory; rows are read when asked for."""

    def __init__(self, name: str, length: int, fingerprint: str) -> None:
        if length < 1:
            raise DataError(f"data set {name!r}: expected at least one row, found none")
        self.identity = DatasetIdentity(name=name, length=length, fingerprint=fingerprint)

    def __len__(self) -> int:
        return self.identity.length

    def row(self, index: int) -> Row:
        """The row `index`, from 0; DataError names the place of a row that cannot be read."""
        if not 0 <= index < len(self):
            raise DataError(f"data set {self.identity.name!r}: expected a row from 0 to {len(self) - 1}, got {index}")
        return self._row(index)

    def score(self, index: int, completion_answer: str | None) -> float:
        """The verifier's judgement, from 0 to 1, of an answer to row `index`; no answer (None) is worth 0."""
        if completion_answer is None:
            return 0.0
        score = self._score(index, completion_answer)
        if not math.isfinite(score):
            raise DataError(
                f"data set {self.identity.name!r}, row {index}: expected a verifier's score from 0 to 1, got {score}"
            )
        return min(1.0, max(0.0, score))

    def category(self, index: int, column: str) -> str:
        """What row `index` has in `column`, as a text; a generated row's metadata are columns too."""
        columns = self.row(index).columns
        metadata = columns.get("metadata")
        found = columns.get(column, metadata.get(column) if isinstance(metadata, Mapping) else None)
        if isinstance(found, Mapping | list | tuple | None):
            raise DataError(
                f"data set {self.identity.name!r}, row {index}: expected a text or number in the category column "
                f"{column!r}, got {type(found).__name__ if found is not None else 'no such column'}; columns found: "
                f"{', '.join(map(str, columns)) or 'none'}; mend `category` of the suite"
            )
        return str(found)

    @abstractmethod
    def _row(self, index: int) -> Row: ...

    def _score(self, index: int, completion_answer: str) -> float:
        """Exact match after stripping white space; sources with a verifier of their own replace it."""
        row = self.row(index)
        if not row.answer:
            raise DataError(
                f"data set {self.identity.name!r}, row {index}: a verifier wants a reference answer, the row has none; "
                f"use the data set for [sft] only, or name its column with `answer`"
            )
        return float(row.answer.strip() == completion_answer.strip())


def fingerprint_of(*parts: object) -> str:
    """A short hash of plain values; equal values give equal fingerprints in every process."""
    return blake2b(msgspec.json.encode(parts, order="deterministic"), digest_size=16).hexdigest()


def columns_fingerprint(table: DataTable, content: str) -> str:
    """Fingerprint of rows with `content` (a hash) that are read as `table` says."""
    return fingerprint_of(table.kind, content, table.prompt, table.answer, table.response, table.system or "")


def row_from_columns(record: Mapping[str, object], table: DataTable, index: int, place: str) -> Row:
    """A row from a record of a file; `place` names file and line for the errors.

    The prompt is a text or a list of {role, content}; numbers are allowed as answers; the answer may be absent where
    a worked response is present.
    """
    prompt, answer, response = (record.get(column) for column in (table.prompt, table.answer, table.response))
    messages = [] if table.system is None else [{"role": "system", "content": table.system}]
    if isinstance(prompt, str) and prompt:
        messages.append({"role": "user", "content": prompt})
    elif isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        messages += [{"role": message["role"], "content": message["content"]} for message in prompt]
    else:
        raise _bad_column(record, table.prompt, "prompt", "a text or a list of {role, content} messages", place)
    if response is not None and not isinstance(response, str):
        raise _bad_column(record, table.response, "response", "a text", place)
    if answer is None and response is not None:
        answer = ""
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise _bad_column(record, table.answer, "answer", "a text or a number", place)
    return Row(messages=messages, answer=str(answer), response=response, index=index, columns=record)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _bad_column(record: Mapping[str, object], column: str, key: str, wanted: str, place: str) -> DataError:
    found = type(record[column]).__name__ if column in record else "no such column"
    columns = ", ".join(map(str, record)) or "none"
    return DataError(
        f"{place}: expected column {column!r} with {wanted}, got {found}; columns found: {columns}; "
        f"mend the row, or name the right column with `{key} = ...` in its [data.NAME] table"
    )
