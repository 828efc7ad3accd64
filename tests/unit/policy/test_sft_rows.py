"""SFT leases: rows become prompt and response tokens, or are returned with their cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from services.policy.sft_rows import SftRows
from shared.arrays import unpack
from shared.config.schema import DataTable
from shared.data import open_dataset
from shared.messages import Grant, GroupReport, LeaseReturned, Sampling
from shared.models import load_tokenizer

ROWS = [
    {"prompt": "2 + 2?", "answer": "4", "response": "<think>2 + 2 = 4</think><answer>4</answer>"},
    {"prompt": "3 + 3?", "answer": "6"},
    {"prompt": "x" * 500, "answer": "0", "response": "0"},
    {"prompt": "short", "answer": "0", "response": "y" * 500},
]


@pytest.fixture
def rows(tools: Any, tmp_path: Path) -> tuple[SftRows, Grant, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    dataset = open_dataset("rows", DataTable(kind="jsonl", path=str(path)))
    tokenizer = load_tokenizer(tools.recipe().model)
    sampling = Sampling(1.0, 1.0, 0, 16)
    grant = Grant(7, 2, 1, "sft", "rows", dataset.identity.fingerprint, 0, 0, 5, 1, sampling, 0, 3, 60.0)
    return SftRows({"rows": dataset}, tokenizer, 128), grant, tokenizer


def test_a_row_becomes_one_sample_with_its_arrays(rows: tuple[SftRows, Grant, Any]) -> None:
    sft, grant, tokenizer = rows
    report, frames = sft.answer(grant)
    assert isinstance(report, GroupReport)
    arrays = unpack(report.arrays, frames)
    assert (report.group, report.attempt, report.lineage, report.rewards) == (7, 2, 1, [0.0])
    assert [len(arrays["prompt"])] == [report.prompt_length]
    assert report.lengths == [len(arrays["tokens"])]
    assert arrays["tokens"].dtype == np.int32 and arrays["logprobs"].dtype == np.float32
    assert "2 + 2?" in tokenizer.decode(arrays["prompt"])
    assert tokenizer.decode(arrays["tokens"][:-1]) == ROWS[0]["response"]
    assert arrays["tokens"][-1] == tokenizer.eos_token_id
    assert (arrays["logprobs"] == 0).all() and (arrays["versions"] == grant.version).all()


@pytest.mark.parametrize(
    ("row", "cause", "words"),
    [
        (1, "row_invalid", "worked answer"),
        (2, "prompt_too_long", "128"),
        (3, "prompt_too_long", "128"),
        (99, "row_invalid", "99"),
    ],
)
def test_a_row_that_cannot_be_used_is_returned_with_its_cause(
    rows: tuple[SftRows, Grant, Any], row: int, cause: str, words: str
) -> None:
    sft, grant, _ = rows
    answer, frames = sft.answer(msgspec.structs.replace(grant, row=row))
    assert isinstance(answer, LeaseReturned) and not frames
    assert answer.cause == cause and words in answer.detail


@pytest.mark.parametrize("change", [{"dataset": "other"}, {"fingerprint": "0"}])
def test_a_lease_on_other_data_is_returned(rows: tuple[SftRows, Grant, Any], change: dict[str, Any]) -> None:
    sft, grant, _ = rows
    answer, _ = sft.answer(msgspec.structs.replace(grant, **change))
    assert isinstance(answer, LeaseReturned) and answer.cause == "row_invalid"
