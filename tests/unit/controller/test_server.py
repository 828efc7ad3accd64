"""The controller over the real bus, in process: replicas that obey, one that is replaced, and a term that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import pytest
import zmq

from services.controller.audit import audit_run
from services.controller.core.outcome import EndRun
from services.controller.disk import FolderDisk
from services.controller.journal import Journal
from services.controller.launch import Launch
from services.controller.outputs import Outputs
from services.controller.recovery import open_run
from services.controller.server import Controller
from services.controller.spool import Spool
from shared.bus import BusClient, Fenced, Refusal, RouterBus, ask
from shared.config import Recipe
from shared.messages import (
    Accepted,
    AnyMessage,
    DatasetIdentity,
    FormMesh,
    GroupReport,
    LoadState,
    Registered,
    ReplicaExited,
    SetHyperparameters,
    Shutdown,
    Status,
    StatusRequest,
    StopRun,
    StoreGet,
    StoreSet,
    StoreValue,
    TrainStep,
)
from tests.unit.controller.world import DATASETS, Model, World, recipe

ADDRESS = "inproc://controller"
WAIT_S = 20.0
BUS = {"heartbeat_s": 0.05, "resend_s": 0.1, "lost_after_s": 1.0}


class Term:
    """One controller process, as a thread over a run folder. `kill` ends it as a crash does."""

    def __init__(self, folder: Path, tables: Recipe, context: zmq.Context, launch: int = 0) -> None:
        self.folder = folder
        journal_disk, spool_disk = FolderDisk(folder / "journal"), FolderDisk(folder / "spool")
        self._disks = (journal_disk, spool_disk)
        self.journal = Journal(journal_disk, 1 << 20)
        outputs = Outputs(folder)
        self.core = open_run(tables, folder, self.journal, outputs)
        self._bus = RouterBus(ADDRESS, term=self.core.state.term + 1, settings=tables.bus, context=context)
        self._controller = Controller(
            self.core, self.journal, Spool(spool_disk, 1 << 20), outputs, self._bus, Launch(folder, launch)
        )
        self._loop = asyncio.new_event_loop()
        self.end: Future[EndRun] = Future()
        self._serving: asyncio.Task[EndRun] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Nothing more is journaled or said."""
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            self._loop.call_soon_threadsafe(lambda: self._serving and self._serving.cancel())
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """End it whatever it does."""
        if self._thread.is_alive():
            self.kill()
        for disk in self._disks:
            disk.close()

    def _run(self) -> None:
        self._serving = self._loop.create_task(self._controller.serve("test"))
        try:
            self.end.set_result(self._loop.run_until_complete(self._serving))
        except BaseException as error:
            self.end.set_exception(error)
        finally:
            self._loop.close()


class Replica:
    """A model replica of the small world behind a real client."""

    def __init__(
        self, name: str, tables: Recipe, context: zmq.Context, datasets: list[DatasetIdentity] | None = None
    ) -> None:
        self.model = Model(cast(World, None), name, name.partition("-")[0], 0)
        self.client = BusClient(
            ADDRESS,
            role=self.model.role,  # type: ignore[arg-type]
            replica=name,
            settings=tables.bus,
            datasets=datasets or DATASETS,
            context=context,
        )
        self.over = False

    def turn(self, wait_s: float = 0.005) -> None:
        """Take one order, if there is one, and answer it."""
        delivery = self.client.receive(wait_s)
        if delivery is None:
            return
        if isinstance(delivery.message, Shutdown):
            self.over = True
            self.client.close(goodbye="the run is over")
            return
        for answer in self.model.take(delivery.message):
            self.client.hold(self.model.holds)
            self.client.send(answer, _frames(answer))


def _frames(answer: AnyMessage) -> tuple[bytes, ...]:
    if not isinstance(answer, GroupReport):
        return ()
    return tuple(bytes(4 * header.shape[0]) for header in answer.arrays)


class Bench:
    """Terms and replicas of one run folder, in one process."""

    def __init__(self, folder: Path, context: zmq.Context) -> None:
        self.folder, self.context = folder, context
        self.tables = recipe(bus=BUS)
        self._terms: list[Term] = []
        self._replicas: list[Replica] = []

    def term(self) -> Term:
        self._terms.append(Term(self.folder, self.tables, self.context))
        return self._terms[-1]

    def replica(self, name: str, datasets: list[DatasetIdentity] | None = None) -> Replica:
        replica = Replica(name, self.tables, self.context, datasets)
        self._replicas.append(replica)
        return replica

    def started(self, *names: str) -> list[Replica]:
        replicas = [self.replica(name) for name in names]
        for replica in replicas:
            replica.client.start(WAIT_S)
        return replicas

    def play(self, replicas: list[Replica], until: Callable[[], object]) -> None:
        """Let the replicas obey until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < deadline, "never came to hold"
            for replica in replicas:
                if not replica.over:
                    replica.turn()

    def ask(self, message: AnyMessage) -> AnyMessage:
        return ask(ADDRESS, message, WAIT_S, context=self.context)

    def state_of(self, name: str) -> str:
        status = self.ask(StatusRequest())
        assert isinstance(status, Status)
        states = {replica["name"]: replica["state"] for replica in status.run["replicas"]}  # type: ignore[attr-defined]
        return str(states.get(name, "unknown"))

    def close(self) -> None:
        for term in self._terms:
            term.close()
        for replica in self._replicas:
            replica.client.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    context = zmq.Context()
    bench = Bench(tmp_path, context)
    yield bench
    bench.close()
    context.destroy(linger=0)


def metrics(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_the_bus_completes_with_a_clean_audit(bench: Bench) -> None:
    term = bench.term()
    replicas = bench.started("policy-0", "rollout-0", "rollout-1")
    assert (bench.folder / "controller.address").read_text() == f"{ADDRESS} 1\n"
    bench.play(replicas, until=lambda: all(replica.over for replica in replicas))
    assert term.end.result(WAIT_S) == EndRun("complete", "all stages done")
    audit = audit_run(bench.folder)
    assert (audit.faults, audit.outcome, audit.terms) == ([], "complete", 1)
    assert metrics(bench.folder) == [0, 1, 2]
    assert not [replica for replica in replicas if replica.client.stats().get("refused_malformed")]


def test_a_controller_that_is_killed_goes_on_over_the_same_folder(bench: Bench) -> None:
    term = bench.term()
    replicas = bench.started("policy-0", "rollout-0")
    policy = replicas[0].model
    bench.play(replicas, until=lambda: policy.holds is not None and policy.holds.version == 1)
    term.kill()
    with pytest.raises(asyncio.CancelledError):
        term.end.result(0)
    kept = term.journal.number
    again = bench.term()
    assert again.journal.number >= kept - 1
    bench.play(replicas, until=lambda: all(replica.over for replica in replicas))
    assert again.end.result(WAIT_S).outcome == "complete"
    audit = audit_run(bench.folder)
    assert (audit.faults, audit.terms, audit.rollbacks) == ([], 2, [])
    assert metrics(bench.folder) == [0, 1, 2], "no line is doubled by the replay"
    assert [replica.client.incarnation for replica in replicas] == [1, 1]
    assert {replica.client.term for replica in replicas} == {2}


def test_a_complete_run_has_nothing_left_to_resume(bench: Bench) -> None:
    term = bench.term()
    replicas = bench.started("policy-0", "rollout-0")
    bench.play(replicas, until=lambda: all(replica.over for replica in replicas))
    term.end.result(WAIT_S)
    journal = Journal(FolderDisk(bench.folder / "journal"), 1 << 20)
    assert journal.since_snapshot() == 0, "the end left a snapshot"
    assert open_run(bench.tables, bench.folder, journal, Outputs(bench.folder)).state.stages.name == "over"


def test_a_refused_registration_is_raised_by_name(bench: Bench) -> None:
    bench.term()
    bench.started("rollout-0")
    other = bench.replica("rollout-1", [DatasetIdentity("train", 7, "zz")])
    with pytest.raises(Refusal, match="dataset: expected train: 1000 rows, fingerprint aa, got train: 7 rows"):
        other.client.start(WAIT_S)
    assert bench.state_of("rollout-1") == "unknown"


def test_a_process_whose_name_was_taken_is_fenced_and_the_new_one_stays(bench: Bench) -> None:
    bench.term()
    [old] = bench.started("rollout-0")
    [new] = bench.started("rollout-0")
    assert (old.client.incarnation, new.client.incarnation) == (1, 2)

    def fenced() -> bool:
        new.turn()
        try:
            old.client.receive(0.01)
        except Fenced:
            return True
        return False

    bench.play([], until=fenced)
    assert bench.state_of("rollout-0") != "lost"


def test_a_process_that_falls_silent_is_lost(bench: Bench) -> None:
    bench.term()
    [gone, stays] = bench.started("rollout-0", "rollout-1")
    gone.client.close()
    bench.play([stays], until=lambda: bench.state_of("rollout-0") == "lost")
    assert bench.state_of("rollout-1") != "lost"


def test_goodbye_is_acknowledged_and_the_replica_has_left(bench: Bench) -> None:
    bench.term()
    [replica] = bench.started("rollout-0")
    replica.client.close(goodbye="done")
    assert replica.client.stats()["in_flight"] == 0
    assert bench.state_of("rollout-0") == "left"


def test_a_launcher_that_tells_of_an_exit_spares_the_wait(bench: Bench) -> None:
    bench.term()
    [replica] = bench.started("rollout-0")
    pid = replica.client._session._passport.pid
    assert isinstance(bench.ask(ReplicaExited("rollout-0", pid + 1, 1)), Accepted)
    assert bench.state_of("rollout-0") != "lost"
    bench.ask(ReplicaExited("rollout-0", pid, -9))
    assert bench.state_of("rollout-0") in ("lost", "joining", "loading"), "the process may have come back already"


def test_a_replica_thought_lost_comes_back_as_a_new_incarnation_by_itself(bench: Bench) -> None:
    bench.term()
    [replica] = bench.started("rollout-0")
    pid = replica.client._session._passport.pid
    bench.ask(ReplicaExited("rollout-0", pid, -9))
    bench.play([replica], until=lambda: replica.client.incarnation == 2)
    bench.play([replica], until=lambda: [type(m) for m in replica.model.seen][-2:] == [Registered, LoadState])
    bench.play([replica], until=lambda: bench.state_of("rollout-0") == "stale")


def test_a_person_may_look_change_and_stop(bench: Bench) -> None:
    term = bench.term()
    replicas = bench.started("policy-0", "rollout-0")
    policy = replicas[0].model
    policy.silent = {TrainStep}
    bench.play(replicas, until=lambda: policy.told(TrainStep))
    status = bench.ask(StatusRequest())
    assert isinstance(status, Status)
    assert (status.run["stage"], status.run["term"], status.run["version"]) == ("train", 1, 0)
    with pytest.raises(Refusal, match=r"hyperparameter.*train\.batches cannot change"):
        bench.ask(SetHyperparameters({"train.batches": 3}, None))
    assert isinstance(bench.ask(SetHyperparameters({"train.lr": 5e-4}, None)), Accepted)
    assert isinstance(bench.ask(StopRun("enough")), Accepted)
    policy.silent = set()
    step = policy.told(TrainStep)[-1]
    for answer in policy.take(step):
        replicas[0].client.send(answer)
    bench.play(replicas, until=lambda: all(replica.over for replica in replicas))
    assert term.end.result(WAIT_S) == EndRun("stopped", "enough")
    assert audit_run(bench.folder).outcome == "stopped"


def test_members_of_a_forming_mesh_meet_at_the_controller(bench: Bench) -> None:
    bench.term()
    replicas = bench.started("rollout-0", "policy-0")
    for replica in replicas:
        replica.model.silent = {FormMesh}
    bench.play(replicas, until=lambda: all(replica.model.told(FormMesh) for replica in replicas))
    [one, other] = [replica.client for replica in replicas]
    assert one.request(StoreGet(1, "k", 0.05), WAIT_S) == StoreValue(1, "k", None)
    assert other.request(StoreSet(1, "k", b"v"), WAIT_S) == StoreValue(1, "k", b"v")
    assert one.request(StoreGet(1, "k", 5.0), WAIT_S) == StoreValue(1, "k", b"v")
    with pytest.raises(Refusal, match="epoch"):
        one.request(StoreGet(9, "k", 5.0), WAIT_S)
