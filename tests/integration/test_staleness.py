"""The staleness bound, whatever it is, is never exceeded - and is made use of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import NewRun

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_nothing_is_trained_later_than_the_bound(new_run: NewRun, recipe: Path, bound: int) -> None:
    run = new_run().up(recipe, f"train.max_staleness={bound}", "train.batches=15", "rollout.slots=64")
    assert run.wait() == 0, run.story()
    audit = run.assert_complete()
    assert audit.bound == bound
    assert audit.staleness <= bound
    assert max(line["staleness_max"] for line in run.metrics() if line["stage"] == "train") == audit.staleness
    if bound == 4:
        assert audit.staleness > 0, "the engine was held back though the bound left it room"
