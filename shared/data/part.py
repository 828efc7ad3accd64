"""A part of a data set: the rows whose question hashes into a range.

Training and held-out rows that are drawn from one small space of questions would overlap, whatever their seeds. Parts
are cut by the question's own hash instead, so that two data sets with disjoint parts never share a question.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b

import msgspec

from shared.config.schema import DataTable
from shared.data.dataset import DataError, Dataset, Messages, Row, fingerprint_of


class PartDataset(Dataset):
    """The rows of `whole` whose question lies in `table.part`, renumbered from 0. Opening it reads every row once."""

    def __init__(self, name: str, table: DataTable, whole: Dataset) -> None:
        low, high = table.part
        kept = (index for index in range(len(whole)) if low <= question_share(whole.row(index).messages) < high)
        self._whole = whole
        self._indexes = array("Q", kept)
        if not self._indexes:
            raise DataError(
                f"data set {name!r}: none of its {len(whole)} rows has a question in part {table.part}; "
                f"widen `part`, or give it more rows"
            )
        super().__init__(name, len(self._indexes), fingerprint_of(whole.identity.fingerprint, table.part))

    def _row(self, index: int) -> Row:
        row = self._whole.row(self._indexes[index])
        return replace(row, index=index)

    def _score(self, index: int, completion_answer: str) -> float:
        return self._whole.score(self._indexes[index], completion_answer)


def question_share(messages: Messages) -> float:
    """Where a question lies in [0, 1): a hash of its user messages, the same in every process."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    digest = blake2b(msgspec.json.encode(asked), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
