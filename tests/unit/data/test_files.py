"""Rows of local files and Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.config.schema import DataTable
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset

ROWS = [
    {"prompt": "2+2?", "answer": "4", "response": "<answer>4</answer>"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+3?"}], "answer": 6},
    {"prompt": "capital of Peru?", "answer": " Lima "},
]


def jsonl(folder: Path, *lines: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def table(path: str, **keys: object) -> DataTable:
    return DataTable(**({"kind": "jsonl", "path": path} | keys))


def test_jsonl_rows_are_read_by_number(tmp_path: Path) -> None:
    rows = open_dataset("d", table(jsonl(tmp_path, ROWS[0], "", ROWS[1], ROWS[2]), system="Think."))
    assert len(rows) == rows.identity.length == 3
    assert rows.identity.name == "d"
    first, second = rows.row(0), rows.row(1)
    assert first.messages == [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}]
    assert (first.answer, first.response, first.index) == ("4", "<answer>4</answer>", 0)
    assert [message["content"] for message in second.messages] == ["Think.", "Be brief.", "3+3?"]
    assert (second.answer, second.response) == ("6", None)


def test_answers_are_judged_by_exact_match_after_stripping(tmp_path: Path) -> None:
    rows = open_dataset("d", table(jsonl(tmp_path, *ROWS)))
    assert rows.score(2, "Lima\n") == 1.0
    assert rows.score(2, "lima") == 0.0
    assert rows.score(2, None) == 0.0


@pytest.mark.parametrize("broken", ['{"prompt": ', "[1, 2]"])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, broken: str) -> None:
    path = jsonl(tmp_path, ROWS[0], "", broken, ROWS[2])
    rows = open_dataset("d", table(path))
    assert rows.row(2).answer == " Lima "
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: expected a JSON object, got"):
        rows.row(1)


def test_a_wrong_column_is_an_error_at_the_start_that_lists_the_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "2+2?", "answer": "4"})
    with pytest.raises(DataError, match=r"line 1: expected column 'prompt' .*no such column.*found: question, answer"):
        open_dataset("d", table(path))
    assert open_dataset("d", table(path, prompt="question")).row(0).messages[0]["content"] == "2+2?"


def test_a_wrong_type_in_a_column_says_what_came(tmp_path: Path) -> None:
    rows = open_dataset(
        "d", table(jsonl(tmp_path, ROWS[0], {"prompt": 7, "answer": "x"}, {"prompt": "x", "answer": []}))
    )
    with pytest.raises(DataError, match=r"line 2: expected column 'prompt' with a text or a list .* got int"):
        rows.row(1)
    with pytest.raises(DataError, match=r"line 3: expected column 'answer' with a text or a number, got list"):
        rows.row(2)


def test_a_worked_response_needs_no_reference_answer_but_a_verifier_does(tmp_path: Path) -> None:
    rows = open_dataset("d", table(jsonl(tmp_path, {"prompt": "Hi", "response": "Hello."})))
    assert rows.row(0).response == "Hello."
    with pytest.raises(DataError, match="reference answer"):
        rows.score(0, "Hello.")


def test_rows_outside_the_data_set_are_refused(tmp_path: Path) -> None:
    rows = open_dataset("d", table(jsonl(tmp_path, *ROWS)))
    for index in (-1, 3):
        with pytest.raises(DataError, match=f"from 0 to 2, got {index}"):
            rows.row(index)


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none; mend `path`"):
        open_dataset("d", table(str(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match="at least one row"):
        open_dataset("d", table(jsonl(tmp_path)))


def test_the_fingerprint_follows_content_and_columns_but_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = open_dataset("d", table(jsonl(tmp_path / "a", *ROWS))).identity
    moved = open_dataset("d", table(jsonl(tmp_path / "b", *ROWS))).identity
    changed = open_dataset("d", table(jsonl(tmp_path, *ROWS[:2], ROWS[2] | {"answer": "Quito"}))).identity
    other = open_dataset("d", table(jsonl(tmp_path / "a", *ROWS), system="Think.")).identity
    assert first == moved
    assert len({first.fingerprint, changed.fingerprint, other.fingerprint}) == 3


@pytest.fixture
def plain_rows() -> list[dict[str, str]]:
    return [{"prompt": f"{n}+1?", "answer": str(n + 1), "unused": "x"} for n in range(5)]


def check_plain(rows: Dataset) -> None:
    assert len(rows) == 5
    assert rows.row(3).messages == [{"role": "user", "content": "3+1?"}]
    assert rows.score(3, "4") == 1.0


def test_parquet_rows_are_read_by_number(tmp_path: Path, plain_rows: list[dict[str, str]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(plain_rows), path)
    check_plain(open_dataset("d", table(str(path), kind="parquet")))
    with pytest.raises(DataError, match=r"expected column 'question', columns found: prompt, answer, unused"):
        open_dataset("d", table(str(path), kind="parquet", prompt="question"))
    with pytest.raises(DataError, match="expected a parquet file"):
        open_dataset("d", table(jsonl(tmp_path, *plain_rows), kind="parquet"))


def test_huggingface_folders_are_read_by_number(tmp_path: Path, plain_rows: list[dict[str, str]]) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(plain_rows)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "splits"))
    one = open_dataset("d", table(str(tmp_path / "one"), kind="huggingface"))
    check_plain(one)
    assert open_dataset("d", table(str(tmp_path / "one"), kind="huggingface")).identity == one.identity
    check_plain(open_dataset("d", table(str(tmp_path / "splits"), kind="huggingface", split="test")))
    with pytest.raises(DataError, match="expected split 'train' in .*, splits found: test"):
        open_dataset("d", table(str(tmp_path / "splits"), kind="huggingface"))
    with pytest.raises(DataError, match="written by save_to_disk"):
        open_dataset("d", table(str(tmp_path), kind="huggingface"))
