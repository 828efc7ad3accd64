"""Rows of a Hugging Face data set: a folder written by `save_to_disk`, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.config.schema import DataTable
from shared.data.dataset import DataError, Dataset, Row, columns_fingerprint, row_from_columns


class HuggingFaceDataset(Dataset):
    """One split; the fingerprint is the one that `datasets` keeps with the rows."""

    def __init__(self, name: str, table: DataTable) -> None:
        assert table.path is not None
        self._table = table
        self._rows = _load(name, table.path, table.split)
        self._place = f"{table.path} ({table.split})"
        super().__init__(name, len(self._rows), columns_fingerprint(table, self._rows._fingerprint))
        self.row(0)

    def _row(self, index: int) -> Row:
        return row_from_columns(self._rows[index], self._table, index, f"{self._place}, row {index}")


def _load(name: str, path: str, split: str) -> Any:
    # importing `datasets` takes a second: only who uses the source pays
    import datasets

    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            return datasets.load_dataset(path, split=split)
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"data set {name!r}: expected a folder written by save_to_disk or a hub name with split {split!r}, "
            f"got {path!r}: {error}; mend `path` and `split` in [data.{name}]"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise DataError(
            f"data set {name!r}: expected split {split!r} in {folder}, splits found: {', '.join(loaded)}; "
            f"mend `split` in [data.{name}]"
        )
    return loaded[split]
