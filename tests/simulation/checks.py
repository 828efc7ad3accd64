"""The rules, checked after every event. Whatever breaks one raises `Violation`.

Four sources are held against each other: the core's state, the facts that it journals (folded by the audit's own code),
what is durable, and what the model replicas really hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from services.controller.audit import Auditor
from services.controller.core.core import Core
from services.controller.core.events import AnyEvent, MessageReceived, ReplicaLost, ReplicaRegistered, TermBegan
from services.controller.core.ledger import SAMPLED
from services.controller.core.outcome import (
    AnyFact,
    Assigned,
    Committed,
    HandedOver,
    Joined,
    Judged,
    Leased,
    PartialDropped,
    Reported,
    Revised,
)
from services.controller.journal import Journal
from services.controller.spool import Spool
from shared.messages import AnyMessage, CommitStep, Envelope, Grant, Position, Registered, Role, TrainStep
from tests.simulation.payload import Sampled, Stretch
from tests.simulation.plan import Plan
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from tests.simulation.faults import Fault
    from tests.simulation.fleet import Fleet
    from tests.simulation.process import Rank

ROLES: tuple[Role, ...] = ("policy", "rollout", "evaluator")
MOST_EVENTS = 40_000
MOST_RECORDS_AT_ONCE = 600
_ENCODER = msgspec.msgpack.Encoder()
NOTICE_S = 3.0
"""Longer than it may take the controller to say so, it may not take it to notice that a rank is gone."""
REVOKE_S = 3.0
"""A member that is connected must have heard of a revoke after this."""


class Checks:
    """Everything that is known of the run, from outside."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.fleet: Fleet | None = None
        self.auditor = Auditor()
        self.terms: dict[int, None] = {}
        self.records = 0
        self.unwillingness = 0
        self._durable = 0
        self._committed: dict[tuple[int, int, int], int] = {}
        self._assigned: dict[int, int] = {}
        self._joined: dict[tuple[str, int], int] = {}
        self._processes: dict[tuple[str, int, int], int] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._incarnations: dict[tuple[str, int], int] = {}
        self._ended: dict[tuple[str, int, int], float] = {}
        self._by_step: dict[tuple[int, int], str] = {}
        self._by_version: dict[tuple[int, int], str] = {}
        self._held: dict[tuple[int, Position], str] = {}
        self._revoked: dict[int, float] = {}
        self._taken: dict[bytes, set[bytes]] = {}
        self._answers: dict[tuple[int, int], tuple[int, dict[int, str]]] = {}
        self._last_report: dict[int, int] = {}
        self._handed: dict[tuple[int, int], list[Stretch]] = {}
        self._partials: dict[int, int] = {}
        self._bound = plan.recipe.train.max_staleness if plan.recipe.train is not None else 0

    def broken(self, text: str) -> None:
        """A rule is broken."""
        raise Violation(f"at {self.world.now:.3f} s: {text}")

    # --- the controller -----------------------------------------------------------------------------------------------

    def opened(self, core: Core, journal: Journal, spool: Spool) -> None:
        """A new process has replayed the journal: what was durable must all be there, and its payloads too."""
        if journal.number < self._durable:
            self.broken(f"record {self._durable} was durable, but the journal ends with {journal.number}")
        self.auditor = Auditor()
        for number, body in journal._records():
            self.auditor.take(number, msgspec.msgpack.decode(body))
        self._check_audit()
        self._committed = {key: number for key, number in self._committed.items() if number <= journal.number}
        self._assigned = {key: number for key, number in self._assigned.items() if number <= journal.number}
        self._joined = {key: number for key, number in self._joined.items() if number <= journal.number}
        self._durable = self.records = journal.number
        for group in core.state.ledger.groups.values():
            for place in (group.spooled, group.partial_at):
                if place is not None:
                    spool.read(place)
        self._check_books(core)

    def stepped(self, core: Core, number: int, event: AnyEvent, facts: list[AnyFact]) -> None:
        """The core took an event."""
        self.records = number
        if number > MOST_EVENTS:
            self.broken(f"{number} records: the journal grows without end")
        told = {"type": "term_began", "term": event.term} if isinstance(event, TermBegan) else {"type": "other"}
        self.auditor.take(number, {"event": told, "facts": msgspec.to_builtins(facts)})
        if self.world.tracing:
            self._trace(event, facts)
        for fact in facts:
            if isinstance(fact, Committed):
                self._committed[fact.lineage, fact.step, fact.attempt] = number
                assert self.fleet is not None
                self.fleet.committed()
            elif isinstance(fact, Assigned):
                if self._assigned.setdefault(fact.attempt, number) != number:
                    self.broken(f"attempt {fact.attempt} at a step was assigned before, by another event")
            elif isinstance(fact, Leased):
                if not fact.begun:
                    self._partials.pop(fact.group, None)
                missing = core.state.fleet.replicas[fact.replica].missing
                if missing:
                    self.broken(f"group {fact.group} is leased to {fact.replica}, whose ranks {missing} are not there")
            elif isinstance(fact, Joined):
                self._joined[fact.replica, fact.incarnation] = number
            elif isinstance(fact, Revised):
                self._bound = max(self._bound, int(fact.changes.get("train.max_staleness", 0)))
            elif isinstance(fact, Reported):
                self._last_report[fact.group] = fact.attempt
                self._partials.pop(fact.group, None)
            elif isinstance(fact, HandedOver):
                self._partials[fact.group] = fact.attempt
            elif isinstance(fact, PartialDropped):
                self._partials.pop(
                    fact.group, None
                )  # a term that ended before its disk kept this may have said it, too
            elif isinstance(fact, Judged):
                self._check_judged(fact)
        self._check_audit()
        self._check_books(core)
        self._check_fleet(core)
        self._check_bounds(core)
        self._check_indices(core)
        self._check_rounds(core)
        self._check_edges(core)

    def rested(self, core: Core, now: float) -> None:
        """The controller has let everything out: somebody must be due to wake it."""
        state = core.state
        if state.stages.outcome:
            return
        deadline = core.next_deadline()
        timeouts = self.plan.recipe.timeouts
        longest = max(timeouts.stall_s, timeouts.load_s, timeouts.lease_s, timeouts.step_s, timeouts.checkpoint_s)
        if state.steering.paused and deadline == math.inf:
            return
        if not math.isfinite(deadline) or deadline > state.now + longest + 1.0:
            self.broken(f"the next deadline is {deadline - state.now:.1f} s away")
        self._check_meshes(core, now)
        self._check_ranks(core, now)

    def durable(self, number: int) -> None:
        """The journal is on the disk up to here."""
        self._durable = max(self._durable, number)

    def leaves(self, name: str, envelope: Envelope, durable: int) -> None:
        """A message leaves a controller: what it follows from must be durable."""
        match envelope.body:
            case CommitStep(step=step, attempt=attempt, lineage=lineage):
                number = self._committed.get((lineage, step, attempt))
                if number is None or number > durable:
                    self.broken(f"{name} sends a commit of step {step} attempt {attempt} that is not durable")
            case Registered():
                if envelope.term not in self.terms:
                    self.terms[envelope.term] = None
                if envelope.term < max(self.terms) and durable < 1:
                    self.broken(f"{name} welcomes in term {envelope.term} without a journal")

    def taken(self, peer: bytes, message: AnyMessage) -> None:
        """A controller has looked at a reliable message."""
        self._taken.setdefault(peer, set()).add(_ENCODER.encode(message))

    # --- the replicas -------------------------------------------------------------------------------------------------

    def welcomed(self, process: Rank, incarnation: int, term: int) -> None:
        """A rank got its incarnation: nobody else may ever have had it."""
        key = (process.replica, process.rank, incarnation)
        nonce = self._processes.setdefault(key, process.nonce)
        if nonce != process.nonce:
            self.broken(f"{process.name} is welcomed as incarnation {incarnation}, which process {nonce} had")
        start = self._starts.setdefault((process.replica, incarnation), process.nonce)
        if start != process.nonce:
            self.broken(f"{process.name} is welcomed as incarnation {incarnation}, that of start {start}")
        first = self._incarnations.setdefault((process.replica, process.nonce), incarnation)
        if process.ranks > 1 and first != incarnation:
            self.broken(f"{process.name} of {process.ranks} ranks was incarnation {first} and is now {incarnation}")
        number = self._joined.get((process.replica, incarnation))
        if number is None or number > self._durable:
            self.broken(f"{process.name} was welcomed as incarnation {incarnation}, which is not in the journal")

    def ended(self, process: Rank) -> None:
        """A process is gone, and the controller has to notice."""
        self._ended[process.replica, process.nonce, process.rank] = self.world.now

    def acknowledged(self, process: Rank, message: AnyMessage) -> None:
        """A rank will not say this again: a controller must have taken it."""
        if _ENCODER.encode(message) not in self._taken.get(process.link.peer, ()):
            self.broken(f"{process.name} was told that {message} had arrived, which no controller has taken")

    def holds_state(self, name: str, nonce: int, position: Position, chain: str) -> None:
        """A policy has this state: whoever had the same position had the same state."""
        known = self._by_step.setdefault((position.lineage, position.step), chain)
        if known != chain:
            self.broken(f"{name} holds {position} as {chain}, but it is {known}")
        self._held[nonce, position] = chain
        self._by_version.setdefault((position.lineage, position.version), chain)  # the first step that has it began it

    def loaded_weights(self, nonce: int, position: Position, chain: str) -> None:
        """A rollout's or evaluator's engine has these weights."""
        self._held[nonce, position] = chain

    def answered(self, grant: Grant, chains: dict[int, str]) -> None:
        """A held-out row was answered with these weights."""
        self._answers[grant.group, grant.attempt] = (grant.lineage, dict(chains))

    def handed_over(self, handed: Sampled) -> None:
        """A rollout leaves a group with these tokens."""
        self._handed[handed.group, handed.attempt] = handed.stretches

    def continued(self, name: str, grant: Grant, handed: Sampled) -> None:
        """A rollout is to go on from these tokens: they must be of this group, and what was handed over last."""
        assert grant.partial is not None
        known = self._handed.get((grant.group, handed.attempt))
        if handed.group != grant.group or handed.stretches != known or grant.partial.oldest != handed.oldest:
            self.broken(f"{name} is to go on with {grant} from {handed}, handed over was {known}")

    def assigned(self, name: str, step: TrainStep, sampled: list[Sampled]) -> None:
        """A policy was given a step: the payload must be of its groups, no staler than the bound, of true weights."""
        if [(s.group, s.attempt) for s in sampled] != [(g.group, g.attempt) for g in step.groups]:
            self.broken(f"{name}: step {step.step} names {step.groups}, the payload is of {sampled}")
        if step.stage != "train" or self.plan.recipe.train is None:
            return
        for each in sampled:
            staleness = step.position.version - each.oldest
            if staleness > self._bound:
                self.broken(f"{name}: group {each.group} is {staleness} versions stale in step {step.step}")
            for count, stretch in enumerate(each.stretches, 1):
                true = [self._by_version.get((ln, stretch.version)) for ln in range(1, step.position.lineage + 1)]
                if stretch.chain not in true:
                    self.broken(f"group {each.group} was sampled with {stretch}, true are {true}")
                last = count == len(each.stretches) or each.stretches[count].attempt != stretch.attempt
                handed = self._handed.get((each.group, stretch.attempt))
                if stretch.attempt != each.attempt and last and each.stretches[:count] != handed:
                    self.broken(f"group {each.group} is of {each.stretches}, but handed over was {handed}")

    def unwilling(self, name: str, cause: str) -> None:
        """A policy was given an order that it could not obey."""
        self.unwillingness += 1
        self.broken(f"{name} cannot obey: {cause}")

    def finished(self, core: Core, version: int) -> None:
        """The run is complete: everything that was to be trained is, and is on record."""
        audit = self.auditor.audit
        if audit.outcome != "complete" or not audit.clean:
            self.broken(f"the run ended, the audit says: {audit.lines()}")
        recipe, state = self.plan.recipe, core.state
        least = self.plan.batches
        if recipe.sft is not None and recipe.sft.stop is not None:
            least -= recipe.sft.batches
        if not least <= version <= self.plan.batches:
            self.broken(f"complete at version {version}, the recipe wants {least} to {self.plan.batches}")
        assert self.fleet is not None
        lines = self.fleet.outputs.lines
        missing = [(ln, step) for ln, book in audit.books.items() for step in book.steps if (ln, step) not in lines]
        if missing:
            self.broken(f"metrics.jsonl lacks (lineage, step) {missing}")
        for suite in recipe.evaluation.suites if recipe.evaluation is not None else ():
            if (state.lineage, version, suite) not in self.fleet.outputs.evaluations:
                self.broken(f"complete at version {version} of lineage {state.lineage}, not judged on suite {suite}")
        settled = state.lineages.settled
        chain = self.fleet.folder.load(state.lineages.path, settled)
        if chain is None or chain != self._by_step[settled.lineage, settled.step]:
            self.broken(f"the last checkpoint {state.lineages.path} holds {chain}, not {settled}")

    def last_chain(self, position: Position) -> str:
        """The state at a position."""
        return self._by_step[position.lineage, position.step]

    def comparable(self, schedule: Sequence[Fault]) -> bool:
        """Whether this run must end in the same state as one without faults."""
        changed = any(fault.kind in ("nan", "change", "revise", "evaluate") for fault in schedule)
        causes = {cause for book in self.auditor.audit.books.values() for cause in book.discarded.values()}
        return self.plan.recipe.run.deterministic and not changed and "attempts" not in causes

    def _trace(self, event: AnyEvent, facts: list[AnyFact]) -> None:
        match event:
            case MessageReceived(replica=who, body=body):
                told = f"{type(body).__name__} of {who}: " + _brief(body)
            case ReplicaRegistered(register=register):
                told = f"Register of {register.replica}/{register.rank}, holds {register.holds}"
            case ReplicaLost(replica=who, cause=cause):
                told = f"lost {who}: {cause}"
            case _:
                told = type(event).__name__
        self.world.say(f"  {self.records:5d} {told}")
        for fact in facts:
            self.world.say(f"          -> {type(fact).__name__}: {_brief(fact)}")

    # --- what must always hold ----------------------------------------------------------------------------------------

    def _check_audit(self) -> None:
        if not self.auditor.audit.clean:
            self.broken(f"audit: {self.auditor.audit.faults[0]}")

    def _check_books(self, core: Core) -> None:
        """The ledger's own books and the audit's, from facts alone, say the same; only the lineage in force is open."""
        ledger, lineage = core.state.ledger, core.state.lineage
        open_now = sum(group.state != "consumed" for group in ledger.groups.values())
        for number, book in ledger.books.items():
            expected = open_now if number == lineage else 0
            if book.issued != book.consumed + sum(book.discarded.values()) + expected:
                self.broken(f"books of lineage {number} don't balance: {book}, open {expected}")
            facts = self.auditor.audit.books.get(number)
            found = (len(facts.issued), len(facts.consumed), len(facts.discarded)) if facts else (0, 0, 0)
            if found != (book.issued, book.consumed, sum(book.discarded.values())):
                self.broken(f"books of lineage {number}: the ledger says {book}, the facts say {found}")

    def _check_fleet(self, core: Core) -> None:
        """Nobody has work, or a state, that it may not have."""
        state = core.state
        fleet = state.fleet
        for group in state.ledger.having("leased"):
            if not fleet.is_current(group.replica, group.incarnation):
                self.broken(f"group {group.id} is leased to {group.replica}#{group.incarnation}, which is gone")
            if group.purpose == "train":
                begun = self._handed[group.id, self._partials[group.id]] if group.id in self._partials else []
                oldest = min([group.version, *(stretch.version for stretch in begun)])
                if state.version - oldest > self._bound:
                    self.broken(f"version {state.version} is committed while {group} runs, begun with {begun}")
        for replica in fleet.live():
            if replica.deadline is None and (replica.state in ("joining", "loading") or not replica.confirmed):
                self.broken(f"{replica.name} is {replica.state}, confirmed: {replica.confirmed}, without a deadline")
            if replica.state != "joining" and sorted(replica.pids) != list(range(replica.world)):
                self.broken(f"{replica.name} is {replica.state} with the ranks {replica.pids} of {replica.world}")
            if replica.state == "ready":
                held = replica.position
                chain = self._held.get((replica.nonce, held)) if held is not None else None
                if held is None or (chain is None and not self._renamed(replica.nonce, held)):
                    self.broken(f"{replica.name} is ready with {held}, which it never held")
                elif replica.role != "policy" and held.lineage == state.lineage:
                    true = self._by_version.get((held.lineage, held.version))
                    if true != chain:
                        self.broken(f"{replica.name} is ready with {held} as {chain}, but that is {true}")
        self._check_members(core)
        committed = state.lineages.committed
        if committed.step < state.lineages.settled.step or committed.version < state.lineages.settled.version:
            self.broken(f"committed {committed} is behind settled {state.lineages.settled}")

    def _check_members(self, core: Core) -> None:
        """Several policies compute a step over a mesh of exactly them; a stale one is in it only as its joiner."""
        state, step = core.state, core.state.steps.step
        applying = step.shares if step is not None and step.state == "committed" else {}
        for replica in state.fleet.ready("policy"):
            if replica.position != state.lineages.committed and replica.name not in applying:
                self.broken(f"{replica.name} is ready with {replica.position}, and will not join again")
        if step is None or step.state != "computing":
            return
        for name in step.shares:
            replica, join = state.fleet.replicas[name], state.joining.join
            joins = join is not None and (join.joiner, join.position) == (name, state.lineages.committed)
            member = replica.state in ("ready", "draining") and replica.position == state.lineages.committed
            if not member and not joins:
                self.broken(f"{name} computes step {step.step}, and is {replica.state} with {replica.position}")
        mesh = state.meshes.meshes.get(step.mesh or 0)
        if mesh is not None and mesh.state != "formed":
            self.broken(f"step {step.step} is computed over mesh {mesh.epoch}, which is {mesh.state}")
        named = sorted(member.replica for member in mesh.members) if mesh is not None else sorted(step.shares)
        if named != sorted(step.shares) or (step.mesh is None and len(step.shares) > 1):
            self.broken(f"step {step.step} of {sorted(step.shares)} is reduced over a mesh of {named}")

    def _check_judged(self, fact: Judged) -> None:
        """What a verdict rests on was sampled with exactly the weights that it is about."""
        lineage, chains = self._answers[fact.group, self._last_report[fact.group]]
        true = self._by_version.get((fact.lineage, fact.version))
        if (lineage, list(chains.items())) != (fact.lineage, [(fact.version, true)]):
            self.broken(f"{fact} rests on an answer in lineage {lineage} by {chains}, but that version is {true}")

    def _check_rounds(self, core: Core) -> None:
        """A round is not torn by newer weights, and a periodic one on evaluators holds no training up."""
        state, recipe = core.state, self.plan.recipe
        judged = state.evaluation.round
        sent = {edge.receiver: edge.position for edge in state.weights.edges.values() if edge.position is not None}
        for group in state.ledger.having("leased", "eval"):
            position = sent.get(group.replica)
            if position is not None and group.version != position.version:
                self.broken(f"{group.replica} judges version {group.version} and is sent {position}")
        train, stages = recipe.train, state.stages
        periodic = judged is not None and judged.why == "periodic" and not recipe.run.deterministic
        if not periodic or recipe.judge != "evaluator" or train is None or stages.name != "train":
            return
        if stages.outcome or stages.stopping or state.version - stages.began >= train.batches:
            return
        self._check_rollouts_are_served(core)
        if state.steering.paused or state.fleet.leaving:
            return
        if state.steps.batch is not None or state.steps.step is not None:
            return
        running = state.ledger.oldest("leased", "train")
        bound = state.hyperparameters.whole("train.max_staleness")
        held_up = running is not None and running <= state.version - bound
        if state.ledger.count("reported", "train") >= train.batch_size and not held_up:
            self.broken(f"no batch is formed of {state.ledger.count('reported', 'train')} groups during {judged}")

    def _check_rollouts_are_served(self, core: Core) -> None:
        """Whoever may have the committed weights gets them, as soon as somebody who holds them has room."""
        state, committed, table = core.state, core.state.lineages.committed, self.plan.recipe.weights
        served = {edge.receiver for edge in state.weights.edges.values()}
        behind = [name for name in _behind(core, "rollout") if name not in served]
        left = [name for name in behind if state.meshes.may_begin(name, state.now)]
        if not left:
            return
        publication = state.weights.newest(committed.lineage, committed.version)
        barred = publication.barred if publication is not None else {}
        sources = [r for role in ("rollout", "evaluator") for r in state.fleet.ready(role) if r.name not in barred]  # type: ignore[arg-type]
        sources = [r for r in sources if publication is not None and r.position == publication.position]
        at_rest = state.steps.step is None or state.steps.step.state != "committed"
        if at_rest and (state.steps.batch is None or state.steps.batch.index == 0):
            sources += [r for r in state.fleet.ready("policy") if r.position == committed]
        for source in sources:
            mine = [edge.since for edge in state.weights.edges.values() if edge.source == source.name]
            if sum(since > state.now - table.slow_s for since in mine) < table.fanout:
                self.broken(f"{left} hold old weights, and {source.name}, which has room, sends them none")

    def _check_edges(self, core: Core) -> None:
        """A source has few edges, a receiver one; who may serve or be served is known without a look at all."""
        state = core.state
        edges, lists = list(state.weights.edges.values()), state.weights
        receivers = [edge.receiver for edge in edges]
        if len(set(receivers)) < len(receivers):
            self.broken(f"a replica is sent weights twice at a time: {edges}")
        for edge in edges:
            mesh = state.meshes.meshes.get(edge.epoch)
            if mesh is None or (edge.position is None) == (mesh.state == "formed"):
                self.broken(f"{edge} has the mesh {mesh}")
            source = state.fleet.replicas[edge.source]
            ranks = range(source.world if source.role == "policy" else 1)
            ends = [*((edge.source, rank) for rank in ranks), (edge.receiver, 0)]
            if [(member.replica, member.rank) for member in mesh.members] != ends:
                self.broken(f"{edge} has a mesh of other members: {mesh}")
        target = (state.lineages.committed.lineage, state.lineages.committed.version)
        for role in ("rollout", "evaluator") if lists.target == target else ():
            behind = set(_behind(core, role))  # type: ignore[arg-type]
            known = {*lists.waiting.get(role, ()), *lists.resting, *receivers}  # type: ignore[call-overload]
            if not behind <= known:
                self.broken(f"{behind - known} are behind {target}, and nobody knows it")
        members: dict[str, list[int]] = {}
        for epoch, mesh in state.meshes.meshes.items():
            for name in dict.fromkeys(member.replica for member in mesh.members):
                members.setdefault(name, []).append(epoch)
        if self.plan.recipe.judge == "evaluator" and state.stages.name == "train" and not state.stages.outcome:
            self._check_rollouts_are_served(core)
        if {name: list(epochs) for name, epochs in state.meshes.memberships.items()} != members:
            self.broken(f"meshes are indexed as {state.meshes.memberships}, their members are {members}")

    def _renamed(self, nonce: int, position: Position) -> bool:
        """The same weights under the version that followed when the rest of a batch was struck off."""
        return any(
            known == nonce and (held.lineage, held.step) == (position.lineage, position.step)
            for known, held in self._held
        )

    def _check_bounds(self, core: Core) -> None:
        """Memory is bounded: groups, meshes, what is remembered of orders, what waits in channels."""
        state, recipe = core.state, self.plan.recipe
        if recipe.train is not None:
            waiting = sum(state.ledger.count(kind, "train") for kind in ("queued", "leased", "reported"))
            redone = sum(len(batch.groups) for batch in (*state.steps.unsettled, *state.steps.pending))
            most = (self._bound + 1) * recipe.train.batch_size + redone
            if waiting > most:
                self.broken(f"{waiting} groups wait for training, the bound is {most}")
        for name, epochs in state.meshes.memberships.items():
            held = [epoch for epoch in epochs if state.meshes.meshes[epoch].purpose == "weights"]
            idle = [epoch for epoch in held if epoch not in state.weights.edges]
            if len(idle) > 2 * recipe.weights.fanout + 2:
                self.broken(f"{name} stands in {len(idle)} meshes that nobody uses")
        between = [mesh for mesh in state.meshes.meshes.values() if mesh.purpose != "weights"]
        if len(between) > 4:
            self.broken(f"{len(between)} meshes of the policies live")
        for name, keys in state.sent.items():
            if len(keys) > 100:
                self.broken(f"{len(keys)} orders of {name} are remembered")

    def _check_indices(self, core: Core) -> None:
        """What is indexed is what a look at everything finds."""
        ledger, fleet = core.state.ledger, core.state.fleet
        shelves: dict[str, list[int]] = {}
        ages: dict[str, dict[int, int]] = {}
        loads: dict[str, int] = {}
        for group in ledger.groups.values():
            key = f"{group.state} {group.purpose}"
            shelves.setdefault(key, []).append(group.id)
            if group.state in SAMPLED:
                mine = ages.setdefault(key, {})
                mine[group.sampled_at] = mine.get(group.sampled_at, 0) + 1
            if group.state == "leased":
                loads[group.replica] = loads.get(group.replica, 0) + group.samples
        places = [place for group in ledger.groups.values() for place in (group.spooled, group.partial_at)]
        needed = min((place.segment for place in places if place is not None), default=ledger.segment)
        if ledger.first_segment() > needed:
            self.broken(f"segments below {ledger.first_segment()} may go, but a group needs segment {needed}")
        found = {key: sorted(shelf) for key, shelf in ledger.shelves.items() if shelf}
        if found != {key: sorted(shelf) for key, shelf in shelves.items()}:
            self.broken(f"the ledger's shelves are {found}, its groups {shelves}")
        if {key: age for key, age in ledger.ages.items() if age} != ages or ledger.loads != loads:
            self.broken(f"the ledger indexes {ledger.ages}, {ledger.loads}; its groups are {ages}, {loads}")
        for role in ROLES:
            live = sorted(r.name for r in fleet.replicas.values() if r.live and r.role == role)
            if [r.name for r in fleet.live(role)] != live:
                self.broken(f"the fleet lists {fleet.live(role)}, live are {live}")
            ready = [n for n in live if fleet.replicas[n].state == "ready" and fleet.replicas[n].confirmed]
            if [r.name for r in fleet.ready(role)] != ready:
                self.broken(f"the fleet lists {fleet.ready(role)} as ready, it should be {ready}")

    def _check_ranks(self, core: Core, now: float) -> None:
        """A replica is lost soon after the end of any of its ranks."""
        assert self.fleet is not None
        controller, recipe = self.fleet.controller, self.plan.recipe
        if controller is None or controller.core is not core:
            return
        longest = recipe.bus.lost_after_s + recipe.timeouts.rejoin_s + NOTICE_S
        for replica in core.state.fleet.live():
            for rank in replica.pids:
                at = self._ended.get((replica.name, replica.nonce, rank), now)
                if now - max(at, controller.began_at) > longest:
                    self.broken(f"rank {rank} of {replica.name} ended {now - at:.1f} s ago, and it is {replica.state}")

    def _check_meshes(self, core: Core, now: float) -> None:
        """Whoever uses a mesh that was revoked hears of it soon."""
        assert self.fleet is not None
        live = core.state.meshes.meshes
        for process, using in self.fleet.mesh_users():
            for epoch, since in using.items():
                if epoch in live:
                    self._revoked.pop(epoch, None)
                    continue
                heard = self._revoked.setdefault(epoch, now)
                if now - max(heard, since) > REVOKE_S and self.fleet.undisturbed(process, max(heard, since)):
                    self.broken(
                        f"{process.name} is still in the mesh of epoch {epoch}, revoked {now - heard:.1f} s ago"
                    )


def _brief(what: object) -> str:
    """The scalars of a message or fact, for a person."""
    fields = msgspec.structs.asdict(what)  # type: ignore[arg-type]
    short = {k: v for k, v in fields.items() if isinstance(v, int | float | str | Position) or k == "groups"}
    return ", ".join(f"{k} {v}" for k, v in short.items() if not isinstance(v, list) or all(type(x) is int for x in v))


def _behind(core: Core, role: Role) -> list[str]:
    """Who is far enough behind the committed version to be sent it; rollouts may be some old (`weights.every`)."""
    committed, every = core.state.lineages.committed, core.state.weights.interval if role == "rollout" else 1
    return [
        replica.name
        for replica in core.state.fleet.behind(role, committed)
        if replica.position is None
        or replica.position.lineage != committed.lineage
        or committed.version - replica.position.version >= every
    ]
