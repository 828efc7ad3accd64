"""Batches and steps: filter, form, assign, commit.

The staleness bound lives here and in `leasing`: a batch that starts from version v must take every live group whose
oldest token is max_staleness behind v, and waits for those that still run; so the version can rise past them only when
none is left (the commit rule checks exactly that).
"""

from __future__ import annotations

import math

from services.controller.core.advantages import all_equal, group_advantages
from services.controller.core.events import Spooled
from services.controller.core.fleet import Replica
from services.controller.core.ledger import Group, GroupState
from services.controller.core.outcome import Aborted, Assigned, Committed, Consumed, Discarded, RecordMetrics, Revised
from services.controller.core.rules.draining import somebody_hands_over
from services.controller.core.rules.judging import gating_round_due
from services.controller.core.rules.members import begin_transfer, step_members, undecided
from services.controller.core.rules.mustering import mustered
from services.controller.core.state import Turn
from services.controller.core.steps import Batch, Step
from shared.messages import AbortStep, AssignedGroup, TrainStep

WAITING: tuple[GroupState, ...] = ("queued", "leased", "reported")
NONFINITE_LIMIT = 3
"""Steps in a row whose gradients are not finite before the run fails: the model is broken, not the batch."""


def filter_groups(turn: Turn) -> bool:
    """Discard reported groups whose rewards are all equal; a deterministic run waits until its wave is complete."""
    state, train = turn.state, turn.recipe.train
    if train is None or not train.filter_equal_rewards or state.stages.name != "train":
        return False
    ledger = state.ledger
    if turn.recipe.run.deterministic and (ledger.count("leased", "train") or ledger.count("queued", "train")):
        return False
    fresh = ledger.fresh()
    for group in fresh:
        if all_equal(group.rewards):
            state.ledger.discard(group, state.lineage, "equal_rewards")
            turn.fact(Discarded(state.lineage, group.id, "equal_rewards"))
            state.stages.filtered_in_a_row += 1
        else:
            ledger.keep(group)
            state.stages.filtered_in_a_row = 0
    if state.stages.filtered_in_a_row >= train.filter_limit * train.batch_size:
        state.stages.finish(
            "failed",
            f"{state.stages.filtered_in_a_row} prompt groups in a row had equal rewards: nothing to learn from. "
            "The task is too hard or too easy for this model: try a longer [sft], other data, or a higher temperature",
        )
    return bool(fresh)


def form_batch(turn: Turn) -> bool:
    """Make the next recorded batch current, or form one of the reported groups."""
    state = turn.state
    if state.steps.batch is not None or state.steps.step is not None or state.stages.stopping or state.stages.outcome:
        return False
    if state.stages.name not in ("sft", "train") or gating_round_due(turn):
        return False
    if state.steering.paused or somebody_hands_over(turn):
        return False
    if state.steps.pending:
        state.steps.batch = state.steps.pending.pop(0)
        state.steps.batch.version = state.version  # lower than it was when one before it was struck off whole
        return True
    if state.stages.rule_met or turn.trained() >= turn.table.batches * turn.table.batch_size:
        return False
    chosen = _choose(turn)
    if chosen is None:
        return False
    for group in chosen:
        state.ledger.assign(group)
    ids = [group.id for group in chosen]
    minibatches, passes = 1, 1
    if state.stages.name == "train" and turn.recipe.train is not None:
        minibatches, passes = turn.recipe.train.minibatches, turn.recipe.train.mu
    size = len(ids) // minibatches
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    stage = state.stages.name
    bound = turn.bound if stage == "train" else 0
    state.steps.batch = Batch(state.version, stage, [list(part) for _ in range(passes) for part in parts], bound)
    return True


def _choose(turn: Turn) -> list[Group] | None:
    """The groups of the next batch: all that are due, then the oldest; None while they aren't there."""
    state, size = turn.state, turn.table.batch_size
    if state.stages.name == "sft":
        # In the order drawn, so that the composition never depends on who answered first.
        first = sorted((group for kind in WAITING for group in state.ledger.having(kind, "sft")), key=_id)[:size]
        return first if len(first) == size and all(g.state == "reported" for g in first) else None
    due = state.version - turn.bound
    oldest = state.ledger.oldest("reported", "train")
    if oldest is not None and oldest < due:
        for group in _filtered(turn):
            if group.oldest < due:
                _discard_stale(turn, group)
    running = state.ledger.oldest("leased", "train")
    if running is not None and running <= due:
        return None  # this batch is the last that may take them: wait, until their lease deadline at most
    if state.ledger.count("reported", "train") < size:
        return None
    reported = _filtered(turn)
    if len(reported) < size:
        return None
    chosen = sorted(reported, key=lambda g: (g.oldest, g.id))[:size]
    for group in reported:
        if group.oldest <= due and group not in chosen:
            _discard_stale(turn, group)
    return sorted(chosen, key=_id)


def begin_step(turn: Turn) -> bool:
    """Assign the step whose turn it is to its members, with global denominators and the revision in force."""
    state, batch = turn.state, turn.state.steps.batch
    if batch is None or state.steps.step is not None or batch.over or state.stages.outcome:
        return False
    found = step_members(turn) if mustered(turn, "policy") else None
    if found is None:
        return False
    members, mesh = found
    for revision in state.hyperparameters.advance(state.lineages.committed.step, state.now):
        turn.fact(Revised(revision.revision, revision.step, revision.changes))
    groups = [turn.group(number) for number in batch.plan[batch.index]]
    state.steps.begin(
        Step(
            step=state.lineages.committed.step,
            attempt=state.steps.next_attempt(),
            state="computing",
            members=[replica.member for replica in members],
            shares=_share(groups, members),
            tokens=sum(sum(group.lengths) for group in groups),
            sequences=sum(len(group.lengths) for group in groups),
            revision=state.hyperparameters.revision,
            deadline=state.now + turn.recipe.timeouts.step_s,
            began=state.now,
            mesh=mesh,
        )
    )
    begin_transfer(turn, members)
    for replica in members:
        message, payload = train_step(turn, replica.name)
        step = message.step
        turn.fact(Assigned(state.lineage, step, message.attempt, state.version, replica.name, message, payload))
    return True


def train_step(turn: Turn, replica: str) -> tuple[TrainStep, list[Spooled]]:
    """The order for one member of the step in hand, and where its payload lies."""
    state, batch, step = turn.state, turn.state.steps.batch, turn.state.steps.step
    assert batch is not None and step is not None
    kind = turn.recipe.train.advantage if turn.recipe.train is not None else "group_norm"
    groups, payload = [], []
    for group in (turn.group(number) for number in step.shares[replica]):
        advantages = group_advantages(group.rewards, kind) if group.purpose == "train" else [1.0] * len(group.lengths)
        groups.append(
            AssignedGroup(
                group=group.id,
                attempt=group.attempt,
                purpose=group.purpose,
                prompt_length=group.prompt_length,
                lengths=group.lengths,
                advantages=advantages,
                temperature=group.sampling.temperature,
                arrays=group.arrays,
                replica=group.replica,
            )
        )
        if group.spooled is not None:
            payload.append(group.spooled)
    message = TrainStep(
        step=step.step,
        attempt=step.attempt,
        stage=batch.stage,
        position=state.lineages.committed,
        index=batch.index,
        steps_in_batch=len(batch.plan),
        members=step.members,
        mesh=step.mesh,
        groups=groups,
        tokens=step.tokens,
        sequences=step.sequences,
        revision=step.revision,
        hyperparameters=dict(state.hyperparameters.values),
    )
    return message, payload


def reject_step(turn: Turn) -> None:
    """A member's gradients are not finite: the step's groups end, the batch goes on without them."""
    state, batch = turn.state, turn.state.steps.batch
    assert batch is not None
    groups = list(batch.plan[batch.index])
    abort_step(turn, "gradients not finite")
    for number in batch.strike(groups):
        group = turn.group(number)
        state.ledger.discard(group, state.lineage, "nonfinite")
        turn.fact(Discarded(state.lineage, number, "nonfinite"))
    state.steps.nonfinite += 1
    if state.steps.nonfinite >= NONFINITE_LIMIT:
        state.stages.finish(
            "failed",
            f"{NONFINITE_LIMIT} steps in a row had gradients not finite, at step {state.lineages.committed.step}: "
            "lower the learning rate, check the rewards and the data, and resume from the last checkpoint",
        )
    if not batch.plan:
        state.steps.batch = None
    elif batch.over:
        before, now = state.lineages.committed, state.lineages.end_batch()
        for replica in state.fleet.live("policy"):
            if replica.position == before:  # the same weights under their new version
                state.fleet.hold(replica, now)
        _finish_batch(turn, batch)


def abort_step(turn: Turn, cause: str) -> None:
    """Take the attempt in hand back from its members; it will be assigned anew."""
    step = turn.state.steps.abort()
    if step is None:
        return
    turn.fact(Aborted(turn.state.lineage, step.step, step.attempt, cause))
    for name in step.shares:
        replica = turn.state.fleet.replicas[name]
        if replica.live:
            turn.send(replica, AbortStep(step.step, step.attempt, turn.state.lineage, cause))


def commit_step(turn: Turn) -> bool:
    """Commit when all have voted yes and the new version would leave no live token behind the bound.

    A group that is still sampled is waited for. A reported one can only be too old when the bound was lowered since its
    batch, or the one in hand, was formed: it is of no use any more.
    """
    state, batch, step = turn.state, turn.state.steps.batch, turn.state.steps.step
    if batch is None or step is None or step.state != "computing" or not all(step.votes.get(n) for n in step.shares):
        return False
    if undecided(turn):
        return False
    last = batch.index + 1 == len(batch.plan)
    if last and batch.stage == "train":
        least = state.version + 1 - turn.bound
        running = state.ledger.oldest("leased", "train")
        if running is not None and running < least:
            return False
        waiting = state.ledger.oldest("reported", "train")
        if waiting is not None and waiting < least:
            for group in state.ledger.having("reported", "train"):
                if group.oldest < least:
                    _discard_stale(turn, group)
    state.steps.commit()
    state.joining.torn = None
    turn.fact(Committed(state.lineage, step.step, step.attempt, state.version))
    turn.progress()
    turn.effect(RecordMetrics(_metrics(turn, batch, step)))
    state.last_commit = state.now
    state.lineages.commit(last)
    if last:
        _finish_batch(turn, batch)
    return True


def close_step(turn: Turn) -> bool:
    """Every member that is left has applied the step: it is over."""
    step = turn.state.steps.step
    if step is None or step.state != "committed" or not set(step.applied) >= set(step.shares):
        return False
    turn.state.steps.step = None
    return True


def _finish_batch(turn: Turn, batch: Batch) -> None:
    state = turn.state
    groups = [turn.group(number) for number in batch.groups]
    staleness = max((batch.version - group.oldest for group in groups), default=0) if batch.stage == "train" else 0
    for group in groups:
        state.ledger.consume(group, state.lineage)
    turn.fact(Consumed(state.lineage, batch.version, batch.groups, staleness, batch.bound))
    state.steps.unsettled.append(batch)
    state.steps.batch = None


def _metrics(turn: Turn, batch: Batch, step: Step) -> dict[str, object]:
    """One line of metrics.jsonl; a policy's own metrics are averaged over the members."""
    state = turn.state
    groups = [turn.group(number) for share in step.shares.values() for number in share]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [length for group in groups for length in group.lengths]
    elapsed = max(state.now - (state.last_commit or step.began), 1e-9)
    line: dict[str, object] = {
        "time": state.now,
        "lineage": state.lineage,
        "step": step.step,
        "version": batch.version,
        "stage": batch.stage,
        "batches": turn.table.batches,
        "batch": batch.version - state.stages.began + 1,
        "revision": step.revision,
        "response_length": sum(lengths) / len(lengths),
        "response_length_max": max(lengths),
        "truncated": sum(group.truncated for group in groups) / len(lengths),
        "tokens": step.tokens,
        "members": len(step.shares),
        "samples_per_s": step.sequences / elapsed,
        "tokens_per_s": step.tokens / elapsed,
        "step_seconds": state.now - step.began,
        "sync_seconds": state.weights.last_seconds,
        "sync_bytes": state.weights.last_bytes,
    }
    line |= {f"set/{name}": value for name, value in state.hyperparameters.changed.items()}
    line |= {f"groups/{kind}": state.ledger.count(kind, batch.stage) for kind in WAITING}
    if batch.stage == "train":
        book = state.ledger.book(state.lineage)
        line["groups/continued"] = sum(group.begun > 0 for group in groups)
        line |= {"partials/handed_over": book.handed_over, "partials/dropped": book.partials_dropped}
        of_all, of_batch = state.ledger.take_reward(), sum(rewards) / len(rewards)
        line |= {"reward": of_batch if of_all is None else of_all, "reward_trained": of_batch}
        stale = [batch.version - group.oldest for group in groups]
        line |= {"staleness_max": max(stale), "staleness_mean": sum(stale) / len(stale)}
        line |= {"reward_std": _deviation(rewards), **_advantage_figures(turn, groups)}
        line["generate_seconds"] = sum(group.seconds for group in groups) / len(groups)
        line["judge_seconds"] = sum(group.judge_seconds for group in groups) / len(groups)
        causes = state.ledger.book(state.lineage).discarded
        line |= {f"discarded/{cause}": count for cause, count in sorted(causes.items())}
        for part in dict.fromkeys(name for group in groups for name in group.parts):
            # of all samples: a number that a function named for some of them only is 0 in the others
            line[f"reward/{part}"] = sum(sum(group.parts.get(part, ())) for group in groups) / len(rewards)
    for name in sorted({name for metrics in step.metrics.values() for name in metrics}):
        values = [metrics[name] for metrics in step.metrics.values() if name in metrics]
        line[name] = sum(values) / len(values)
    return line


def _advantage_figures(turn: Turn, groups: list[Group]) -> dict[str, float]:
    kind = turn.recipe.train.advantage if turn.recipe.train is not None else "group_norm"
    values = [value for group in groups for value in group_advantages(group.rewards, kind)]
    return {"advantage_mean": math.fsum(values) / len(values), "advantage_std": _deviation(values)}


def _deviation(values: list[float]) -> float:
    """Population standard deviation."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _share(groups: list[Group], members: list[Replica]) -> dict[str, list[int]]:
    """Split a step's groups over its members so that tokens balance: the largest first, each to the lightest.

    One that joins has a place and no group: it receives the state meanwhile.
    """
    shares: dict[str, list[int]] = {replica.name: [] for replica in members}
    load = {replica.name: 0 for replica in members if replica.state == "ready"}
    for group in sorted(groups, key=lambda g: (-sum(g.lengths), g.id)):
        lightest = min(load, key=lambda name: (load[name], name))
        shares[lightest].append(group.id)
        load[lightest] += len(group.lengths) * group.prompt_length + sum(group.lengths)
    return {name: sorted(numbers) for name, numbers in shares.items()}


def _filtered(turn: Turn) -> list[Group]:
    """Reported groups that may be trained on, by id."""
    filters = turn.recipe.train is not None and turn.recipe.train.filter_equal_rewards
    return [group for group in turn.state.ledger.having("reported", "train") if group.kept or not filters]


def _discard_stale(turn: Turn, group: Group) -> None:
    turn.state.ledger.discard(group, turn.state.lineage, "stale")
    turn.fact(Discarded(turn.state.lineage, group.id, "stale"))


def _id(group: Group) -> int:
    return group.id
