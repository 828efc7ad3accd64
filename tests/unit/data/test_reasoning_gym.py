"""Rows of reasoning-gym tasks, their verifier, and the worked answers."""

from __future__ import annotations

import re

import pytest

from shared.config.schema import DataTable
from shared.data import open_dataset
from shared.data.dataset import DataError, Dataset
from shared.data.traces import TRACES, worked_answer

THREE_TERMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def open_task(task: str = "chain_sum", **keys: object) -> Dataset:
    settings = {"size": 50, "options": THREE_TERMS if task == "chain_sum" else {}} | keys
    return open_dataset("d", DataTable(kind="reasoning_gym", task=task, **settings))


def test_rows_are_the_same_each_time_they_are_asked_for() -> None:
    first, second = open_task(), open_task()
    assert first.identity == second.identity
    assert first.identity.length == len(first) == 50
    assert [first.row(index) for index in range(50)] == [second.row(index) for index in reversed(range(50))][::-1]
    assert first.row(0).messages[-1]["content"].startswith("State the final answer to the following arithmetic")


def test_the_fingerprint_follows_everything_that_shapes_the_rows() -> None:
    tables = [{}, {"seed": 1}, {"size": 51}, {"options": {}}, {"system": "Think."}, {"task": "gcd"}]
    assert len({open_task(**keys).identity.fingerprint for keys in tables}) == len(tables)


def test_neighbouring_seeds_share_no_run_of_rows() -> None:
    questions = [[open_task(seed=seed, options={}).row(i).messages[0]["content"] for i in range(50)] for seed in (0, 1)]
    assert len(set(questions[0]) & set(questions[1])) <= 1


def test_the_tasks_own_verifier_judges() -> None:
    rows = open_task()
    answer = rows.row(7).answer
    assert rows.score(7, answer) == 1.0
    assert rows.score(7, f"0{answer}.0" if answer[0] != "-" else f"{answer}.0") == 1.0
    assert rows.score(7, "many") == 0.0
    assert rows.score(7, None) == 0.0


def test_the_system_message_comes_first() -> None:
    messages = open_task(system="Answer in <answer> tags.").row(0).messages
    assert [message["role"] for message in messages] == ["system", "user"]


@pytest.mark.parametrize("options", [THREE_TERMS, {}, {"allow_negation": True}, {"min_terms": 1, "max_terms": 1}])
def test_worked_chain_sums_are_right_at_every_step_and_end_in_the_answer(options: dict[str, int]) -> None:
    rows = open_task(options=options)
    for index in range(50):
        row = rows.row(index)
        thought, answer = re.fullmatch(r"<think>(.+)</think><answer>(-?\d+)</answer>", row.response or "").groups()
        assert rows.score(index, answer) == 1.0
        for step in thought.split(";") if "=" in thought else []:
            left, right = step.split("=")
            assert eval(left, {"__builtins__": {}}) == int(right)  # noqa: S307  # digits and signs, see the pattern
        assert thought.rpartition("=")[2] == row.answer


def test_a_worked_chain_sum_shows_the_partial_sums() -> None:
    entry = {"answer": "-2", "metadata": {"expression": "4 + 3 - 9"}}
    assert worked_answer("chain_sum", entry) == "<think>4+3=7;7-9=-2</think><answer>-2</answer>"


def test_a_task_without_worked_answers_has_none() -> None:
    assert "letter_counting" not in TRACES
    assert open_task("letter_counting").row(0).response is None


def test_an_unknown_task_and_unknown_options_are_refused() -> None:
    with pytest.raises(DataError, match=r"got 'chain_sums'; set `task` to one of: .*chain_sum"):
        open_task("chain_sums")
    with pytest.raises(DataError, match="refuses its options"):
        open_task(options={"terms": 3})
    with pytest.raises(DataError, match="refuses its options"):
        open_task(options={"min_terms": 5, "max_terms": 2})


def test_rows_outside_the_data_set_are_refused() -> None:
    with pytest.raises(DataError, match="from 0 to 49, got 50"):
        open_task().row(50)
    with pytest.raises(DataError, match="from 0 to 49, got 50"):
        open_task().score(50, "1")
