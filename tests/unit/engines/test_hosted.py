"""What all engines with processes of their own share: whoever waits for one stops waiting when its replica is over."""

from __future__ import annotations

import asyncio
import time

import pytest

from shared.bus import Fenced
from shared.engines.endpoint import Application
from shared.engines.hosted import HostedEngine, Made, Report, Sample
from shared.weights import StagedWeights


class Stuck(HostedEngine):
    """A backend that starts, and whose workers do not answer to a pause."""

    stopped = False

    async def _start(self) -> None:
        pass

    async def _application(self) -> Application:
        raise NotImplementedError

    async def _generate(self, sample: Sample) -> Made:
        raise NotImplementedError

    async def _abort(self, sample: Sample) -> None:
        raise NotImplementedError

    async def _pause(self) -> None:
        await asyncio.Event().wait()

    async def _load(self, weights: StagedWeights, version: int, recompute: bool) -> None:
        raise NotImplementedError

    async def _resume(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        self.stopped = True

    def _death(self) -> str | None:
        return None

    def _report(self) -> Report:
        return Report()


class Client:
    """Of the bus's client, the one thing that an engine looks at."""

    def __init__(self) -> None:
        self.looks = 0

    def raise_if_ended(self) -> None:
        self.looks += 1
        if self.looks > 2:
            raise Fenced("incarnation", "the newest start", "one that is over", "end it")


def test_a_fenced_replica_does_not_wait_for_the_worker_that_made_it_so() -> None:
    client = Client()
    engine = Stuck([], context=8, slots=1, stops=[], start_s=60.0, call_s=60.0, client=client)  # type: ignore[arg-type]
    client.looks, began = 0, time.monotonic()
    with pytest.raises(Fenced):
        engine.pause()
    assert time.monotonic() - began < 30.0
    engine.close()
    assert engine.stopped
