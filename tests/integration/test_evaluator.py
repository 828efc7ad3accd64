"""A run whose held-out accuracy is judged by an evaluator of its own, beside the rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import Run

pytestmark = pytest.mark.integration

OWN = ("evaluator.engine=own", "evaluation.every=4", "train.batches=12")
LONG_ROUNDS = ("evaluator.slots=1", "evaluation.suites.sums.problems=40")


def judged(run: Run, version: int) -> int:
    """Rows of a version that are judged so far."""
    return sum(fact["version"] == version for fact in run.facts("judged"))


def lessees(run: Run, purpose: str) -> set[str]:
    """Who was leased groups of a purpose."""
    groups = {fact["group"] for fact in run.facts("issued") if fact["purpose"] == purpose}
    return {fact["replica"] for fact in run.facts("leased") if fact["group"] in groups}


def verdicts(run: Run) -> list[tuple[int, str, int]]:
    return [(fact["version"], fact["why"], fact["n"]) for fact in run.facts("evaluated")]


def facts_between(run: Run, name: str, first: dict[str, Any], last: dict[str, Any]) -> int:
    """How many facts of a name lie between two others in the journal."""
    facts = [fact for record in run.records() for fact in record["facts"]]
    return sum(fact["type"] == name for fact in facts[facts.index(first) : facts.index(last)])


def test_an_evaluator_judges_every_round_and_the_rollout_none(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *OWN, "evaluation.suites.sums.problems=20")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert lessees(run, "eval") == {"evaluator-0"}
    assert lessees(run, "train") == {"rollout-0"}
    assert verdicts(run)[0] == (30, "first", 20)
    assert (42, 20) in [(version, n) for version, _, n in verdicts(run)], "the last version is judged"
    assert audit.gone["lost"] == 0
    names = sorted(path.name for path in (run.folder / "eval").glob("*.json"))
    assert names == sorted(f"1-{version}-sums.json" for version, _, _ in verdicts(run))


def test_an_evaluator_killed_in_mid_round_comes_back_and_judges_the_last_version(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *OWN, *LONG_ROUNDS)
    run.wait_for(lambda: any(fact["version"] > 30 for fact in run.facts("judged")), "a periodic round")
    run.kill("evaluator")
    assert run.wait() == 0, run.story()
    run.assert_complete()
    incarnations = {fact["replica"]: fact["incarnation"] for fact in run.facts("joined")}
    assert incarnations == {"policy-0": 1, "rollout-0": 1, "evaluator-0": 2}
    last, _, rows = verdicts(run)[-1]
    assert (last, rows, judged(run, last)) == (42, 40, 40)
    facts = [fact for record in run.records() for fact in record["facts"]]
    back = next(i for i, fact in enumerate(facts) if fact["type"] == "joined" and fact["incarnation"] == 2)
    after = [fact["type"] for fact in facts[back:] if fact.get("replica") == "evaluator-0"]
    assert after.index("synced") < after.index("leased")


def test_training_goes_on_while_an_evaluator_judges(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, *OWN, *LONG_ROUNDS)
    assert run.wait() == 0, run.story()
    run.assert_complete()
    periodic = next(fact for fact in run.facts("evaluated") if fact["why"] == "periodic")
    begun = next(fact for fact in run.facts("judged") if fact["version"] == periodic["version"])
    assert facts_between(run, "committed", begun, periodic) > 0
    synced = [fact["version"] for fact in run.facts("synced") if fact["replica"] == "rollout-0"]
    assert any(version > periodic["version"] for version in synced)
