"""Rows of local files: JSON lines and parquet."""

from __future__ import annotations

import json
import mmap
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any

from shared.config.schema import DataTable
from shared.data.dataset import DataError, Dataset, Row, columns_fingerprint, row_from_columns


class JsonlDataset(Dataset):
    """One JSON object a line; empty lines are skipped. Only the lines' offsets are held in memory."""

    def __init__(self, name: str, table: DataTable) -> None:
        self._path = _existing_file(name, table)
        self._table = table
        self._starts = array("Q")
        self._lines = array("Q")
        content = sha256()
        with self._path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                content.update(line)
                if line.strip():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
            if start:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        super().__init__(name, len(self._starts), columns_fingerprint(table, content.hexdigest()))
        # a wrong column name would spoil every row: say so at the start
        self.row(0)

    def _row(self, index: int) -> Row:
        place = f"{self._path}, line {self._lines[index]}"
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        try:
            record = json.loads(self._bytes[start : end if end >= 0 else len(self._bytes)])
        except ValueError as error:
            raise DataError(f"{place}: expected a JSON object, got {error}; mend or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(record).__name__}; mend or remove the line")
        return row_from_columns(record, self._table, index, place)


class ParquetDataset(Dataset):
    """A parquet file, read whole: rewards may want any of its columns."""

    def __init__(self, name: str, table: DataTable) -> None:
        import pyarrow
        from pyarrow import parquet

        self._path = _existing_file(name, table)
        self._table = table
        try:
            self._columns = parquet.read_table(self._path)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f'{self._path}: expected a parquet file, got {error}; for JSON lines set `kind = "jsonl"`'
            ) from error
        columns = self._columns.column_names
        if table.prompt not in columns:
            raise DataError(
                f"{self._path}: expected column {table.prompt!r}, columns found: {', '.join(columns)}; "
                f"name the right one with `prompt = ...` in [data.{name}]"
            )
        super().__init__(name, self._columns.num_rows, columns_fingerprint(table, _sha256(self._path)))
        self.row(0)

    def _row(self, index: int) -> Row:
        record: dict[str, Any] = {column: self._columns[column][index].as_py() for column in self._columns.column_names}
        return row_from_columns(record, self._table, index, f"{self._path}, row {index}")


def _existing_file(name: str, table: DataTable) -> Path:
    assert table.path is not None
    path = Path(table.path).expanduser()
    if not path.is_file():
        raise DataError(
            f"data set {name!r}: expected a file at {path.absolute()}, found none; mend `path` in [data.{name}]"
        )
    return path


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
