"""Rows to ask: `open_dataset` opens a [data.NAME] table of the recipe. One file a source, imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.config.schema import DataTable
    from shared.data.dataset import Dataset


def open_dataset(name: str, table: DataTable) -> Dataset:
    """The data set that `table` describes, under its `name` in the recipe; DataError says what is wrong with it."""
    whole = _open_whole(name, table)
    if table.part == [0.0, 1.0]:
        return whole
    from shared.data.part import PartDataset

    return PartDataset(name, table, whole)


def _open_whole(name: str, table: DataTable) -> Dataset:
    # `shared.data.order` must import without numpy, and no service should pay for a source that it does not use
    match table.kind:
        case "reasoning_gym":
            from shared.data.reasoning_gym import ReasoningGymDataset

            return ReasoningGymDataset(name, table)
        case "jsonl":
            from shared.data.files import JsonlDataset

            return JsonlDataset(name, table)
        case "parquet":
            from shared.data.files import ParquetDataset

            return ParquetDataset(name, table)
        case "huggingface":
            from shared.data.huggingface import HuggingFaceDataset

            return HuggingFaceDataset(name, table)
