"""The simulator as a test: some seeds live, and every deliberate bug is caught."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import structlog

from tests.simulation.faults import Fault
from tests.simulation.mutants import MUTANTS, Mutant, mutated, run
from tests.simulation.simulate import live, quiet, shrink

OTHER_SEEDS = 300


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    before = structlog.get_config()
    quiet()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("seed", range(25))
def test_a_seed_lives(seed: int) -> None:
    life = live(seed)
    assert not life.violation, f"make simulate SEEDS=1 FIRST={seed}: {life.violation}"


def test_a_seed_lives_the_same_life_twice() -> None:
    once, again = live(3, tracing=True), live(3, tracing=True)
    assert once.trace == again.trace
    assert (once.messages, once.events, once.virtual_s) == (again.messages, again.events, again.virtual_s)


def test_without_faults_there_is_one_term_and_no_rollback() -> None:
    life = live(8, [], tracing=True)
    assert not life.violation
    assert life.terms == 1
    assert not any("RolledBack" in text for _, text in life.trace)


def test_faults_that_do_not_matter_are_left_out_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [Fault("status", float(at)) for at in range(8)] + [Fault("foreign data", 4.5)]

    def fails(seed: int, chosen: list[Fault], *, tracing: bool = False) -> object:
        life = live(seed, [], tracing=tracing)
        life.faults = chosen
        life.violation = "it is there" if any(fault.kind == "foreign data" for fault in chosen) else ""
        return life

    monkeypatch.setattr("tests.simulation.simulate.live", fails)
    assert [fault.kind for fault in shrink(fails(8, faults)).faults] == ["foreign data"]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deliberate_bug_is_caught(mutant: Mutant) -> None:
    """By its seed, or by another one where lives have become others since: then the list wants the new one."""
    with mutated(mutant) as folder:
        done = run(folder, mutant.seed, 1)
        if done.returncode == 0:
            warnings.warn(f"seed {mutant.seed} catches {mutant.name!r} no more", stacklevel=1)
            done = run(folder, 0, OTHER_SEEDS)
    assert done.returncode == 1, f"nobody noticed {mutant.name!r}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    assert re.search(r"^seed \d+ FAILED", done.stdout, re.MULTILINE), done.stdout + done.stderr
