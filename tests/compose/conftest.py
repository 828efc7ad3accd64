"""One Docker engine for all of these tests, with the images that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compose.engine import MAKE, Engine, run
from tests.compose.run import ComposeRun
from tests.integration.run import write_recipe

NewRun = Callable[..., ComposeRun]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine; its images are built by `make images`, from wheels, without a network."""
    with Engine() as engine:
        run([*MAKE, "images"], engine.environment)
        yield engine


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of seconds."""
    return write_recipe(tmp_path)


@pytest.fixture
def new_run(tmp_path: Path, engine: Engine) -> Iterator[NewRun]:
    """Makes runs by name."""
    runs: list[ComposeRun] = []

    def make(name: str = "run") -> ComposeRun:
        runs.append(ComposeRun(tmp_path / name, engine))
        return runs[-1]

    yield make
    for each in runs:
        each.close()
