"""The rewards pool: whatever a reward does, its own sample alone pays for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.rollout.rewards_pool import Judged, RewardsPool, RewardsPoolError
from shared.config import RecipeError
from shared.config.schema import DataTable, ExactPart, LengthPart, PythonPart, VerifierPart
from shared.data import open_dataset

MISCHIEF = (sys.executable, str(Path(__file__).with_name("mischief_worker.py")))
TABLE = DataTable(kind="reasoning_gym", task="chain_sum", size=10)
VERIFIER = [VerifierPart()]
AT_ROW = "row 0 of data set 'sums': reward part 'verifier'"

MakePool = Callable[..., RewardsPool]
UserPart = Callable[[str], PythonPart]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools: list[RewardsPool] = []

    def make(**changes: object) -> RewardsPool:
        settings = {"workers": 1, "timeout_s": 20.0, "memory_mb": 1024, "start_timeout_s": 60.0, "command": MISCHIEF}
        parts = changes.pop("parts", VERIFIER)
        pools.append(RewardsPool({"sums": TABLE}, parts, **(settings | changes)))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def user_part(tmp_path: Path) -> UserPart:
    """Writes a module of the user's; gives the part of its function `score`."""

    def write(text: str) -> PythonPart:
        (tmp_path / "users_rewards.py").write_text(text)
        return PythonPart(function="users_rewards:score", path=str(tmp_path))

    return write


def judge(pool: RewardsPool, *answers: str) -> dict[str, Judged]:
    """Submit an answer each; what became of them, by answer."""
    for answer in answers:
        pool.submit(answer, "sums", 0, f"<answer>{answer}</answer>", tokens=3)
    return collect(pool)


def collect(pool: RewardsPool) -> dict[str, Judged]:
    judged: dict[str, Judged] = {}
    deadline = time.monotonic() + 60
    while pool.pending and time.monotonic() < deadline:
        for result in pool.collect(timeout_s=1.0):
            assert result.tag not in judged
            judged[result.tag] = result
    assert not pool.pending
    return judged


def total(judged: Judged) -> float:
    assert judged.score is not None, judged.error
    return judged.score.total


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody reaps counts as ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_completions_are_judged_by_real_data_sets_in_real_workers() -> None:
    dataset = open_dataset("sums", TABLE)
    parts = [ExactPart(weight=2.0), LengthPart(weight=1.0, max_length=8, cache_length=4)]
    pool = RewardsPool({"sums": TABLE}, parts, workers=2, timeout_s=20, memory_mb=2048, start_timeout_s=60)
    try:
        for row in range(10):
            pool.submit(row, "sums", row, f"<answer>{dataset.row(row).answer}</answer>", tokens=row)
        pool.submit("held out", "sums", 0, f"<answer>{dataset.row(0).answer}</answer>", tokens=9, held_out=True)
        judged = collect(pool)
    finally:
        pool.close()
    assert [total(judged[row]) for row in range(10)] == [2.0] * 5 + [1.75, 1.5, 1.25, 1.0, 1.0]
    assert judged[6].score.parts == {"exact": 1.0, "length": -0.5}
    assert judged["held out"].score.parts == {"verifier": 1.0}


def test_what_a_verifier_raises_is_its_samples_error_and_the_worker_goes_on(make_pool: MakePool) -> None:
    judged = judge(make_pool(), "pid", "raise", "exit", "nan", "inf", "0.25")
    assert judged["raise"].error.startswith(f"{AT_ROW}: it raised ValueError: no such luck (mischief_worker.py, line ")
    assert judged["exit"].error.startswith(f"{AT_ROW}: it called sys.exit(0)")
    assert judged["nan"].error.startswith(f"{AT_ROW}: it returned nan, expected a finite number")
    assert judged["inf"].error.startswith(f"{AT_ROW}: it returned inf, expected a finite number")
    assert total(judged["0.25"]) == 0.25


def test_a_verifier_that_hangs_is_killed_after_its_time_and_the_others_go_on(make_pool: MakePool) -> None:
    pool = make_pool(workers=2)
    judge(pool, "0.0", "1.0")  # both workers are up
    pool._timeout_s = 1.0
    judged = judge(pool, "0.1", "hang", "0.2", "0.3", "0.4")
    assert judged["hang"].error.startswith(f"{AT_ROW} took longer than rewards.timeout_s = 1 s and was killed; make it")
    assert [total(judged[answer]) for answer in ("0.1", "0.2", "0.3", "0.4")] == [0.1, 0.2, 0.3, 0.4]


def test_a_killed_verifiers_own_children_die_with_it(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISCHIEF_CHILD", str(tmp_path / "child"))
    pool = make_pool()
    judge(pool, "0.0")
    pool._timeout_s = 1.0
    assert judge(pool, "hang with a child")["hang with a child"].score is None
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while not gone(child) and time.monotonic() < deadline:
        os.sched_yield()
    assert gone(child)


def test_a_verifier_that_eats_memory_meets_the_limit_and_a_fresh_worker_goes_on(make_pool: MakePool) -> None:
    judged = judge(make_pool(memory_mb=512), "eat", "0.5")
    assert judged["eat"].error.startswith(f"{AT_ROW} ran into rewards.memory_mb = 512; have it use less memory")
    assert total(judged["0.5"]) == 0.5


def test_a_worker_that_dies_is_replaced(make_pool: MakePool) -> None:
    judged = judge(make_pool(), "die", "0.5")
    assert judged["die"].error.startswith(f"{AT_ROW} ended its process (exit code 7); have it raise an exception")
    assert total(judged["0.5"]) == 0.5


def test_a_worker_that_is_killed_from_outside_while_idle_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = int(total(judge(pool, "pid")["pid"]))
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        os.sched_yield()
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        os.sched_yield()  # until the pool has reaped it, which is when it starts the next one
    assert int(total(judge(pool, "pid")["pid"])) != pid


def test_a_worker_that_writes_garbage_is_replaced(make_pool: MakePool) -> None:
    judged = judge(make_pool(), "garbage", "0.5")
    assert judged["garbage"].error.startswith(f"{AT_ROW} wrote into its worker's pipe")
    assert total(judged["0.5"]) == 0.5


def test_what_a_verifier_prints_does_not_reach_the_pipe(make_pool: MakePool) -> None:
    assert total(judge(make_pool(), "chatter")["chatter"]) == 1.0


def test_a_completion_longer_than_a_pipe_holds_is_judged(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.submit("long", "sums", 0, "x" * 1_000_000 + "<answer>0.5</answer>", tokens=250_000)
    assert total(collect(pool)["long"]) == 0.5


def test_an_unknown_data_set_is_an_error_of_its_sample(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.submit("a", "nobody", 0, "<answer>1</answer>", tokens=3)
    assert "nobody" in collect(pool)["a"].error


def test_a_pool_whose_workers_cannot_open_the_data_gives_up_with_the_reason() -> None:
    bad = TABLE.model_copy(update={"task": "no_such_task"})
    pool = RewardsPool({"sums": bad}, VERIFIER, workers=1, timeout_s=5, memory_mb=2048, start_timeout_s=60)
    try:
        pool.submit("a", "sums", 0, "<answer>1</answer>", tokens=3)
        with pytest.raises(RewardsPoolError, match="3 reward workers in a row could not start.*no_such_task"):
            collect(pool)
    finally:
        pool.close()


def test_a_memory_limit_below_what_a_worker_needs_is_refused_with_a_better_one(make_pool: MakePool) -> None:
    pool = make_pool(memory_mb=20)
    pool.submit("a", "sums", 0, "<answer>1</answer>", tokens=3)
    with pytest.raises(RecipeError, match=r"rewards.memory_mb is 20; set it to at least \d+"):
        collect(pool)


@pytest.mark.parametrize(
    ("start", "limit_s", "reason"),
    [
        ("die", 60.0, r"ended its process \(exit code 9\)"),
        ("slow", 0.5, "did not open data sets and rewards within timeouts.load_s = 0.5 s"),
    ],
)
def test_workers_that_never_get_ready_end_the_pool(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, start: str, limit_s: float, reason: str
) -> None:
    monkeypatch.setenv("MISCHIEF_START", start)
    pool = make_pool(start_timeout_s=limit_s)
    pool.submit("a", "sums", 0, "<answer>1</answer>", tokens=3)
    with pytest.raises(RewardsPoolError, match=reason):
        collect(pool)


def test_collecting_never_blocks_and_closing_leaves_no_process(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = int(total(judge(pool, "pid")["pid"]))
    pool.submit("hang", "sums", 0, "<answer>hang</answer>", tokens=3)
    assert pool.collect() == []
    pool.close()
    assert gone(pid)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    code = f"""
import os, sys
from services.rollout.rewards_pool import RewardsPool
from shared.config.schema import DataTable, VerifierPart
pool = RewardsPool({{"sums": DataTable(kind="reasoning_gym", task="chain_sum")}}, [VerifierPart()], workers=1,
                   timeout_s=60, memory_mb=1024, start_timeout_s=60, command={MISCHIEF!r})
pool.submit("pid", "sums", 0, "<answer>pid</answer>", tokens=3)
judged = pool.collect(60.0)
pool.submit("hang", "sums", 0, "<answer>hang</answer>", tokens=3)
print(int(judged[0].score.total), flush=True)
os.kill(os.getpid(), 9)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL
    worker = int(result.stdout)
    deadline = time.monotonic() + 10
    while not gone(worker) and time.monotonic() < deadline:
        os.sched_yield()
    assert gone(worker)


def test_a_task_that_its_worker_died_under_before_it_began_is_given_to_another(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISCHIEF_START", "die when handed a task")
    monkeypatch.setenv("MISCHIEF_ONCE", str(tmp_path / "once"))
    judged = judge(make_pool(), "0.5", "0.25")
    assert (total(judged["0.5"]), total(judged["0.25"])) == (0.5, 0.25)
    assert (tmp_path / "once").exists()


def test_a_task_that_two_workers_died_under_is_an_error(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISCHIEF_START", "die when handed a task")
    judged = judge(make_pool(), "0.5")
    assert judged["0.5"].error == "row 0 of data set 'sums': the reward worker ended its process (exit code 8)"


def test_a_worker_that_ended_is_noticed_though_a_forked_process_lives_on(make_pool: MakePool) -> None:
    judged = judge(make_pool(), "leave a child and die", "0.5")
    assert "ended its process (exit code 7)" in judged["leave a child and die"].error
    assert total(judged["0.5"]) == 0.5


def test_a_forked_process_that_comes_back_is_ended_and_the_worker_goes_on(
    make_pool: MakePool, tmp_path: Path, user_part: UserPart
) -> None:
    child = tmp_path / "child"
    part = user_part(
        "import os\n"
        "from pathlib import Path\n"
        "def score(completion):\n"
        "    if os.fork() == 0:\n"
        f"        Path({str(child)!r}).write_text(str(os.getpid()))\n"
        "        return 0.0\n"
        "    os.wait()\n"
        "    return 1.0\n"
    )
    pool = make_pool(parts=[part])
    judged = judge(pool, "a", "b")
    assert (total(judged["a"]), total(judged["b"])) == (1.0, 1.0)
    assert gone(int(child.read_text()))


def test_a_users_function_is_called_in_the_worker(make_pool: MakePool, user_part: UserPart) -> None:
    part = user_part("print('imported')\ndef score(tokens, row): return {'long': tokens / 4, 'flat': 1}\n")
    judged = judge(make_pool(parts=[part]), "x")
    assert judged["x"].score is not None
    assert judged["x"].score.parts == {"score": 1.75, "score/long": 0.75, "score/flat": 1.0}


def test_an_error_as_long_as_a_book_is_cut(make_pool: MakePool, user_part: UserPart) -> None:
    part = user_part("def score(): raise ValueError('x' * 50_000_000)\n")
    judged = judge(make_pool(parts=[part]), "x")
    assert "it raised ValueError: xxx" in judged["x"].error
    assert len(judged["x"].error) <= 2000


def test_a_recipe_whose_function_cannot_be_had_is_refused_at_once(make_pool: MakePool, user_part: UserPart) -> None:
    pool = make_pool(parts=[user_part("def other(): return 1\n")], workers=2)
    pool.submit("a", "sums", 0, "<answer>1</answer>", tokens=3)
    with pytest.raises(RecipeError, match="has no function 'score'"):
        collect(pool)
