"""A replica of several ranks in real processes: a service on rank 0, and workers that compute and are on the bus."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.bus import BusClient, Fenced
from shared.config import load_recipe
from shared.engines.ranks import invitation
from shared.messages import LoadState, ReplicaFailed
from shared.service import EXIT_FENCED
from tests.integration.conftest import NewRun
from tests.integration.run import ROOT, Run
from tests.integration.test_services_alone import free_address

pytestmark = pytest.mark.integration
LOST_AFTER_S = 2.0
PATIENCE_S = 60.0

Workers = Callable[[bytes, int], subprocess.Popen[bytes]]


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def run(new_run: NewRun, recipe: Path, address: str) -> Run:
    """A run with a controller alone."""
    run = new_run()
    options = ("--recipe", str(recipe), "--run-folder", str(run.folder), "--bind", address)
    run.launch("services.controller", *options, "--set", f"bus.lost_after_s={LOST_AFTER_S}")
    return run


@pytest.fixture
def rank_0(run: Run, recipe: Path, address: str) -> Iterator[Callable[[], BusClient]]:
    """Starts the rank 0 of rollout-0, a replica of three."""
    settings = load_recipe(recipe, [f"bus.lost_after_s={LOST_AFTER_S}"]).bus
    clients: list[BusClient] = []

    def start() -> BusClient:
        client = BusClient(address, role="rollout", replica="rollout-0", world=3, settings=settings)
        clients.append(client)
        client.start(PATIENCE_S)
        return client

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def worker() -> Iterator[Workers]:
    """Starts a worker by its number; all are ended by the test's end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(invited: bytes, number: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.worker_rank", str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(invited)
        process.stdin.close()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def joined(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the worker is a rank, or has ended."""
    assert process.stdout is not None
    return any(line.strip() == b"joined" for line in process.stdout)


def fenced(client: BusClient) -> bool:
    """Whether the controller has said that this replica is over."""
    try:
        client.raise_if_ended()
    except Fenced:
        return True
    return False


def losses(run: Run) -> list[str]:
    return [fact["cause"] for fact in run.facts("gone") if fact["state"] == "lost"]


def test_a_replica_loads_when_its_workers_are_there_and_lives_while_they_are_busy(
    run: Run, rank_0: Callable[[], BusClient], worker: Workers
) -> None:
    client = rank_0()
    first = worker(invitation(client, PATIENCE_S), 0)
    assert joined(first)
    assert client.receive(0.5) is None, "one rank is missing"
    assert joined(worker(invitation(client, PATIENCE_S), 1))
    order = client.receive(PATIENCE_S)
    assert order is not None and isinstance(order.message, LoadState)
    time.sleep(2 * LOST_AFTER_S)  # interpreters that never rest
    assert not losses(run) and not fenced(client)

    first.kill()
    client.send(ReplicaFailed("rank 1 ended", fatal=False))  # what a service does that watches its workers
    run.wait_for(lambda: losses(run) == ["rank 1 ended"], "the loss of the replica")


def test_a_silent_worker_is_the_replicas_loss_and_all_of_its_ranks_are_fenced(
    run: Run, rank_0: Callable[[], BusClient], worker: Workers
) -> None:
    client = rank_0()
    invited = invitation(client, PATIENCE_S)
    workers = [worker(invited, number) for number in range(2)]
    assert all(joined(process) for process in workers)
    workers[1].send_signal(signal.SIGSTOP)
    run.wait_for(lambda: losses(run), "the loss of a replica with a silent rank")
    assert losses(run)[0].startswith("rank 2 silent for")
    run.wait_for(lambda: fenced(client), "rank 0 to be fenced")
    assert workers[0].wait(PATIENCE_S) == EXIT_FENCED

    again = rank_0()
    assert again.incarnation == 2
    workers[1].send_signal(signal.SIGCONT)
    assert workers[1].wait(PATIENCE_S) == EXIT_FENCED, "a worker of the old start does not join the new one"
    assert not joined(worker(invited, 1))
    assert again.receive(0.5) is None
    assert len(losses(run)) == 1
