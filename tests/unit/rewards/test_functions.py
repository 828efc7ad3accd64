"""A user's own function: what it is given, what it may return, and what is said when it cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.config import Recipe, RecipeError
from shared.rewards.base import RewardError
from shared.rewards.check import check_rewards
from shared.rewards.score import MOST_VALUES, Score
from tests.unit.rewards.judge import sample, scorer

Write = Callable[[str], dict[str, str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module of the user's; gives the part that names its function `score`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def module(text: str) -> dict[str, str]:
        sys.modules.pop("users_rewards", None)
        (tmp_path / "users_rewards.py").write_text(text)
        return {"kind": "python", "function": "users_rewards:score", "path": str(tmp_path)}

    yield module
    sys.modules.pop("users_rewards", None)


def judged(part: dict[str, str], completion: str = "text") -> Score:
    return scorer(part).score(sample(completion, tokens=5))


def refusal(part: dict[str, str]) -> str:
    with pytest.raises(RecipeError) as caught:
        scorer(part)
    return str(caught.value)


def test_a_function_is_given_the_keywords_that_it_takes(write: Write) -> None:
    part = write("def score(answer, completion): return 1.0 if (answer, completion) == ('2', 'text') else 0.0\n")
    assert judged(part).parts == {"score": 1.0}


def test_a_function_that_takes_everything_is_given_everything(write: Write) -> None:
    part = write(
        "def score(**given):\n"
        "    assert given == {\n"
        "        'completion': 'text', 'answer': '2', 'prompt': '1+1?', 'tokens': 5,\n"
        "        'messages': [{'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': '1+1?'}],\n"
        "        'row': {'prompt': '1+1?', 'answer': '2', 'level': 3},\n"
        "    }, given\n"
        "    return 0.25\n"
    )
    assert judged(part).total == 0.25


def test_numbers_by_name_add_up_and_are_kept_apart(write: Write) -> None:
    part = write("def score(**_): return {'right': 1.0, 'brief': -0.25}\n")
    scored = judged({**part, "weight": 2.0, "name": "mine"})  # type: ignore[dict-item]
    assert scored.total == 1.5
    assert scored.parts == {"mine": 0.75, "mine/right": 1.0, "mine/brief": -0.25}


@pytest.mark.parametrize(("value", "number"), [("True", 1.0), ("3", 3.0), ("__import__('numpy').float32(0.5)", 0.5)])
def test_what_python_takes_for_a_number_is_one(write: Write, value: str, number: float) -> None:
    assert judged(write(f"def score(): return {value}\n")).total == number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("None", "it returned None, expected a finite number"),
        ("'0.5'", "it returned '0.5', expected a finite number"),
        ("float('nan')", "it returned nan, expected a finite number"),
        ("float('inf')", "it returned inf, expected a finite number"),
        ("[1.0]", r"it returned \[1.0\], expected a finite number"),
        ("{'a': None}", "it returned None under 'a', expected a finite number"),
        ("{}", f"expected a dict of 1 to {MOST_VALUES} numbers, got one of 0"),
        ("{str(n): 0 for n in range(99)}", f"expected a dict of 1 to {MOST_VALUES} numbers, got one of 99"),
        ("{'a b': 1.0}", "got the key 'a b'; rename it"),
        ("{3: 1.0}", "got the key 3; rename it"),
    ],
)
def test_what_is_no_number_is_an_error_that_shows_it(write: Write, value: str, shown: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward part 'score' \(users_rewards:score\): .*{shown}"):
        judged(write(f"def score(**_): return {value}\n"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "it raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"it called sys.exit\(3\)"),
        ("raise KeyboardInterrupt", "it raised KeyboardInterrupt"),
    ],
)
def test_what_it_raises_is_an_error_with_the_line_and_what_to_do(write: Write, body: str, said: str) -> None:
    part = write(f"def score(**_):\n    {body}\n")
    with pytest.raises(RewardError, match=rf"{said}.*\(users_rewards.py, line 2\); mend the function, or have it"):
        judged(part)


def test_running_out_of_memory_is_left_to_the_worker(write: Write) -> None:
    with pytest.raises(MemoryError):
        judged(write("def score(**_): return bytearray(1 << 60)\n"))


def test_a_module_that_is_not_there_is_told_with_the_folder_searched(tmp_path: Path) -> None:
    text = refusal({"kind": "python", "function": "nowhere_to_be_found:score", "path": str(tmp_path)})
    assert f"no module 'nowhere_to_be_found' in {tmp_path}" in text
    assert "put nowhere_to_be_found.py there, or name its folder with `path`" in text


def test_a_module_that_cannot_be_imported_is_told_with_its_line(write: Write) -> None:
    text = refusal(write("\nimport not_installed_anywhere\ndef score(): return 1\n"))
    assert "importing 'users_rewards'" in text
    assert "ModuleNotFoundError: No module named 'not_installed_anywhere' (users_rewards.py, line 2)" in text
    assert "sys.exit(5)" in refusal(write("raise SystemExit(5)\n"))
    assert "SyntaxError" in refusal(write("def score(:\n"))


def test_a_function_that_is_not_there_is_told_with_the_nearest_one(write: Write) -> None:
    assert "users_rewards.py has no function 'score'; did you mean scores?" in refusal(
        write("def scores(): return 1\n")
    )
    assert "def score(completion, answer, **_)" in refusal(write("score = 3\n"))


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("def score(text): return 1", "wants a parameter 'text', but is called with the keywords completion"),
        ("def score(answer, /): return 1", "wants a parameter 'answer'"),
        ("async def score(answer): return 1", "async"),
        ("def score(answer): yield 1", "generator"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused(write: Write, definition: str, said: str) -> None:
    assert said in refusal(write(definition + "\n"))


def test_parameters_with_defaults_are_left_alone(write: Write) -> None:
    assert judged(write("def score(scale=3, *rest, answer): return scale\n")).total == 3.0


def test_a_file_whose_name_is_taken_is_refused_and_hides_nothing(tmp_path: Path, write: Write) -> None:
    (tmp_path / "statistics.py").write_text("def score(): return 1\n")
    part = {**write(""), "function": "statistics:score"}
    text = refusal(part)
    assert f"the name 'statistics' of {tmp_path / 'statistics.py'} is taken by" in text
    assert "rename the file" in text


def recipe_with(*parts: dict[str, str], **timeouts: float) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"build": {}},
            "data": {"sums": {"kind": "reasoning_gym", "task": "chain_sum"}},
            "train": {"dataset": "sums", "batches": 1, "batch_size": 1, "lr": 1e-3},
            "rewards": {"parts": list(parts)},
            "timeouts": timeouts,
        }
    )


def test_a_check_before_the_run_says_what_a_worker_would_and_touches_nothing_here(write: Write) -> None:
    good = recipe_with(write("print('hello')\ndef score(): return 1\n"))
    check_rewards(good)
    assert "users_rewards" not in sys.modules
    bad = recipe_with(write("import sys\nprint('hello', flush=True)\nsys.exit(0)\n"))
    with pytest.raises(RecipeError, match=r"^reward part 'score': importing 'users_rewards'.*sys.exit\(0\)"):
        check_rewards(bad)
    with pytest.raises(RecipeError, match=r"ended their process \(exit code 9\)"):
        check_rewards(recipe_with(write("import os\nos._exit(9)\n")))


def test_a_check_of_a_module_that_hangs_ends(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"importing the reward parts score took longer than timeouts.load_s = 0.5 s"):
        check_rewards(recipe_with(write("while True: pass\n"), load_s=0.5))
