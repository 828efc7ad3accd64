"""Rank 0's side, with real processes that do as they are told: answers, errors, deaths, silence."""

from __future__ import annotations

import os
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.policy.ranks import crew as crews
from services.policy.ranks.crew import Crew
from services.policy.ranks.orders import Load, RanksError, Revoke
from shared.bus import BusClient
from shared.mesh import MeshError
from shared.messages import LoadState, Position, RevokeMesh
from shared.service import EXIT_RESTART

MEMBER = (sys.executable, str(Path(__file__).with_name("scripted_member.py")))
LIMIT_S = 0.5


def order(what: str) -> Load:
    return Load(LoadState("checkpoint", Position(0, 0, 0), what))


@pytest.fixture
def start(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Crew]]:
    """Starts a crew of three ranks whose members are there."""
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    started: list[Crew] = []

    def make() -> Crew:
        recipe = tools.recipe(policy__parallel={"replicate": 3})
        client = BusClient("tcp://127.0.0.1:1", role="policy", replica="policy-0", world=3, settings=recipe.bus)
        crew = Crew(recipe, tmp_path / "run", client, command=MEMBER)
        started.append(crew)
        crew.__enter__()
        crew.wait_for_all()
        return crew

    yield make
    for crew in started:
        crew.close()
    assert not os.listdir(tmp_path / "t")
    assert not [child for child in psutil.Process().children() if str(MEMBER[1]) in child.cmdline()]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[int]:
    """The exit codes with which this process would have ended."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(crews, "leave_at_once", codes.put)
    return codes


def test_all_answer_and_what_rank_0_does_is_done_meanwhile(start: Callable[..., Crew]) -> None:
    crew = start()
    with crew.together(order("done")) as answers:
        assert answers == []
    assert [(done.rank, done.holds) for done in answers] == [(1, True), (2, True)]


def test_a_late_rank_is_named_with_the_order_and_the_timeout(start: Callable[..., Crew]) -> None:
    crew = start()
    crew._recipe.timeouts.__dict__["load_s"] = LIMIT_S
    late = r"waited 0.5 s \(timeouts.load_s\) for rank 1, 2 to carry out Load"
    with pytest.raises(RanksError, match=late), crew.together(order("hang")):
        pass


@pytest.mark.parametrize("kind", ["fatal", "restart"])
def test_an_error_of_a_member_ends_the_replica_whatever_its_main_thread_does(
    start: Callable[..., Crew], exits: queue.SimpleQueue[int], kind: str
) -> None:
    crew = start()
    heard: queue.SimpleQueue[RanksError] = queue.SimpleQueue()
    crew.listen(lambda rank, message: None, heard.put)
    crew.do(order(kind))
    code = exits.get(timeout=20)  # this thread has not come back
    assert code == (3 if kind == "fatal" else EXIT_RESTART)
    error = heard.get(timeout=1)
    assert "told to" in str(error) and error.fatal == (kind == "fatal")
    with pytest.raises(RanksError, match="told to"):
        crew.finish()
    with pytest.raises(RanksError, match="told to"):
        crew.do(order("done"))


def test_a_mesh_that_fails_on_a_member_is_an_attempt_to_be_taken_back(start: Callable[..., Crew]) -> None:
    crew = start()
    with pytest.raises(MeshError, match="rank 1: told to"), crew.together(order("mesh")):
        pass
    with crew.together(order("done")):
        pass


def test_a_death_is_seen_at_once_and_takes_along_a_sibling_that_hangs(
    start: Callable[..., Crew], exits: queue.SimpleQueue[int]
) -> None:
    crew = start()
    pids = [member.process.pid for member in crew._members]
    death = rf"rank 2 \(process {pids[1]}\) ended: killed by SIGKILL"
    with pytest.raises(RanksError, match=death), crew.together(order("die")):  # rank 1 is stopped
        pass
    crew.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert exits.empty(), "the main thread ended it"


def test_what_broke_in_rank_0_is_told_as_the_death_that_broke_it(
    start: Callable[..., Crew], exits: queue.SimpleQueue[int]
) -> None:
    crew = start()
    with pytest.raises(RanksError, match="rank 2 .* killed by SIGKILL"), crew.together(order("die")):
        raise RanksError("connection closed by peer")


def test_what_members_say_of_their_meshes_is_passed_on(start: Callable[..., Crew]) -> None:
    crew = start()
    told: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    crew.listen(lambda rank, message: told.put((rank, message)), lambda error: None)
    crew.tell(Revoke(RevokeMesh(7, "so")))
    assert {told.get(timeout=20)[0] for _ in range(2)} == {1, 2}


def test_a_folder_too_long_for_sockets_is_refused_and_removed(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    recipe = tools.recipe(policy__parallel={"replicate": 2})
    client = BusClient("tcp://127.0.0.1:1", role="policy", replica="policy-0", world=2, settings=recipe.bus)
    with pytest.raises(RanksError, match="set TMPDIR to a shorter one"):
        Crew(recipe, tmp_path, client)
    assert not os.listdir(deep)
