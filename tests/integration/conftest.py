"""Whole runs for integration tests: made in a temporary folder, ended by process id whatever the test did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.run import Run, write_recipe

NewRun = Callable[..., Run]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of seconds."""
    return write_recipe(tmp_path)


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[NewRun]:
    """Makes runs by name."""
    runs: list[Run] = []

    def make(name: str = "run") -> Run:
        runs.append(Run(tmp_path / name))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
