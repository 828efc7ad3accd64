"""Batches and steps under any order of votes, losses and words about old attempts.

Hypothesis drives the core with two policies that share each step; their meshes form, and a joiner receives its state,
at once. A model of its own knows the plan of every batch and says after each event what was committed, aborted,
consumed, discarded and rolled back, and who was asked for what.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
    Spooled,
    TermBegan,
)
from services.controller.core.outcome import (
    Aborted,
    AnyFact,
    Committed,
    Consumed,
    Discarded,
    Effect,
    MintMeshId,
    RolledBack,
    Send,
)
from services.controller.core.rules.training import NONFINITE_LIMIT
from shared.messages import (
    AbortStep,
    AnyMessage,
    ArrayHeader,
    CommitStep,
    FormMesh,
    GradientsReady,
    GroupReport,
    LoadState,
    MeshFormed,
    Position,
    ReceiveState,
    Refused,
    Register,
    Sampling,
    SendState,
    StateLoaded,
    StateReceived,
    StateSent,
    StepApplied,
    TrainStep,
)
from tests.unit.controller.world import DATASETS, recipe

POLICIES = ("policy-0", "policy-1")
BATCH_SIZE = 4
BOUND = 64
"""The versions of a machine run never get so far, so that no group is ever stale."""
FAR_ENOUGH = 20
"""From this version on, only rules that train at most one step go on; there are 40 of them at most."""
FOREVER = 1e6
policies = st.sampled_from(POLICIES)
ago = st.sampled_from((0, 0, 0, 0, 1, 2))
"""How many attempts, steps or incarnations before the newest one a word is about."""


@dataclass
class Policy:
    """The newest process of a policy, as the model knows it. `position` is None while it loads, or waits to join."""

    incarnation: int = 0
    live: bool = False
    position: Position | None = None
    joins: bool = False


@dataclass
class Plan:
    """A batch: the groups of each step in turn, and how many of these steps have committed."""

    parts: list[list[int]]
    done: int = 0

    @property
    def groups(self) -> list[int]:
        return sorted({group for part in self.parts for group in part})


@dataclass
class Attempt:
    """An attempt at a step: its members, their votes, and who of them has applied it since the commit."""

    number: int
    members: set[str]
    votes: set[str] = field(default_factory=set)
    committed: bool = False
    applied: set[str] = field(default_factory=set)


def at_once(message: AnyMessage) -> ReplicaMessage | None:
    """What a member answers without delay, whatever else it does."""
    match message:
        case FormMesh(identity=identity):
            return MeshFormed(identity.epoch)
        case SendState(epoch=epoch, position=position):
            return StateSent(epoch, position, "same", 1, 0.0)
        case ReceiveState(epoch=epoch, position=position):
            return StateReceived(epoch, position, "same", 0.0)
    return None


class StepMachine(RuleBasedStateMachine):
    """Groups come reported; no rollout is there, no evaluation, and no checkpoint is due."""

    @initialize(mu=st.sampled_from((2, 2, 1)), minibatches=st.sampled_from((2, 1, 4)))
    def begin(self, mu: int, minibatches: int) -> None:
        self.mu, self.minibatches = mu, minibatches
        train = {
            "batches": 1000, "batch_size": BATCH_SIZE, "max_staleness": BOUND, "mu": mu, "minibatches": minibatches
        }  # fmt: skip
        waits = {"load_s": FOREVER, "step_s": FOREVER, "stall_s": FOREVER}
        self.core = Core(recipe(train=train, timeouts=waits, checkpoint={"every": 100_000}))
        self.nonces = 0
        self.waiting: list[int] = []
        self.pending: list[Plan] = []
        self.trained: list[Plan] = []
        self.batch: Plan | None = None
        self.step_in_hand: Attempt | None = None
        self.position = Position(1, 0, 0)
        self.attempts, self.nonfinite = 0, 0
        self.policies = {name: Policy() for name in POLICIES}
        self.facts: list[object] = []
        self.orders: list[tuple[str, str, int]] = []
        self.core.step(RunBegan(at=0.0, run="r", recipe=""))
        self.core.step(TermBegan(at=0.0, term=1))
        for name in POLICIES:
            self.a_policy_joins(name, False)

    # -- the model ---

    def rest(self) -> None:
        """Everything that follows by itself."""
        while self._close() or self._roll_back() or self._commit() or self._take_batch() or self._assign():
            pass

    def _close(self) -> bool:
        step = self.step_in_hand
        if step is None or not step.committed or step.applied < step.members:
            return False
        self.step_in_hand = None
        return True

    def _roll_back(self) -> bool:
        loading = [policy for policy in self.policies.values() if policy.live and policy.position is None]
        settled = Position(self.position.lineage, 0, 0)
        holders = [policy for policy in self.policies.values() if policy.live and policy.position == self.position]
        step = self.step_in_hand
        if not loading or self.position == settled or holders or (step is not None and step.committed and step.members):
            return False
        self.facts.append(("rolled back", self.position.lineage + 1))
        self.pending = [*self.trained, *([self.batch] if self.batch is not None else []), *self.pending]
        self.trained, self.batch, self.step_in_hand = [], None, None
        for plan in self.pending:
            plan.done = 0
        self.position = Position(self.position.lineage + 1, 0, 0)
        for policy in self.policies.values():
            policy.joins = False  # it is told to load what is settled
        return True

    def _commit(self) -> bool:
        step, batch, now = self.step_in_hand, self.batch, self.position
        if step is None or batch is None or step.committed or step.votes != step.members:
            return False
        step.committed, self.nonfinite = True, 0
        self.facts.append(("committed", now.step, step.number, now.version))
        self.orders += [("commit", name, step.number) for name in step.members]
        for name, policy in self.policies.items():
            if policy.live and policy.position is not None and name not in step.members:
                policy.position, policy.joins = None, True  # it came too late for this step
        batch.done += 1
        self.position = Position(now.lineage, now.version, now.step + 1)
        self._end_batch_if_over()
        return True

    def _end_batch_if_over(self) -> None:
        batch, now = self.batch, self.position
        if batch is not None and batch.done == len(batch.parts):
            self.facts.append(("consumed", now.version, tuple(batch.groups)))
            self.trained.append(batch)
            self.batch, self.position = None, Position(now.lineage, now.version + 1, now.step)

    def _take_batch(self) -> bool:
        if self.batch is not None or self.step_in_hand is not None:
            return False
        if self.pending:
            self.batch = self.pending.pop(0)
            return True
        if len(self.waiting) < BATCH_SIZE:
            return False
        groups, self.waiting = self.waiting[:BATCH_SIZE], self.waiting[BATCH_SIZE:]
        size = BATCH_SIZE // self.minibatches
        parts = [groups[start : start + size] for start in range(0, BATCH_SIZE, size)]
        self.batch = Plan([list(part) for _ in range(self.mu) for part in parts])
        return True

    def _assign(self) -> bool:
        if self.batch is None or self.step_in_hand is not None:
            return False
        members = {name for name, policy in self.policies.items() if policy.live and policy.position == self.position}
        if not members:
            return False
        if self.batch.done == 0:
            for name, policy in self.policies.items():
                if policy.live and policy.joins:
                    members.add(name)
                    policy.position, policy.joins = self.position, False
        self.attempts += 1
        self.step_in_hand = Attempt(self.attempts, members)
        self.orders += [("train", name, self.attempts) for name in members]
        return True

    def abort(self) -> None:
        """The attempt ends before its commit."""
        step = self.step_in_hand
        assert step is not None
        self.facts.append(("aborted", self.position.step, step.number))
        self.orders += [("abort", name, step.number) for name in step.members if self.policies[name].live]
        self.step_in_hand = None

    def strike(self) -> None:
        """The groups of the step in hand leave the steps to come; who was in no committed step is discarded."""
        batch = self.batch
        assert batch is not None
        bad = batch.parts[batch.done]
        before = batch.parts[: batch.done]
        self.facts += [("discarded", group) for group in bad if not any(group in part for part in before)]
        rest = [[group for group in part if group not in bad] for part in batch.parts[batch.done :]]
        batch.parts = [*before, *(part for part in rest if part)]
        if not batch.parts:
            self.batch = None
        elif batch.done == len(batch.parts):
            held = self.position
            self._end_batch_if_over()
            for policy in self.policies.values():
                if policy.live and policy.position == held:
                    policy.position = self.position

    def part(self, name: str) -> None:
        """The incarnation of a policy is gone."""
        self.policies[name].live = self.policies[name].joins = False
        self.policies[name].position = None
        step = self.step_in_hand
        if step is None or name not in step.members:
            return
        if step.committed:
            step.members.discard(name)
            step.applied.discard(name)
        else:
            self.abort()

    # -- driving and comparing ---

    def step(self, event: AnyEvent) -> list[Effect]:
        """Step the core and the model; the same must have happened, and the same been asked for."""
        self.rest()
        facts, effects = self._happen(event)
        found: list[object] = []
        for fact in facts:
            match fact:
                case Committed():
                    found.append(("committed", fact.step, fact.attempt, fact.version))
                case Aborted():
                    found.append(("aborted", fact.step, fact.attempt))
                case Consumed():
                    found.append(("consumed", fact.version, tuple(sorted(fact.groups))))
                case Discarded():
                    found.append(("discarded", fact.group))
                case RolledBack():
                    found.append(("rolled back", fact.lineage))
        assert found == self.facts
        self._check_orders([e for e in effects if isinstance(e, Send)])
        self.facts = []
        self.orders = []
        return effects

    def _happen(self, event: AnyEvent) -> tuple[list[AnyFact], list[Effect]]:
        """The event, and all that members do at once: form their meshes, send and receive a state."""
        facts: list[AnyFact] = []
        effects: list[Effect] = []
        events = deque([event])
        while events:
            outcome = self.core.step(events.popleft())
            facts += outcome.facts
            effects += outcome.effects
            for effect in outcome.effects:
                if isinstance(effect, MintMeshId):
                    events.append(MeshIdMinted(at=0.0, epoch=effect.epoch, unique_id=b"id"))
                elif isinstance(effect, Send):
                    answer = at_once(effect.message)
                    name = effect.replica
                    if answer is not None and self.judged(name, self.policies[name].incarnation, answer) == "fresh":
                        events.append(self._word(name, self.policies[name].incarnation, answer))
        return facts, effects

    @staticmethod
    def _word(name: str, incarnation: int, message: ReplicaMessage) -> MessageReceived:
        return MessageReceived(at=0.0, replica=name, incarnation=incarnation, rank=0, body=message, spooled=None)

    def _check_orders(self, sends: list[Send]) -> None:
        found = []
        assigned: list[int] = []
        for send in sends:
            message = send.message
            if isinstance(message, CommitStep):
                found.append(("commit", send.replica, message.attempt))
                assert message.step == self.position.step - 1
            elif isinstance(message, AbortStep):
                found.append(("abort", send.replica, message.attempt))
            elif isinstance(message, TrainStep):
                found.append(("train", send.replica, message.attempt))
                assert self.batch is not None
                assert message.position == self.position
                assert (message.step, message.index) == (self.position.step, self.batch.done)
                assert message.steps_in_batch == len(self.batch.parts)
                assigned += [group.group for group in message.groups]
                assert message.sequences == 2 * len(self.batch.parts[self.batch.done])
        assert sorted(found) == sorted(self.orders)
        if assigned:
            assert self.batch is not None
            assert sorted(assigned) == sorted(self.batch.parts[self.batch.done]), "each group in one share"

    def say(self, name: str, incarnation: int, message: ReplicaMessage) -> None:
        """A word that is fresh arrives."""
        self.step(self._word(name, incarnation, message))

    def judged(self, name: str, incarnation: int, message: ReplicaMessage) -> str:
        before = self.core.snapshot()
        verdict = self.core.judge(name, incarnation, message)
        assert self.core.snapshot() == before, "judging changes nothing"
        return verdict.fault if isinstance(verdict, Refused) else verdict

    def stale(self, name: str, incarnation: int) -> str | None:
        """Why the sender is refused before its word is looked at."""
        policy = self.policies[name]
        if policy.live and incarnation == policy.incarnation:
            return None
        return "incarnation" if policy.live else "unknown_sender"

    # -- what happens ---

    @rule(name=policies, survives=st.sampled_from((True, True, True, False)))
    def a_policy_joins(self, name: str, survives: bool) -> None:
        """A new process, or one that the controller had lost and that proves to hold the committed state."""
        policy = self.policies[name]
        if policy.live:
            return
        policy.incarnation, policy.live = policy.incarnation + 1, True
        holds = self.position if survives else None
        if survives and self.position.step > 0:
            policy.position = self.position
        self.nonces += 1
        register = Register("policy", name, 0, 1, self.nonces, self.nonces, "here", holds, [], list(DATASETS))
        effects = self.step(ReplicaRegistered(at=0.0, register=register))
        self.load(effects)

    def load(self, effects: list[Effect]) -> None:
        """Whoever is told to load does so at once."""
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, LoadState):
                name, position = effect.replica, effect.message.position
                incarnation = self.policies[name].incarnation
                if effect.message.source == "peer":
                    if self.judged(name, incarnation, StateLoaded(None)) == "fresh":
                        self.policies[name].joins = True
                        self.say(name, incarnation, StateLoaded(None))
                    continue
                assert position == Position(self.position.lineage, 0, 0)
                assert self.judged(name, incarnation, StateLoaded(position)) == "fresh"
                self.policies[name].position = position
                self.say(name, incarnation, StateLoaded(position))

    @rule(name=policies, back=ago)
    def a_policy_is_lost(self, name: str, back: int) -> None:
        policy = self.policies[name]
        incarnation = policy.incarnation - back
        if self.stale(name, incarnation) is None:
            self.part(name)
        self.load(self.step(ReplicaLost(at=0.0, replica=name, incarnation=incarnation, cause="silent")))

    @rule(count=st.integers(1, 2 * BATCH_SIZE))
    def groups_are_reported(self, count: int) -> None:
        ledger, lineage = self.core.state.ledger, self.position.lineage
        for _ in range(count):
            group = ledger.draw(lineage, "train", DATASETS[0], 0, ledger.next_id, 2, Sampling(1.0, 1.0, 0, 16), 0)
            ledger.lease(group, "rollout-0", 1, 0, 0.0, 1.0)
            report = GroupReport(
                group.id, 1, lineage, [0.0, 1.0], {}, 3, [2, 2], [False, False], 0, 0, 0.1,
                [ArrayHeader("tokens", "int32", [4])],
            )  # fmt: skip
            ledger.report(group, report, Spooled(group.id, 0, [8], 1))
            self.waiting.append(group.id)
        self.step(DeadlinePassed(at=0.0))

    @rule(name=policies, back_attempt=ago, back_incarnation=ago, finite=st.sampled_from((True, True, True, False)))
    def a_policy_votes(self, name: str, back_attempt: int, back_incarnation: int, finite: bool) -> None:
        step, attempt = self.step_in_hand, self.attempts - back_attempt
        incarnation = self.policies[name].incarnation - back_incarnation
        finite = finite or self.nonfinite == NONFINITE_LIMIT - 1  # one more in a row ends the run
        vote = GradientsReady(self.position.step, attempt, self.position.lineage, finite, {"loss": 1.0})
        refused = self.stale(name, incarnation)
        if refused is None and (step is None or step.number != attempt or name not in step.members):
            refused = "attempt"
        if refused is not None:
            assert self.judged(name, incarnation, vote) == refused
            return
        assert step is not None
        if step.committed or name in step.votes:
            assert self.judged(name, incarnation, vote) == "duplicate"
            return
        assert self.judged(name, incarnation, vote) == "fresh"
        if finite:
            step.votes.add(name)
        else:
            self.abort()
            self.strike()
            self.nonfinite += 1
        self.say(name, incarnation, vote)

    @precondition(lambda self: self.step_in_hand is not None and not self.step_in_hand.committed)
    @rule()
    def every_member_votes_yes(self) -> None:
        step = self.step_in_hand
        assert step is not None
        for name in sorted(step.members - step.votes):
            self.a_policy_votes(name, 0, 0, True)

    @rule(name=policies, back_step=ago, back_incarnation=ago)
    def a_policy_has_applied(self, name: str, back_step: int, back_incarnation: int) -> None:
        step, now, policy = self.step_in_hand, self.position, self.policies[name]
        incarnation = policy.incarnation - back_incarnation
        position = Position(now.lineage, now.version, now.step - back_step)
        word = StepApplied(position.step - 1, position, {})
        expected = self.stale(name, incarnation)
        if expected is None:
            if policy.position == position:
                expected = "duplicate"
            elif step is None or not step.committed or name not in step.members:
                expected = "state"
            elif back_step:
                expected = "lineage"
            else:
                expected = "fresh"
        assert self.judged(name, incarnation, word) == expected
        if expected == "fresh":
            assert step is not None
            step.applied.add(name)
            policy.position = now
            self.say(name, incarnation, word)

    @precondition(lambda self: self.step_in_hand is not None and self.step_in_hand.committed)
    @rule()
    def every_member_applies(self) -> None:
        step = self.step_in_hand
        assert step is not None
        for name in sorted(step.members - step.applied):
            self.a_policy_has_applied(name, 0, 0)

    @rule(count=st.integers(1, 6))
    def steps_are_trained(self, count: int) -> None:
        """Votes and answers as they come when nothing goes wrong, so that the middle of a batch is often met."""
        for _ in range(count):
            if self.position.version >= FAR_ENOUGH:
                return
            if self.batch is None:
                self.groups_are_reported(BATCH_SIZE)
            if self.step_in_hand is not None and not self.step_in_hand.committed:
                self.every_member_votes_yes()
            if self.step_in_hand is not None and self.step_in_hand.committed:
                self.every_member_applies()

    @precondition(lambda self: self.step_in_hand is not None and not self.step_in_hand.committed)
    @rule()
    def a_member_votes_no(self) -> None:
        step = self.step_in_hand
        assert step is not None
        for name in sorted(step.members - step.votes)[:1]:
            self.a_policy_votes(name, 0, 0, False)

    @precondition(lambda self: self.step_in_hand is not None and not self.step_in_hand.committed)
    @rule(name=policies)
    def a_policy_is_lost_right_after_the_commit(self, name: str) -> None:
        self.every_member_votes_yes()
        self.a_policy_is_lost(name, 0)

    @rule()
    def every_policy_is_replaced(self) -> None:
        for name in POLICIES:
            self.a_policy_is_lost(name, 0)
        for name in POLICIES:
            self.a_policy_joins(name, False)

    @rule()
    def a_move_out_of_turn_is_refused_and_changes_nothing(self) -> None:
        steps, step = self.core.state.steps, self.step_in_hand
        before = self.core.snapshot()
        if step is None or step.committed:
            assert steps.abort() is None
            for move in (steps.commit, lambda: steps.vote(POLICIES[0], True, {})):
                with pytest.raises(ValueError, match="no step is being computed"):
                    move()
        if steps.step is not None:
            with pytest.raises(ValueError, match="one at a time"):
                steps.begin(steps.step)
            if not self.step_in_hand.committed:  # type: ignore[union-attr]
                steps.drop_member(POLICIES[0])
        assert self.core.snapshot() == before

    @rule()
    def another_process_reads_the_snapshot(self) -> None:
        self.core = Core.restore(self.core.recipe, self.core.snapshot())

    # -- what always holds ---

    @invariant()
    def the_core_holds_what_the_model_says(self) -> None:
        state = self.core.state
        batch, step = state.steps.batch, state.steps.step
        assert state.stages.outcome == ""
        assert state.lineages.committed == self.position
        assert (state.steps.attempt, state.steps.nonfinite) == (self.attempts, self.nonfinite)
        assert ((batch.plan, batch.index) if batch else None) == (
            (self.batch.parts, self.batch.done) if self.batch else None
        )
        assert [each.plan for each in state.steps.pending] == [plan.parts for plan in self.pending]
        assert [each.plan for each in state.steps.unsettled] == [plan.parts for plan in self.trained]
        model = self.step_in_hand
        assert (step is None) == (model is None)
        if step is not None and model is not None:
            assert (step.attempt, step.state == "committed") == (model.number, model.committed)
            assert (set(step.shares), set(step.votes), set(step.applied)) == (model.members, model.votes, model.applied)
        for name, policy in self.policies.items():
            known = state.fleet.replicas[name]
            assert (known.live, known.incarnation, known.position) == (policy.live, policy.incarnation, policy.position)

    @invariant()
    def every_group_is_in_one_place(self) -> None:
        ledger = self.core.state.ledger
        places = [group for plan in (*self.pending, *self.trained) for group in plan.groups]
        places += [*self.waiting, *(self.batch.groups if self.batch else [])]
        assert len(set(places)) == len(places)
        assert {group.id for group in ledger.having("reported")} == set(self.waiting)
        assert {group.id for group in ledger.having("consumed")} == {g for plan in self.trained for g in plan.groups}
        assert set(ledger.groups) == set(places)


StepMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSteps = StepMachine.TestCase
