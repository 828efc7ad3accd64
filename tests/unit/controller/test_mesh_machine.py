"""Meshes under any order of words: an epoch is used once, and a word about an old one has no effect.

Hypothesis drives the core with everything that can happen to a mesh, late and repeated words included; a model of its
own says after each event which meshes live, who was told what, and how long the next attempt waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.controller.core.core import Core
from services.controller.core.events import (
    AnyEvent,
    DeadlinePassed,
    MeshIdMinted,
    MessageReceived,
    ReplicaLost,
    ReplicaMessage,
    ReplicaRegistered,
    RunBegan,
    TermBegan,
)
from services.controller.core.meshes import RETRY_MOST_S, RETRY_S, REVOKED_KEPT
from services.controller.core.outcome import Effect, ForgetMesh, Send
from shared.messages import FormMesh, Goodbye, MeshFailed, MeshFormed, MeshMember, Refused, Register, RevokeMesh
from tests.unit.controller.world import DATASETS, recipe

NAMES = ("policy-0", "rollout-0", "rollout-1")
MESH_S = 20.0
FOREVER = 1e6
names = st.sampled_from(NAMES)
purposes = st.sampled_from(("gradients", "weights"))
ago = st.sampled_from((0, 0, 0, 1, 2, 5))
"""How many epochs, or incarnations, before the newest one a word is about."""


@dataclass
class Process:
    """The newest process of a name, as the model knows it."""

    nonce: int
    incarnation: int
    live: bool = True
    confirmed: bool = True


@dataclass
class Attempt:
    """One epoch, as the model knows it."""

    purpose: str
    members: list[tuple[str, int]]
    deadline: float
    state: str = "minting"
    unique_id: bytes = b""
    formed: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.members]

    @property
    def kind(self) -> str:
        return self.names[-1] if self.purpose == "weights" else self.purpose


class MeshMachine(RuleBasedStateMachine):
    """No policy ever loads its state, so that the core begins no mesh by itself."""

    def __init__(self) -> None:
        super().__init__()
        waits = {"mesh_s": MESH_S, "load_s": FOREVER, "rejoin_s": FOREVER, "stall_s": FOREVER}
        self.core = Core(recipe(timeouts=waits))
        self.now, self.term, self.nonces, self.ids = 1000.0, 1, 0, 0
        self.processes: dict[str, Process] = {}
        self.epochs: dict[int, Attempt] = {}
        self.revoked: list[int] = []
        self.told: set[tuple[str, int]] = set()
        self.failures: dict[str, int] = {}
        self.not_before: dict[str, float] = {}
        self.core.step(RunBegan(at=self.now, run="r", recipe=""))
        self.core.step(TermBegan(at=self.now, term=1))
        for name in NAMES:
            self.a_new_process_takes_a_name(name)

    # -- the model ---

    def living(self) -> dict[int, Attempt]:
        return {epoch: mesh for epoch, mesh in self.epochs.items() if mesh.state != "revoked"}

    def current(self, name: str, incarnation: int) -> bool:
        process = self.processes.get(name)
        return process is not None and process.live and process.incarnation == incarnation

    def end(self, epoch: int, *, failed: bool) -> None:
        mesh = self.epochs[epoch]
        mesh.state = "revoked"
        self.revoked.append(epoch)
        if failed:
            before = self.failures.get(mesh.kind, 0)
            self.not_before[mesh.kind] = self.now + min(RETRY_S * 2**before, RETRY_MOST_S)
            self.failures[mesh.kind] = before + 1

    def part(self, name: str) -> list[int]:
        """The incarnation of a name is gone; the epochs that end with it."""
        self.processes[name].live = False
        ended = [epoch for epoch, mesh in self.living().items() if name in mesh.names]
        for epoch in ended:
            self.end(epoch, failed=False)
        self.failures.pop(name, None)
        self.not_before.pop(name, None)
        return ended

    def stand(self, epoch: int, name: str) -> None:
        """A member says that it stands."""
        mesh = self.epochs[epoch]
        mesh.formed.add(name)
        if mesh.formed == set(mesh.names):
            mesh.state = "formed"
            self.failures[mesh.kind] = 0

    def remembered(self, name: str) -> list[int]:
        return [epoch for epoch in self.revoked[-REVOKED_KEPT:] if name in self.epochs[epoch].names]

    # -- driving and comparing ---

    def step(self, event: AnyEvent) -> list[Effect]:
        return self.core.step(event).effects

    def check(self, effects: list[Effect], ended: list[int], again: dict[str, list[int]] | None = None) -> None:
        """Who was told to form is a member of a mesh that is forming; who was told to leave, of one that just ended.

        `again`: epochs that ended earlier and that a returning process is reminded of.
        """
        left = []
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, FormMesh):
                identity = effect.message.identity
                mesh = self.epochs[identity.epoch]
                assert mesh.state == "forming", f"epoch {identity.epoch} is {mesh.state}"
                assert identity.unique_id == mesh.unique_id
                assert [(member.replica, member.incarnation) for member in identity.members] == mesh.members
                assert (effect.replica, self.processes[effect.replica].incarnation) in mesh.members
                assert (effect.replica, identity.epoch) not in self.told, "told twice in one session"
                self.told.add((effect.replica, identity.epoch))
            elif isinstance(effect, Send) and isinstance(effect.message, RevokeMesh):
                left.append((effect.replica, effect.message.epoch))
        expected = [(name, epoch) for epoch in ended for name, i in self.epochs[epoch].members if self.current(name, i)]
        expected += [(name, epoch) for name, epochs in (again or {}).items() for epoch in epochs]
        assert sorted(left) == sorted(expected)
        assert sorted(e.epoch for e in effects if isinstance(e, ForgetMesh)) == sorted(ended)

    def say(self, name: str, incarnation: int, message: ReplicaMessage) -> tuple[str, list[Effect]]:
        """A word arrives as through the shell: judged first, taken only when it is fresh."""
        before = self.core.snapshot()
        verdict = self.core.judge(name, incarnation, message)
        assert self.core.snapshot() == before, "judging changes nothing"
        if verdict != "fresh":
            return (verdict.fault if isinstance(verdict, Refused) else verdict), []
        event = MessageReceived(at=self.now, replica=name, incarnation=incarnation, rank=0, body=message, spooled=None)
        return "fresh", self.step(event)

    def registered(self, name: str, ended: list[int], reminded: list[int]) -> None:
        process = self.processes[name]
        register = Register(
            role="policy" if name.startswith("policy") else "rollout",
            replica=name,
            rank=0,
            world=1,
            nonce=process.nonce,
            pid=process.nonce,
            host="here",
            holds=None,
            leases=[],
            datasets=list(DATASETS),
        )
        assert self.core.judge_registration(register) is None
        self.told = {(who, epoch) for who, epoch in self.told if who != name}
        self.check(self.step(ReplicaRegistered(at=self.now, register=register)), ended, {name: reminded})
        assert self.core.state.fleet.replicas[name].incarnation == process.incarnation

    # -- what happens ---

    @rule(name=names)
    def a_new_process_takes_a_name(self, name: str) -> None:
        before = self.processes.get(name)
        ended = self.part(name) if before is not None and before.live else []
        self.nonces += 1
        self.processes[name] = Process(self.nonces, before.incarnation + 1 if before else 1)
        self.registered(name, ended, [])

    @rule(name=names)
    def a_process_opens_another_session(self, name: str) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        if not process.live:
            process.incarnation += 1
        process.live = process.confirmed = True
        self.registered(name, [], self.remembered(name))

    @rule(name=names, back=ago, leaves=st.booleans())
    def a_replica_is_gone(self, name: str, back: int, leaves: bool) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        incarnation = process.incarnation - back
        known = self.current(name, incarnation)
        ended = self.part(name) if known else []
        if leaves:
            assert known == (self.core.judge(name, incarnation, Goodbye("enough")) == "fresh")
            self.check(self.say(name, incarnation, Goodbye("enough"))[1], ended)
        else:
            self.check(self.step(ReplicaLost(at=self.now, replica=name, incarnation=incarnation, cause="")), ended)

    @precondition(lambda self: any(process.live for process in self.processes.values()))
    @rule(purpose=purposes, all_of_them=st.booleans(), data=st.data())
    def a_mesh_is_begun(self, purpose: str, all_of_them: bool, data: st.DataObject) -> None:
        live = [name for name, process in sorted(self.processes.items()) if process.live]
        chosen = live if all_of_them else data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
        members = [(name, self.processes[name].incarnation) for name in chosen]
        until = self.now + MESH_S
        arguments: Any = (purpose, "gloo", [MeshMember(*member, 0) for member in members], until)
        mesh = self.core.state.meshes.begin(*arguments)
        assert mesh.epoch not in self.epochs, "an epoch is used once"
        assert mesh.epoch > max(self.epochs, default=0)
        self.epochs[mesh.epoch] = Attempt(purpose, members, until)

    @precondition(lambda self: any(process.live for process in self.processes.values()))
    @rule(purpose=purposes, missing=st.integers(0, 2), data=st.data())
    def a_mesh_of_all_that_live_stands_or_nearly(self, purpose: str, missing: int, data: st.DataObject) -> None:
        self.a_mesh_is_begun(purpose, True, data)
        self.an_id_is_minted(0)
        epoch = max(self.epochs)
        for name in self.epochs[epoch].names[missing:]:
            self.a_replica_says_that_it_stands(name, 0, 0)

    @precondition(lambda self: any(process.live for process in self.processes.values()))
    @rule(purpose=purposes, times=st.integers(1, 10), data=st.data())
    def meshes_fail_in_a_row(self, purpose: str, times: int, data: st.DataObject) -> None:
        for _ in range(times):
            self.a_mesh_is_begun(purpose, True, data)
            self.a_replica_reports_an_error(self.epochs[max(self.epochs)].names[0], 0, 0)

    @rule(back=ago)
    def an_id_is_minted(self, back: int) -> None:
        epoch = max(self.epochs, default=0) - back
        self.ids += 1
        unique_id = b"id %d" % self.ids
        mesh = self.epochs.get(epoch)
        if mesh is not None and mesh.state == "minting":
            mesh.state, mesh.unique_id, mesh.deadline = "forming", unique_id, self.now + MESH_S
        self.check(self.step(MeshIdMinted(at=self.now, epoch=epoch, unique_id=unique_id)), [])

    @precondition(lambda self: self.epochs)
    @rule(name=names, back_epoch=ago, back_incarnation=ago)
    def a_replica_says_that_it_stands(self, name: str, back_epoch: int, back_incarnation: int) -> None:
        process, epoch = self.processes.get(name), max(self.epochs) - back_epoch
        if process is None:
            return
        incarnation = process.incarnation - back_incarnation
        mesh = self.living().get(epoch)
        if not self.current(name, incarnation):
            expected = "incarnation" if process.live else "unknown_sender"
        elif mesh is None or name not in mesh.names:
            expected = "epoch"
        elif name in mesh.formed:
            expected = "duplicate"
        else:
            expected = "fresh"
            if mesh.state == "forming":
                self.stand(epoch, name)
        verdict, effects = self.say(name, incarnation, MeshFormed(epoch))
        assert verdict == expected
        self.check(effects, [])

    @precondition(lambda self: any(mesh.state == "forming" for mesh in self.epochs.values()))
    @rule(data=st.data())
    def a_member_stands_that_was_asked(self, data: st.DataObject) -> None:
        forming = [epoch for epoch, mesh in self.epochs.items() if mesh.state == "forming"]
        epoch = data.draw(st.sampled_from(forming))
        name = data.draw(st.sampled_from(sorted(set(self.epochs[epoch].names) - self.epochs[epoch].formed)))
        self.stand(epoch, name)
        verdict, effects = self.say(name, self.processes[name].incarnation, MeshFormed(epoch))
        assert verdict == "fresh"
        self.check(effects, [])

    @rule(name=st.sampled_from((*NAMES, "a stranger")), back=ago)
    def a_word_slips_past_the_judge_twice(self, name: str, back: int) -> None:
        epoch = max(self.epochs, default=0) - back
        mesh = self.living().get(epoch)
        if mesh is not None and mesh.state == "forming" and name in mesh.names and name not in mesh.formed:
            self.stand(epoch, name)
        for _ in range(2):
            self.core.state.meshes.member_formed(epoch, name)

    @precondition(lambda self: self.epochs)
    @rule(name=names, back_epoch=ago, back_incarnation=ago)
    def a_replica_reports_an_error(self, name: str, back_epoch: int, back_incarnation: int) -> None:
        process, epoch = self.processes.get(name), max(self.epochs) - back_epoch
        if process is None:
            return
        incarnation = process.incarnation - back_incarnation
        mesh = self.living().get(epoch)
        ended = []
        if not self.current(name, incarnation):
            expected = "incarnation" if process.live else "unknown_sender"
        elif mesh is None or name not in mesh.names:
            expected = "duplicate"
        else:
            expected, ended = "fresh", [epoch]
            self.end(epoch, failed=True)
        verdict, effects = self.say(name, incarnation, MeshFailed(epoch, "reset by peer"))
        assert verdict == expected
        self.check(effects, ended)

    @rule(seconds=st.sampled_from((0.5, 2.0, 8.0, MESH_S)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        waiting = {epoch: mesh for epoch, mesh in self.living().items() if mesh.state != "formed"}
        ended = [epoch for epoch, mesh in waiting.items() if mesh.deadline <= self.now]
        for epoch in ended:
            self.end(epoch, failed=True)
        self.check(self.step(DeadlinePassed(at=self.now)), ended)

    @rule()
    def a_new_term_begins(self) -> None:
        """Another process reads the snapshot; replicas have sessions again only once they register."""
        self.core = Core.restore(self.core.recipe, self.core.snapshot())
        self.term += 1
        self.told = set()
        for process in self.processes.values():
            process.confirmed = process.confirmed and not process.live
        ended = [epoch for epoch, mesh in self.living().items() if mesh.state != "formed"]
        for epoch in ended:
            self.end(epoch, failed=False)
        self.check(self.step(TermBegan(at=self.now, term=self.term)), ended)

    # -- what always holds ---

    @invariant()
    def live_meshes_are_those_that_nothing_ended(self) -> None:
        meshes = self.core.state.meshes
        assert {
            epoch: (m.purpose, m.kind, m.state, m.unique_id, m.deadline, sorted(m.formed))
            for epoch, m in meshes.meshes.items()
        } == {
            epoch: (m.purpose, m.kind, m.state, m.unique_id, m.deadline, sorted(m.formed))
            for epoch, m in self.living().items()
        }
        assert meshes.last_epoch == max(self.epochs, default=0)
        assert list(meshes.revoked) == self.revoked[-REVOKED_KEPT:]
        assert not set(meshes.revoked) & set(meshes.meshes), "nothing comes back from revoked"

    @invariant()
    def members_of_live_meshes_are_the_incarnations_that_live(self) -> None:
        for mesh in self.core.state.meshes.meshes.values():
            for member in mesh.members:
                assert self.core.state.fleet.is_current(member.replica, member.incarnation)

    @invariant()
    def whoever_has_a_session_and_does_not_stand_yet_was_told_to_form(self) -> None:
        for epoch, mesh in self.epochs.items():
            if mesh.state == "forming":
                missing = [name for name in mesh.names if name not in mesh.formed and self.processes[name].confirmed]
                assert all((name, epoch) in self.told for name in missing)

    @invariant()
    def meshes_are_found_by_their_members_and_by_their_ends(self) -> None:
        meshes = self.core.state.meshes
        for name in NAMES:
            mine = [epoch for epoch, mesh in self.living().items() if name in mesh.names]
            assert meshes.epochs_of(name) == mine
            for purpose in ("gradients", "weights"):
                for source in NAMES:
                    ends = (purpose, source, name)
                    kind = [e for e, m in self.living().items() if (m.purpose, m.names[0], m.names[-1]) == ends]
                    found = meshes.of(*ends)  # type: ignore[arg-type]
                    assert (found.epoch if found is not None else None) == max(kind, default=None)
        assert list(meshes.unformed) == [epoch for epoch, mesh in self.living().items() if mesh.state != "formed"]

    @invariant()
    def the_next_attempt_waits_as_long_as_the_failures_in_a_row_say(self) -> None:
        for kind in (*NAMES, "gradients"):
            until = self.not_before.get(kind, -math.inf)
            retry = self.core.state.meshes.retries.get(kind)
            assert (retry.failures if retry is not None else 0) == self.failures.get(kind, 0)
            for moment in (until - 0.1, until, self.now):
                assert self.core.state.meshes.may_begin(kind, moment) == (moment >= until)


MeshMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMeshes = MeshMachine.TestCase
