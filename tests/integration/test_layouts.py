"""A model in a layout of several ranks has the loss and the gradients of one process."""

from __future__ import annotations

import pytest

from benchmarks.parallel_table.__main__ import as_markdown, fits, measure
from benchmarks.parallel_table.cells import COVERING, Cell

pytestmark = pytest.mark.integration


def test_every_axis_alone_and_with_others_gives_the_gradients_of_one_process() -> None:
    found = measure([Cell(*names) for names in COVERING])
    assert all(fits(verdict) for verdict in found.values()), "\n" + as_markdown(found)
    assert all(verdict["micro_batches"] > 1 for verdict in found.values()), "gradients were not accumulated"
