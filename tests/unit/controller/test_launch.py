"""A launch claims the run, and controllers of older ones are fenced wherever they still live."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from services.controller.launch import Launch, Superseded, claim_launch, newest_launch
from tests.unit.controller.test_server import BUS, WAIT_S, Term
from tests.unit.controller.world import recipe


def test_every_claim_has_a_number_of_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_launch(tmp_path), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    assert newest_launch(tmp_path) == 40


def test_the_newest_launch_may_go_on_and_older_ones_are_superseded(tmp_path: Path) -> None:
    older, newer = Launch(tmp_path, claim_launch(tmp_path)), Launch(tmp_path, claim_launch(tmp_path))
    newer.check()
    with pytest.raises(Superseded, match="expected launch 1 in .*, got 2"):
        older.check()


def test_where_nobody_claims_a_run_nobody_is_superseded(tmp_path: Path) -> None:
    Launch(tmp_path, 0).check()
    claim_launch(tmp_path)
    Launch(tmp_path, 0).check()


def test_a_controller_of_an_older_launch_ends_by_itself(tmp_path: Path) -> None:
    context = zmq.Context()
    term = Term(tmp_path, recipe(bus=BUS), context, launch=claim_launch(tmp_path))
    try:
        assert not term.end.done()
        claim_launch(tmp_path)
        assert isinstance(term.end.exception(WAIT_S), Superseded)
    finally:
        term.close()
        context.destroy(linger=0)
