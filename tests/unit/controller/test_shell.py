"""The shell without sockets: what becomes durable before what leaves, and what is refused or repeated."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec import structs

from services.controller.core.core import Core
from services.controller.core.outcome import Gone
from services.controller.journal import Journal
from services.controller.minting import Minted, MintFailed
from services.controller.outputs import Outputs
from services.controller.recovery import DriftedJournal, open_run
from services.controller.shell import Clock, MessageTooLarge, Minting, Shell
from services.controller.spool import Spool
from shared.bus import Incoming, WireFault
from shared.config import Recipe
from shared.messages import (
    PROTOCOL,
    Accepted,
    AnyMessage,
    ArrayHeader,
    Device,
    Drain,
    Envelope,
    FormMesh,
    Goodbye,
    GroupReport,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LoadState,
    MeshFailed,
    MeshFormed,
    Position,
    Refused,
    Register,
    Registered,
    ReplicaExited,
    RevokeMesh,
    SetHyperparameters,
    StateLoaded,
    Status,
    StatusRequest,
    StopRun,
    StoreGet,
    StoreSet,
    StoreValue,
    TrainStep,
    WeightsLoaded,
    WeightsSent,
)
from tests.unit.controller.disks import MemoryDisk
from tests.unit.controller.world import DATASETS, recipe

BIG = 1 << 20
PAYLOAD = b"tokens, undecoded"
FIRST = Position(1, 0, 0)


class NotedBus:
    """A bus that notes what leaves, in one log with what the disks do."""

    def __init__(self, term: int, log: list[tuple[str, str]]) -> None:
        self.term = term
        self.counters: Counter[str] = Counter()
        self.log = log
        self.sent: list[tuple[bytes, AnyMessage, list[bytes]]] = []
        self.acknowledged: list[tuple[bytes, int, int | None]] = []
        self.open: dict[bytes, int] = {}
        self.late: list[bytes] = []

    def open_session(self, peer: bytes, sender: str, rank: int, incarnation: int) -> None:
        self.open[peer] = incarnation

    def close_session(self, peer: bytes) -> None:
        self.open.pop(peer, None)

    def send(
        self, peer: bytes, message: AnyMessage, frames: Sequence[bytes | memoryview] = (), *, reply_to: int = 0
    ) -> None:
        self.log.append(("send", type(message).__name__))
        self.sent.append((peer, message, [bytes(frame) for frame in frames]))

    def reply(self, incoming: Incoming, message: AnyMessage) -> None:
        self.send(incoming.peer, message, reply_to=incoming.envelope.request)

    def durable(self, peer: bytes, sequence: int, session: int | None = None) -> None:
        self.log.append(("ack", str(sequence)))
        self.acknowledged.append((peer, sequence, session))

    def overdue(self, now: float) -> list[bytes]:
        return self.late


class Desk:
    """A shell over disks in memory; `turn` is one round of the server's loop."""

    def __init__(
        self, folder: Path, tables: Recipe | None = None, before: Desk | None = None, minter: Minting | None = None
    ) -> None:
        self.recipe = tables or recipe()
        self.log: list[tuple[str, str]] = []
        self.journal_disk = before.journal_disk.after_crash() if before else MemoryDisk()
        self.spool_disk = before.spool_disk.after_crash() if before else MemoryDisk()
        self.journal_disk.log = self.spool_disk.log = self.log
        self.folder = folder
        self.steady = 100.0
        self.wall = 5000.0
        self.journal = Journal(self.journal_disk, BIG)
        self.core: Core = open_run(self.recipe, folder, self.journal, Outputs(folder))
        self.bus = NotedBus(self.core.state.term + 1, self.log)
        clock = Clock(lambda: self.wall, lambda: self.steady)
        spool = Spool(self.spool_disk, BIG)
        self.shell = Shell(self.core, self.journal, spool, Outputs(folder), self.bus, clock, minter)
        self.shell.begin("test")
        self.turn()
        self.sequences: Counter[bytes] = Counter()

    def turn(self) -> None:
        while True:
            self.shell.seal()
            if self.shell.unsynced:
                self.shell.sync()
            self.shell.release()
            if not self.shell.unsynced:
                return

    def pass_time(self, seconds: float) -> None:
        """Ticks, ten in a second."""
        for _ in range(round(seconds * 10)):
            self.steady += 0.1
            self.shell.tick()
            self.turn()

    def hear(
        self, sender: str, body: AnyMessage, frames: Sequence[bytes] = (), *, rank: int = 0, incarnation: int = 1
    ) -> None:
        """A message comes in; nothing is committed yet."""
        peer = sender.encode()
        session = 0 if isinstance(body, Register) or sender == "person" else 1
        self.sequences[peer] += body.reliable
        envelope = Envelope(
            protocol=PROTOCOL,
            term=self.bus.term,
            sender=sender,
            rank=rank,
            incarnation=incarnation,
            sequence=self.sequences[peer] if body.reliable else 0,
            request=7,
            reply_to=0,
            body=body,
        )
        self.shell.take(Incoming(peer, envelope, tuple(frames), session))

    def ask(self, body: AnyMessage) -> AnyMessage:
        """A person's question and its answer."""
        self.hear("person", body)
        self.turn()
        return self.to("person")[-1]

    def register(self, name: str, nonce: int = 1, **fields: object) -> None:
        role = name.partition("-")[0]
        register = Register(role, name, 0, 1, nonce, nonce, "here", None, [], DATASETS)  # type: ignore[arg-type]
        self.hear(name, Register(**{n: getattr(register, n) for n in register.__struct_fields__} | fields))
        self.turn()

    def to(self, name: str) -> list[AnyMessage]:
        """What left for somebody."""
        return [message for peer, message, _ in self.bus.sent if peer == name.encode()]

    def state_of(self, name: str) -> str:
        return self.core.state.fleet.replicas[name].state


def forming_desk(folder: Path) -> Desk:
    """A desk whose two replicas were told to form a mesh."""
    desk = Desk(folder)
    for nonce, name in enumerate(("policy-0", "rollout-0"), 1):
        desk.register(name, nonce)
        desk.hear(name, StateLoaded(FIRST))
        desk.turn()
    assert all(any(isinstance(message, FormMesh) for message in desk.to(name)) for name in ("policy-0", "rollout-0"))
    return desk


def leasing_desk(folder: Path) -> Desk:
    """A desk whose rollout holds leases; the sequences of its sessions begin anew, to be told easily."""
    desk = forming_desk(folder)
    desk.hear("policy-0", MeshFormed(1))
    desk.hear("rollout-0", MeshFormed(1))
    desk.hear("policy-0", WeightsSent(1, FIRST, "d", 1, 0.1))
    desk.hear("rollout-0", WeightsLoaded(1, FIRST, "d", 0.1))
    desk.turn()
    assert any(isinstance(message, Lease) for message in desk.to("rollout-0"))
    desk.log.clear()
    desk.sequences.clear()
    desk.bus.acknowledged.clear()
    return desk


def report(group: int, attempt: int = 1) -> GroupReport:
    return GroupReport(
        group=group, attempt=attempt, lineage=1, rewards=[0.0, 1.0], parts={}, prompt_length=1, lengths=[2, 2],
        truncated=[False, False], oldest=0, newest=0, seconds=0.1, arrays=[ArrayHeader("tokens", "uint8", [17])],
    )  # fmt: skip


def test_a_registration_is_on_disk_before_its_welcome_leaves(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.log.clear()
    desk.register("policy-0")
    names = [entry for entry in desk.log if entry[1] not in ("LoadState",)]
    assert names == [("append", "00000001.log"), ("sync", "00000001.log"), ("send", "Registered")]
    assert [type(message) for message in desk.to("policy-0")] == [Registered, LoadState]
    assert desk.bus.open == {b"policy-0": 1}


def test_a_refused_registration_is_answered_by_name_counted_and_not_journaled(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    number = desk.journal.number
    desk.register("evaluator-0")
    [refusal] = desk.to("evaluator-0")
    assert isinstance(refusal, Refused)
    assert (refusal.fault, desk.bus.counters["role"], desk.journal.number) == ("role", 1, number)
    assert not desk.bus.open


def test_a_report_is_spooled_then_journaled_then_acknowledged(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", report(1), [PAYLOAD])
    assert [entry for entry in desk.log if entry[0] in ("ack", "sync")] == [], "nothing is acknowledged unsynced"
    desk.turn()
    order = [entry for entry in desk.log if entry[0] in ("ack", "sync")]
    assert order[:3] == [("sync", "00000001.seg"), ("sync", "00000001.log"), ("ack", "1")]
    assert bytes(desk.spool_disk.after_crash().files["00000001.seg"]) == PAYLOAD


def test_one_commit_covers_everything_that_came_in_meanwhile(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    for group in range(1, 4):
        desk.hear("rollout-0", report(group), [PAYLOAD])
    desk.turn()
    assert desk.log.count(("sync", "00000001.log")) == 1
    assert desk.log.count(("sync", "00000001.seg")) == 1
    assert [sequence for _, sequence, _ in desk.bus.acknowledged][-1] == 3, "acknowledgements are cumulative"


def test_what_is_taken_while_the_disk_syncs_waits_for_the_next_commit(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", report(1), [PAYLOAD])
    desk.shell.seal()
    desk.hear("rollout-0", report(2), [PAYLOAD])
    desk.hear("rollout-0", report(3, attempt=9), [PAYLOAD])
    desk.shell.sync()
    desk.shell.release()
    assert [sequence for _, sequence, _ in desk.bus.acknowledged] == [1]
    assert not any(isinstance(message, Refused) for message in desk.to("rollout-0"))
    crashed = list(Journal(desk.journal_disk.after_crash(), BIG).replay())
    assert sum(isinstance(getattr(r.event, "body", None), GroupReport) for r in crashed) == 1
    desk.turn()
    assert [sequence for _, sequence, _ in desk.bus.acknowledged] == [1, 3]
    assert isinstance(desk.to("rollout-0")[-1], Refused)


def test_a_repetition_of_what_is_being_synced_is_not_acknowledged_before_it(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", report(1), [PAYLOAD])
    desk.shell.seal()
    desk.hear("rollout-0", report(1), [PAYLOAD])
    assert desk.bus.acknowledged == []
    desk.shell.sync()
    desk.shell.release()
    desk.turn()
    assert [sequence for _, sequence, _ in desk.bus.acknowledged] == [1, 2]


def test_a_report_that_comes_again_is_acknowledged_and_neither_spooled_nor_journaled_again(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", report(1), [PAYLOAD])
    desk.turn()
    number, size = desk.journal.number, len(desk.spool_disk.files["00000001.seg"])
    desk.hear("rollout-0", report(1), [PAYLOAD])
    desk.turn()
    assert (desk.journal.number, len(desk.spool_disk.files["00000001.seg"])) == (number, size)
    assert desk.bus.acknowledged[-1][1] == 2
    assert desk.bus.counters["repeated"] == 1


def test_a_refused_report_is_acknowledged_answered_and_counted_but_not_spooled(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    number = desk.journal.number
    desk.hear("rollout-0", report(1, attempt=9), [PAYLOAD])
    desk.turn()
    refusal = desk.to("rollout-0")[-1]
    assert isinstance(refusal, Refused)
    assert (refusal.fault, desk.bus.counters["attempt"]) == ("attempt", 1)
    assert desk.bus.acknowledged[-1][1] == 1
    assert (desk.journal.number, desk.spool_disk.files) == (number, {})


def test_only_rank_0_reports_and_only_replicas_messages_are_taken(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    number = desk.journal.number
    desk.hear("rollout-0", report(1), [PAYLOAD], rank=1)
    desk.hear("rollout-0", Drain("mischief"))
    desk.hear("rollout-0", HeartbeatReply())
    desk.turn()
    faults = [message.fault for message in desk.to("rollout-0") if isinstance(message, Refused)]
    assert sorted(faults) == ["role", "role", "role"]
    assert desk.journal.number == number


def test_a_step_carries_the_payloads_as_they_were_reported(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    for group in range(1, 5):
        desk.hear("rollout-0", report(group), [b"payload of group %d" % group])
    desk.turn()
    [(message, frames)] = [(m, f) for _, m, f in desk.bus.sent if isinstance(m, TrainStep)]
    assert [group.group for group in message.groups] == [1, 2, 3, 4]
    assert frames == [b"payload of group %d" % group for group in range(1, 5)]


def test_heartbeats_are_answered_and_never_journaled(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    number = desk.journal.number
    desk.hear("rollout-0", Heartbeat("generating", 12))
    desk.turn()
    assert desk.to("rollout-0")[-1] == HeartbeatReply()
    assert (desk.journal.number, desk.log) == (number, [("send", "HeartbeatReply")])


def test_silence_makes_a_replica_lost_and_closes_its_session(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    for _ in range(12):
        desk.hear("policy-0", Heartbeat("waiting", 0))
        desk.pass_time(1.0)
    assert (desk.state_of("rollout-0"), desk.state_of("policy-0")) == ("lost", "ready")
    assert b"rollout-0" not in desk.bus.open
    assert b"policy-0" in desk.bus.open


def test_the_controllers_own_pause_loses_nobody(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.pass_time(1.0)
    desk.steady += 500.0  # the process was stopped; every wait but silence is a deadline of the core
    desk.shell.tick()
    desk.turn()
    assert b"policy-0" in desk.bus.open


def test_a_peer_that_does_not_take_its_messages_is_lost(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.bus.late = [b"rollout-0"]
    desk.pass_time(0.1)
    assert desk.state_of("rollout-0") == "lost"


def test_a_clock_that_is_set_moves_no_deadline(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    for _ in range(5):
        desk.wall += 100_000.0
        for name in ("policy-0", "rollout-0"):
            desk.hear(name, Heartbeat("waiting", 0))
        desk.pass_time(0.5)
    assert {name: desk.state_of(name) for name in ("policy-0", "rollout-0")} == {
        "policy-0": "ready",
        "rollout-0": "ready",
    }


def test_a_launcher_tells_of_an_exit_once_and_only_the_right_process_counts(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    assert isinstance(desk.ask(ReplicaExited("rollout-0", 999, 1)), Accepted)
    assert desk.state_of("rollout-0") == "ready"
    assert isinstance(desk.ask(ReplicaExited("rollout-0", 2, -9)), Accepted)
    assert desk.state_of("rollout-0") == "lost"
    assert isinstance(desk.ask(ReplicaExited("rollout-0", 2, -9)), Accepted)
    assert isinstance(desk.ask(ReplicaExited("nobody", 2, -9)), Accepted)


def test_hyperparameters_are_checked_before_they_are_journaled(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    number = desk.journal.number
    for bad in ({"train.batches": 5}, {"train.lr": "fast"}, {"train.lr": -1.0}, {"no.such": 1}, {"train.mu": 2}):
        refusal = desk.ask(SetHyperparameters(bad, None))
        assert isinstance(refusal, Refused)
        assert refusal.fault == "hyperparameter"
    assert desk.journal.number == number
    assert desk.ask(SetHyperparameters({"train.lr": 5e-4}, 3)) == Accepted("in force from step 3 on")
    assert desk.journal.number == number + 1


@pytest.mark.parametrize("at_step", [None, 3])
def test_a_change_that_is_asked_for_again_is_journaled_once(tmp_path: Path, at_step: int | None) -> None:
    desk = leasing_desk(tmp_path)
    change = SetHyperparameters({"train.lr": 5e-4}, at_step)
    answer, number = desk.ask(change), desk.journal.number
    assert desk.ask(change) == answer
    assert desk.journal.number == number
    later = SetHyperparameters({"train.lr": 6e-4}, 9)
    assert desk.ask(later) == desk.ask(later) == Accepted("in force from step 9 on")
    assert desk.journal.number == number + 1
    desk.core.state.hyperparameters.advance(3, 0.0)  # the first has come into force before it was asked for again
    assert desk.ask(change) == Accepted("in force already")
    assert desk.journal.number == number + 1
    assert desk.core.state.hyperparameters.revision == 1


def test_a_message_that_the_bus_does_not_take_ends_the_term_by_name(tmp_path: Path) -> None:
    desk = Desk(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise WireFault("too_large", "at most 8 bytes in one message", "9 bytes", "send less")

    desk.bus.send = refuse  # type: ignore[method-assign]
    desk.bus.reply = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(MessageTooLarge, match=r"LoadState: expected at most 8 bytes.*bus.max_message_mb.*batch_size"):
        desk.register("policy-0")


def test_a_change_is_answered_only_when_it_is_durable(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("person", SetHyperparameters({"train.lr": 5e-4}, 3))
    assert desk.to("person") == []
    desk.turn()
    assert desk.log.index(("sync", "00000001.log")) < desk.log.index(("send", "Accepted"))


def test_stop_is_taken_once_however_often_it_is_asked(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.register("policy-0")
    desk.hear("policy-0", StateLoaded(Position(1, 0, 0)))
    desk.turn()
    assert isinstance(desk.ask(StopRun("enough")), Accepted)
    number = desk.journal.number
    assert isinstance(desk.ask(StopRun("enough")), Accepted)
    assert desk.journal.number == number
    assert desk.shell.ending is not None and desk.shell.ending.outcome == "stopped"


def test_status_tells_what_is_going_on_in_plain_values(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", Heartbeat("generating", 12))
    desk.hear("rollout-0", report(1, attempt=9), [PAYLOAD])
    answer = desk.ask(StatusRequest())
    assert isinstance(answer, Status)
    run = answer.run
    assert (run["run"], run["term"], run["stage"], run["lineage"], run["version"]) == ("test", 1, "train", 1, 0)
    replicas = {replica["name"]: replica for replica in run["replicas"]}  # type: ignore[attr-defined]
    assert replicas["rollout-0"]["state"] == "ready"
    assert replicas["rollout-0"]["doing"] == "generating"
    assert replicas["rollout-0"]["leases"] == 8
    assert replicas["policy-0"]["role"] == "policy"
    assert run["groups"] == {"leased": 8}
    assert run["refused"]["attempt"] == 1  # type: ignore[index]


def test_rendezvous_values_are_served_while_a_mesh_forms(tmp_path: Path) -> None:
    desk = forming_desk(tmp_path)
    number = desk.journal.number
    desk.hear("rollout-0", StoreGet(1, "k", 5.0))
    desk.hear("policy-0", StoreSet(1, "k", b"v"))
    assert desk.to("rollout-0")[-1] == desk.to("policy-0")[-1] == StoreValue(1, "k", b"v")
    desk.hear("rollout-0", StoreGet(1, "never", 2.0))
    for _ in range(3):
        desk.hear("policy-0", Heartbeat("waiting", 0))
        desk.hear("rollout-0", Heartbeat("waiting", 0))
        desk.pass_time(1.0)
    assert StoreValue(1, "never", None) in desk.to("rollout-0")
    assert desk.journal.number == number, "nothing of this is worth keeping"


def test_ranks_beside_rank_0_meet_through_the_same_epoch(tmp_path: Path) -> None:
    desk = forming_desk(tmp_path)
    desk.hear("policy-0", StoreSet(1, "id/1/k", b"v"), rank=1)
    desk.hear("policy-0", StoreGet(1, "id/1/k", 5.0), rank=1)
    assert desk.to("policy-0")[-2:] == [StoreValue(1, "id/1/k", b"v")] * 2
    number = desk.journal.number
    desk.hear("policy-0", MeshFormed(1), rank=1)
    desk.turn()
    assert isinstance(desk.to("policy-0")[-1], Refused), "what becomes of the mesh is rank 0's to say"
    assert desk.journal.number == number


def test_rendezvous_values_go_with_their_mesh(tmp_path: Path) -> None:
    desk = forming_desk(tmp_path)
    desk.hear("rollout-0", StoreGet(1, "k", 5.0))
    desk.hear("policy-0", MeshFailed(1, "no route"))
    desk.turn()
    answers = [message for message in desk.to("rollout-0") if isinstance(message, Refused | RevokeMesh)]
    assert {type(answer) for answer in answers} == {Refused, RevokeMesh}
    desk.hear("rollout-0", StoreSet(1, "k", b"late"))
    assert isinstance(desk.to("rollout-0")[-1], Refused)


def test_every_mesh_has_an_id_of_its_own(tmp_path: Path) -> None:
    desk = forming_desk(tmp_path)
    desk.hear("policy-0", MeshFailed(1, "no route"))
    desk.turn()
    for _ in range(3):
        desk.hear("policy-0", Heartbeat("waiting", 0))
        desk.hear("rollout-0", Heartbeat("waiting", 0))
        desk.pass_time(1.0)
    identities = [message.identity for message in desk.to("rollout-0") if isinstance(message, FormMesh)]
    assert [identity.epoch for identity in identities] == [1, 2]
    assert len({identity.unique_id for identity in identities}) == 2


# --- the next term ---------------------------------------------------------------------------------------------------


def test_a_new_term_over_the_same_disks_knows_everything_that_was_acknowledged(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.register("policy-0")
    desk.hear("policy-0", StateLoaded(Position(1, 0, 0)))
    desk.turn()
    state = desk.core.snapshot()
    again = Desk(tmp_path, before=desk)
    assert again.core.state.term == 2
    assert again.state_of("policy-0") == "ready"
    replayed = Core(desk.recipe)
    for record in list(Journal(desk.journal_disk.after_crash(), BIG).replay()):
        replayed.step(record.event)
    assert replayed.snapshot() == state


def test_what_was_not_synced_is_unknown_to_the_next_term_and_was_not_acknowledged(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.register("policy-0")
    desk.hear("policy-0", StateLoaded(Position(1, 0, 0)))
    assert desk.bus.acknowledged == []
    again = Desk(tmp_path, before=desk)
    assert again.state_of("policy-0") == "loading"
    again.register("policy-0")
    assert [type(message) for message in again.to("policy-0")] == [Registered, LoadState]


def test_snapshots_bound_the_replay(tmp_path: Path) -> None:
    desk = Desk(tmp_path, recipe(journal={"snapshot_every": 3}))
    for nonce in range(1, 9):
        desk.register("rollout-0", nonce)
    assert desk.journal.since_snapshot() < 3
    again = Desk(tmp_path, recipe(journal={"snapshot_every": 3}), before=desk)
    assert again.core.state.fleet.replicas["rollout-0"].incarnation == 8


def test_another_recipe_than_the_one_that_ran_is_refused_by_name(tmp_path: Path) -> None:
    desk = leasing_replayable(tmp_path)
    with pytest.raises(DriftedJournal, match=r"replaying \w+ at .* gives .*resume with the recipe in config.toml"):
        Desk(tmp_path, recipe(train={"batch_size": 2}), before=desk)


def leasing_replayable(folder: Path) -> Desk:
    """A desk that leased worked answers: facts that hang on the recipe."""
    desk = Desk(folder, recipe(sft={"dataset": "train", "batches": 9, "batch_size": 4, "lr": 1e-3}))
    desk.register("policy-0")
    desk.hear("policy-0", StateLoaded(Position(1, 0, 0)))
    desk.turn()
    assert any(isinstance(message, Lease) for message in desk.to("policy-0"))
    return desk


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 100, 300, 1000, 3000])
@pytest.mark.parametrize("which", ["journal", "spool"])
def test_a_full_disk_ends_the_term_and_loses_nothing_that_was_acknowledged(
    tmp_path: Path, which: str, room: int
) -> None:
    desk = Desk(tmp_path, recipe(sft={"dataset": "train", "batches": 9, "batch_size": 4, "lr": 1e-3}))
    desk.register("policy-0")
    desk.hear("policy-0", StateLoaded(Position(1, 0, 0)))
    desk.turn()
    getattr(desk, f"{which}_disk").room = room
    try:
        for group in range(1, 200):
            worked = structs.replace(report(group), rewards=[0.0], lengths=[17], truncated=[False])
            if group <= 8:
                desk.hear("policy-0", worked, [PAYLOAD])
            else:  # something else fills it up
                desk.register("rollout-0", group)
                desk.spool_disk.append("filler", b"x" * 40)
            desk.turn()
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("the disk never ran full")
    acknowledged = max((sequence for peer, sequence, _ in desk.bus.acknowledged if peer == b"policy-0"), default=0)
    again = Desk(tmp_path, desk.recipe, before=desk)
    places = [group.spooled for group in again.core.state.ledger.groups.values() if group.spooled is not None]
    assert len(places) >= acknowledged - 1, "the first message was no report"
    spool = Spool(desk.spool_disk.after_crash(), BIG)
    assert all([bytes(frame) for frame in spool.read(place)] == [PAYLOAD] for place in places)


def test_gone_is_on_record_before_anyone_is_told(tmp_path: Path) -> None:
    desk = leasing_desk(tmp_path)
    desk.hear("rollout-0", Goodbye("done"))
    desk.turn()
    records = list(Journal(desk.journal_disk.after_crash(), BIG).replay())
    assert any(isinstance(fact, Gone) for record in records for fact in record.facts)
    assert b"rollout-0" not in desk.bus.open


class ScriptedMinter:
    """Mints when the test says so; notes what is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.forgotten: list[int] = []
        self.words: list[Minted | MintFailed] = []

    def mint(self, epoch: int, count: int) -> None:
        self.asked.append((epoch, count))

    def poll(self) -> list[Minted | MintFailed]:
        words, self.words = self.words, []
        return words

    def forget(self, epoch: int) -> None:
        self.forgotten.append(epoch)

    def close(self) -> None:
        pass


def minting_desk(folder: Path) -> tuple[Desk, ScriptedMinter]:
    """Two that have registered with GPUs; the id of their first mesh is asked for, and not there yet."""
    minter = ScriptedMinter()
    desk = Desk(folder, recipe(weights={"backend": "nccl"}), minter=minter)
    for name in ("rollout-0", "policy-0"):
        desk.register(name, device=Device(name, "2.32.3"))
        desk.hear(name, StateLoaded(FIRST if name == "policy-0" else None))
    desk.turn()
    assert minter.asked == [(1, 1)]
    assert not any(isinstance(message, FormMesh) for message in desk.to("policy-0"))
    return desk, minter


def test_members_of_an_nccl_mesh_are_told_when_its_id_has_been_minted(tmp_path: Path) -> None:
    desk, minter = minting_desk(tmp_path)
    minter.words = [Minted(1, "2.32.3", [b"the id"])]
    desk.pass_time(0.1)
    orders = [message for message in desk.to("policy-0") if isinstance(message, FormMesh)]
    assert [order.identity.unique_id for order in orders] == [b"the id"]
    assert minter.forgotten == []
    for name in ("rollout-0", "policy-0"):
        desk.hear(name, MeshFormed(1))
    desk.turn()
    assert minter.forgotten == [1], "nobody needs the minter any more"
    desk.hear("policy-0", MeshFailed(1, "broke in use"))
    desk.turn()
    assert minter.forgotten == [1], "once"


def test_a_mint_of_another_version_than_the_members_have_ends_the_attempt_with_both_named(tmp_path: Path) -> None:
    desk, minter = minting_desk(tmp_path)
    minter.words = [Minted(1, "2.30.7", [b"the id"])]
    desk.pass_time(0.1)
    causes = [message.cause for message in desk.to("policy-0") if isinstance(message, RevokeMesh)]
    assert len(causes) == 1
    assert "its members have NCCL 2.32.3, the controller has 2.30.7" in causes[0]
    assert minter.forgotten == [1]


def test_a_mint_that_failed_is_tried_again_under_a_new_epoch(tmp_path: Path) -> None:
    desk, minter = minting_desk(tmp_path)
    minter.words = [MintFailed(1, "no library")]
    for _ in range(3):
        for name in ("rollout-0", "policy-0"):
            desk.hear(name, Heartbeat("waiting", 0))
        desk.pass_time(1.0)
    assert minter.asked == [(1, 1), (2, 1)]
    assert minter.forgotten == [1]
