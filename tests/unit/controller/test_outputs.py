"""What a run leaves for people: each line once, however often the journal is replayed."""

from __future__ import annotations

import json
from pathlib import Path

from services.controller.outputs import Outputs


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_committed_step_leaves_one_line(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.metrics({"lineage": 1, "step": 0, "loss": 0.5})
    outputs.metrics({"lineage": 1, "step": 1, "loss": 0.4})
    outputs.metrics({"lineage": 1, "step": 0, "loss": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_lines_that_are_there_already_are_not_doubled_after_a_restart(tmp_path: Path) -> None:
    Outputs(tmp_path).metrics({"lineage": 1, "step": 0})
    again = Outputs(tmp_path)
    again.metrics({"lineage": 1, "step": 0})
    again.metrics({"lineage": 1, "step": 1})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_the_same_step_of_another_lineage_is_another_line(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.metrics({"lineage": 1, "step": 0})
    outputs.metrics({"lineage": 2, "step": 0})
    assert [line["lineage"] for line in lines(tmp_path)] == [1, 2]


def test_a_last_line_torn_at_any_byte_is_cut_and_written_again(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for step in range(3):
        outputs.metrics({"lineage": 1, "step": step, "loss": 0.25})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for length in range(last, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        again = Outputs(tmp_path)
        for step in range(3):
            again.metrics({"lineage": 1, "step": step, "loss": 0.25})
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_line_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('not json\n{"other": 1}\n')
    Outputs(tmp_path).metrics({"lineage": 1, "step": 0})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == ["not json", '{"other": 1}']
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_is_a_file_of_its_own(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.evaluation({"suite": "heldout", "lineage": 1, "version": 20, "accuracy": 0.5})
    outputs.evaluation({"suite": "heldout", "lineage": 1, "version": 20, "accuracy": 0.5})
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["1-20-heldout.json"]
    assert json.loads((tmp_path / "eval" / "1-20-heldout.json").read_text())["accuracy"] == 0.5


def test_the_address_is_replaced_by_each_term(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.address("tcp://127.0.0.1:5", 1)
    outputs.address("tcp://127.0.0.1:6", 2)
    assert (tmp_path / "controller.address").read_text() == "tcp://127.0.0.1:6 2\n"
