"""Evaluation rounds: when one is due, opening it, closing it, and what follows from its verdicts."""

from __future__ import annotations

from services.controller.core.evaluation import Answer, Round, Tally, Verdict, Why
from services.controller.core.ledger import Group
from services.controller.core.outcome import Discarded, Evaluated, Issued, Judged, RecordEvaluation
from services.controller.core.state import Turn
from shared.config.schema import SuiteTable
from shared.intervals import wilson_interval
from shared.messages import DatasetIdentity, Sampling


def round_due(turn: Turn) -> Why | None:
    """Why the run wants a verdict now; None when it doesn't."""
    why = _scheduled(turn)
    state = turn.state
    if why is None and state.steering.evaluate and state.stages.name in ("sft", "train"):
        return None if state.evaluation.judged(state.lineage, state.version) else "asked"
    return why


def _scheduled(turn: Turn) -> Why | None:
    """Why the recipe wants a verdict now."""
    state, table = turn.state, turn.recipe.evaluation
    if table is None or state.stages.name == "over":
        return None
    done = state.version - state.stages.began
    known = state.evaluation.judged(state.lineage, state.version)
    if state.stages.name == "sft":
        rule = turn.recipe.sft.stop if turn.recipe.sft is not None else None
        due = rule is not None and not state.stages.rule_met and done > 0 and done % rule.every == 0
        return "rule" if due and not known else None
    if state.stages.name == "closing":
        return None if known else "last"
    if done == 0:
        return None if known else "first"
    return "periodic" if state.version - _last_judged(turn) >= _every(turn) else None


def gating_round_due(turn: Turn) -> bool:
    """Whether a verdict on exactly the committed version must come before the next batch.

    In a deterministic run every round is gating, so that the same versions are judged whoever is interrupted.
    """
    why = round_due(turn)
    # during SFT rollouts get weights for gating rounds alone, so that what a person asks for must be one
    waits = why not in ("periodic", "asked") or (why == "asked" and turn.state.stages.name == "sft")
    return why is not None and (waits or turn.recipe.run.deterministic)


def open_round(turn: Turn) -> bool:
    """Open the round that is due, on the newest version that the judges hold."""
    state, table = turn.state, turn.recipe.evaluation
    why = round_due(turn)
    if (
        table is None
        or why is None
        or state.evaluation.round is not None
        or state.stages.outcome
        or state.stages.stopping
    ):
        return False
    version = state.fleet.newest_ready(turn.recipe.judge, state.lineage)
    if version is None or (gating_round_due(turn) and version != state.version):
        return False
    if why == "periodic" and version - _last_judged(turn) < _every(turn):
        return False  # the judges are about to get newer weights
    datasets = {suite: state.fleet.datasets.get(table.dataset(suite)) for suite in table.suites}
    if state.evaluation.judged(state.lineage, version):
        return False
    known = {suite: dataset for suite, dataset in datasets.items() if dataset is not None}
    if len(known) < len(datasets):
        return False
    rows = {suite: min(table.suites[suite].problems, dataset.length) for suite, dataset in known.items()}
    state.steering.evaluate = False
    state.evaluation.round = Round(state.lineage, version, state.stages.name, why, state.now, rows)
    for suite, dataset in known.items():
        _draw_rows(turn, suite, table.suites[suite], dataset, rows[suite])
    return True


def _draw_rows(turn: Turn, name: str, suite: SuiteTable, dataset: DatasetIdentity, rows: int) -> None:
    state = turn.state
    sampling = Sampling(suite.temperature, suite.top_p, suite.top_k, suite.max_new_tokens)
    revision = state.hyperparameters.revision
    for row in range(rows):
        group = state.ledger.draw(state.lineage, "eval", dataset, 0, row, suite.samples, sampling, revision, suite=name)
        turn.fact(Issued(state.lineage, group.id, "eval", False))


def judge_rows(turn: Turn) -> bool:
    """Take the rows that were answered into their round; a deterministic run waits until all are.

    (There, a lost lease takes the whole round back with it: rows are answered alike only beside the same others.)
    """
    ledger = turn.state.ledger
    reported = ledger.having("reported", "eval")
    if turn.recipe.run.deterministic and (ledger.count("leased", "eval") or ledger.count("queued", "eval")):
        return False
    for group in reported:
        _judge(turn, group)
    return bool(reported)


def _judge(turn: Turn, group: Group) -> None:
    """A row of the open round was answered and scored: it is consumed by its evaluation."""
    state, judged, table = turn.state, turn.state.evaluation.round, turn.recipe.evaluation
    assert judged is not None and table is not None
    bar = table.suites[group.suite].correct_at - 1e-9
    correct = sum(score >= bar for score in group.rewards) / len(group.rewards)
    judged.answer(group.suite, group.row, Answer(correct, group.category))
    state.ledger.consume(group, state.lineage)
    turn.fact(Judged(state.lineage, group.id, judged.version))


def cancel_round(turn: Turn) -> bool:
    """Give up a round that nobody can finish: no replica holds its version, and none will get it."""
    state, judged = turn.state, turn.state.evaluation.round
    if judged is None or state.version == judged.version:
        return False
    if state.fleet.anyone_holds(turn.recipe.judge, judged.lineage, judged.version):
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
    """Every row is judged: record the verdicts; a stage's stop rule may hold now."""
    state, judged = turn.state, turn.state.evaluation.round
    if judged is None or not judged.complete:
        return False
    turn.progress()
    for verdict in state.evaluation.close():
        turn.fact(Evaluated(verdict.lineage, verdict.version, verdict.suite, verdict.n, verdict.correct, verdict.why))
        turn.effect(RecordEvaluation(_record(verdict, state.now - judged.began)))
        rule = turn.recipe.sft.stop if turn.recipe.sft is not None else None
        decides = verdict.why == "rule" and verdict.suite == turn.recipe.stop_suite
        asked = decides and verdict.stage == state.stages.name  # a later stage is not ended by this rule
        if asked and rule is not None and verdict.accuracy >= rule.accuracy:
            state.stages.rule_met = True
    return True


def _record(verdict: Verdict, seconds: float) -> dict[str, object]:
    """The verdict's file in eval/."""
    return {
        "suite": verdict.suite,
        "lineage": verdict.lineage,
        "version": verdict.version,
        "stage": verdict.stage,
        "why": verdict.why,
        **_figures(verdict),
        "by_category": {name: _figures(tally) for name, tally in verdict.categories.items()},
        "seconds": seconds,
    }


def _figures(of: Verdict | Tally) -> dict[str, object]:
    return {
        "n": of.n,
        "correct": of.correct,
        "accuracy": of.correct / of.n,
        "interval": list(wilson_interval(of.correct, of.n)),
    }


def _every(turn: Turn) -> int:
    """Batches between evaluations."""
    return turn.state.hyperparameters.whole("evaluation.every")


def _last_judged(turn: Turn) -> int:
    """The newest version that was judged in this lineage, or where the stage began."""
    state = turn.state
    judged = [v.version for v in state.evaluation.verdicts if v.lineage == state.lineage]
    return max(judged, default=state.stages.began)
