"""Checkpoints, the turn from stage to stage, stopping, and the end of the run."""

from __future__ import annotations

from services.controller.core.lineages import SavePoint
from services.controller.core.outcome import Discarded, EndRun, Finished, FreeSpool, Settled, StageBegan
from services.controller.core.rules.draining import somebody_hands_over
from services.controller.core.rules.joining import compare_states
from services.controller.core.rules.judging import drop_round
from services.controller.core.rules.leasing import end_group
from services.controller.core.state import Turn
from shared.messages import Position

FAILURES = 3
"""Checkpoints in a row that fail before the run does: work that can't be made durable is not worth doing."""


def turn_stage(turn: Turn) -> bool:
    """End a stage whose batches are done or whose rule holds; its checkpoint comes before the next one begins."""
    state = turn.state
    if state.stages.name not in ("sft", "train") or state.stages.stopping or state.stages.outcome:
        return False
    done = state.stages.rule_met or turn.trained() >= turn.table.batches * turn.table.batch_size
    if not done or state.steps.pending or not _idle(turn):
        return False
    last = state.stages.names[state.stages.index + 1] == "closing"
    if not last and state.lineages.settled != state.lineages.committed:
        return _save(turn, export=False)
    purpose = state.stages.name
    for group in [g for g in state.ledger.groups.values() if g.purpose == purpose and g.state != "consumed"]:
        end_group(turn, group, "stage_over")
    name = state.stages.advance(state.version)
    turn.progress()
    turn.fact(StageBegan(name, state.version))
    return True


def save_regularly(turn: Turn) -> bool:
    """A checkpoint every so many batches, when a person asks for one, and before the only policy leaves."""
    state = turn.state
    if state.stages.name == "over" or state.stages.outcome or not _idle(turn):
        return False
    if state.lineages.settled == state.lineages.committed:
        state.steering.checkpoint = False
        return False
    due = state.version - state.lineages.settled.version >= state.hyperparameters.whole("checkpoint.every")
    due = due and state.stages.name != "closing" and state.lineages.failed != state.lineages.committed
    asked = state.steering.checkpoint or somebody_hands_over(turn)
    if not (due or asked) or not _save(turn, export=False):
        return False
    state.steering.checkpoint = False
    return True


def close_run(turn: Turn) -> bool:
    """The last version is judged and everything trained: the final checkpoint with its export, then the end."""
    state = turn.state
    if (
        state.stages.name != "closing"
        or state.stages.outcome
        or not _idle(turn)
        or state.joining.comparison is not None
    ):
        return False
    judged = state.evaluation.judged(state.lineage, state.version)
    if turn.recipe.evaluation is not None and not judged:
        return False
    export = turn.recipe.checkpoint.export and not state.lineages.exported
    if export or state.lineages.settled != state.lineages.committed:
        return _save(turn, export=export)
    state.stages.finish("complete", "all stages done")
    return True


def stop_run(turn: Turn) -> bool:
    """A person asked for the end: the batch in hand is finished, its state saved, the rest kept for `orrery resume`."""
    state = turn.state
    if not state.stages.stopping or state.stages.outcome:
        return False
    if (
        state.steps.batch is None
        and state.lineages.settled == state.lineages.committed
        and state.lineages.saving is None
        and state.joining.comparison is None
    ):
        state.stages.finish("stopped", state.stages.stopping)
        return True
    if not state.fleet.ready("policy"):
        state.stages.finish("stopped", f"{state.stages.stopping}; no policy was there to save the last batches")
        return True
    return _idle(turn) and _save(turn, export=False)


def end_run(turn: Turn) -> bool:
    """Once there is an outcome: say so on record and let the shell end."""
    state = turn.state
    if not state.stages.outcome or state.stages.announced:
        return False
    state.stages.announced = True
    if state.evaluation.round is not None:
        drop_round(turn, "run_over")
    if state.stages.outcome == "complete":
        for group in [g for g in state.ledger.groups.values() if g.state != "consumed"]:
            state.ledger.discard(group, state.lineage, "run_over")
            turn.fact(Discarded(state.lineage, group.id, "run_over"))
        state.stages.advance(state.version)
    turn.fact(Finished(state.stages.outcome, state.stages.cause))
    turn.effect(EndRun(state.stages.outcome, state.stages.cause))
    return False


def checkpoint_saved(turn: Turn, position: Position, path: str) -> None:
    """A checkpoint is durable: what it holds is settled, and its payloads can go."""
    state = turn.state
    saving = state.lineages.saving
    state.lineages.settle(position, path, export=saving is not None and saving.export)
    settled: list[int] = []
    for batch in [b for b in state.steps.unsettled if b.version < position.version]:
        for number in batch.groups:
            state.ledger.settle(turn.group(number), state.lineage)
        settled += batch.groups
        state.steps.unsettled.remove(batch)
    turn.progress()
    turn.fact(Settled(position.lineage, position.version, position.step, path, settled))
    turn.effect(FreeSpool(state.ledger.first_segment()))


def checkpoint_failed(turn: Turn, cause: str) -> None:
    """Nothing is settled; tried again with the next batch, and the run fails when it happens again and again.

    Training went on meanwhile, perhaps: what was committed since has not failed.
    """
    state, saving = turn.state, turn.state.lineages.saving
    assert saving is not None
    state.lineages.saving, state.lineages.failed = None, saving.position
    state.lineages.failures += 1
    if state.lineages.failures >= FAILURES:
        state.stages.finish("failed", f"{FAILURES} checkpoints in a row could not be written, the last one: {cause}")


def _save(turn: Turn, *, export: bool) -> bool:
    state = turn.state
    writer = next((r for r in state.fleet.ready("policy") if r.position == state.lineages.committed), None)
    if writer is None or state.lineages.saving is not None:
        return False
    until = state.now + turn.recipe.timeouts.checkpoint_s
    state.lineages.saving = SavePoint(writer.name, state.lineages.committed, export, until)
    compare_states(turn, writer)
    return True


def _idle(turn: Turn) -> bool:
    """Between batches, with nothing being saved."""
    steps = turn.state.steps
    return steps.batch is None and steps.step is None and turn.state.lineages.saving is None
