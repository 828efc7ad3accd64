"""Evaluation rounds: when one is due, opening it, closing it, and what follows from its verdict."""

from __future__ import annotations

from services.controller.core.evaluation import Round, Why
from services.controller.core.outcome import Discarded, Evaluated, Issued, RecordEvaluation
from services.controller.core.state import Turn
from shared.messages import Sampling

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def gating_round_due(turn: Turn) -> bool:
    """Whether a verdict on exactly the committed version must come before the next batch.

    In a deterministic run every round is gating, so that the same versions are judged whoever is interrupted.
    """
    why = _due(turn)
    return why is not None and (why != "periodic" or turn.recipe.run.deterministic)


def open_round(turn: Turn) -> bool:
    """Open the round that is due, on the newest version that the fleet holds."""
    state, table = turn.state, turn.recipe.evaluation
    why = _due(turn)
    if (
        table is None
        or why is None
        or state.evaluation.round is not None
        or state.stages.outcome
        or state.stages.stopping
    ):
        return False
    version = state.fleet.newest_ready("rollout", state.lineage)
    if version is None or (why != "periodic" and version != state.version):
        return False
    dataset = state.fleet.datasets.get(table.dataset)
    if why == "periodic" and version - _last_judged(turn) < table.every:
        return False  # the engines are about to get newer weights
    if dataset is None or state.evaluation.verdict_of(state.lineage, version) is not None:
        return False
    rows = min(table.problems, dataset.length)
    state.evaluation.round = Round(state.lineage, version, state.stages.name, why, state.now, rows)
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=table.max_new_tokens)
    for row in range(rows):
        group = state.ledger.draw(state.lineage, "eval", dataset, 0, row, 1, greedy, state.hyperparameters.revision)
        turn.fact(Issued(state.lineage, group.id, "eval", False))
    return True


def cancel_round(turn: Turn) -> bool:
    """Give up a round that nobody can finish: no replica holds its version, and none will get it."""
    state, judged = turn.state, turn.state.evaluation.round
    if judged is None or state.version == judged.version:
        return False
    if state.fleet.anyone_holds("rollout", judged.lineage, judged.version):
        return False
    drop_round(turn, "round_cancelled")
    return True


def drop_round(turn: Turn, cause: str) -> None:
    """End the open round without a verdict; its groups are discarded."""
    state = turn.state
    state.evaluation.round = None
    for group in [g for g in state.ledger.groups.values() if g.purpose == "eval"]:
        state.ledger.discard(group, state.lineage, cause)
        turn.fact(Discarded(state.lineage, group.id, cause))


def close_round(turn: Turn) -> bool:
    """Every row is judged: record the verdict; a stage's stop rule may hold now."""
    state, judged, table = turn.state, turn.state.evaluation.round, turn.recipe.evaluation
    if judged is None or table is None or len(judged.scores) < judged.rows:
        return False
    verdict = state.evaluation.close(table.correct_at)
    turn.progress()
    turn.fact(Evaluated(verdict.lineage, verdict.version, verdict.n, verdict.correct, verdict.why))
    turn.effect(
        RecordEvaluation(
            {
                "suite": table.dataset,
                "lineage": verdict.lineage,
                "version": verdict.version,
                "stage": verdict.stage,
                "why": verdict.why,
                "n": verdict.n,
                "correct": verdict.correct,
                "accuracy": verdict.accuracy,
                "interval": list(wilson_interval(verdict.correct, verdict.n)),
                "seconds": state.now - judged.began,
            }
        )
    )
    rule = turn.recipe.sft.stop if turn.recipe.sft is not None else None
    asked = verdict.why == "rule" and verdict.stage == state.stages.name  # a later stage is not ended by this rule
    if asked and rule is not None and verdict.accuracy >= rule.accuracy:
        state.stages.rule_met = True
    return True


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): lower and upper bound."""
    share, z2 = correct / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    spread = Z95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _due(turn: Turn) -> Why | None:
    """Why the run wants a verdict now; None when it doesn't."""
    state, table = turn.state, turn.recipe.evaluation
    if table is None or state.stages.name == "over":
        return None
    done = state.version - state.stages.began
    known = state.evaluation.verdict_of(state.lineage, state.version) is not None
    if state.stages.name == "sft":
        rule = turn.recipe.sft.stop if turn.recipe.sft is not None else None
        due = rule is not None and not state.stages.rule_met and done > 0 and done % rule.every == 0
        return "rule" if due and not known else None
    if state.stages.name == "closing":
        return None if known else "last"
    if done == 0:
        return None if known else "first"
    return "periodic" if state.version - _last_judged(turn) >= table.every else None


def _last_judged(turn: Turn) -> int:
    """The newest version that was judged in this lineage, or where the stage began."""
    state = turn.state
    judged = [v.version for v in state.evaluation.verdicts if v.lineage == state.lineage]
    return max(judged, default=state.stages.began)
