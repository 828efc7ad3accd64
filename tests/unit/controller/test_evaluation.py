"""Evaluation rounds: which wait, which don't, and that a verdict is always about exactly one version."""

from __future__ import annotations

import pytest

from services.controller.core.evaluation import Answer, Evaluation, Round
from services.controller.core.outcome import Committed, Discarded, Evaluated, Issued, Requeued, StageBegan
from shared.intervals import wilson_interval
from shared.messages import Grant, GroupReport, Lease, LeaseReturned, Position, ReceiveWeights, TrainStep
from tests.unit.controller.world import Model, World, recipe, small_world

EVALUATION = {"every": 2, "suites": {"heldout": {"problems": 5}}}
SFT = {"dataset": "train", "batches": 6, "batch_size": 4, "lr": 1e-3, "stop": {"accuracy": 0.6, "every": 2}}


def grants(model: Model, purpose: str) -> list[Grant]:
    return [g for order in model.told(Lease) if isinstance(order, Lease) for g in order.grants if g.purpose == purpose]


def verdicts(world: World) -> list[tuple[int, str]]:
    return [(fact.version, fact.why) for fact in world.of(Evaluated) if isinstance(fact, Evaluated)]


def judging(**tables: dict[str, object] | None) -> tuple[World, Model]:
    """A world whose first round is open: the rollout holds its rows and does not answer."""
    world = small_world(evaluation=EVALUATION, **tables)
    rollout = world.models["rollout-0"]
    rollout.slow = True
    world.deliver()
    assert len(rows(rollout)) == 5
    return world, rollout


def rows(rollout: Model) -> list[tuple[int, int]]:
    """The leases in hand that are of an evaluation."""
    return [key for key, (grant, _) in rollout.working.items() if grant.purpose == "eval"]


def test_first_and_last_versions_are_judged_and_others_every_so_many_batches() -> None:
    world = small_world(evaluation=EVALUATION, train={"batches": 5})
    world.deliver()
    assert verdicts(world) == [(0, "first"), (2, "periodic"), (4, "periodic"), (5, "last")]
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_round_asks_the_same_rows_once_greedily() -> None:
    world = small_world(evaluation=EVALUATION)
    world.deliver()
    asked = grants(world.models["rollout-0"], "eval")
    for start in range(0, len(asked), 5):
        assert [grant.row for grant in asked[start : start + 5]] == [0, 1, 2, 3, 4]
    assert all(grant.sampling.temperature == 0.0 and grant.samples == 1 for grant in asked)
    assert all(grant.dataset == "heldout" and grant.fingerprint == "bb" for grant in asked)


def test_a_round_is_no_longer_than_the_data_set() -> None:
    world = small_world(evaluation={"suites": {"heldout": {"problems": 200}}})
    world.deliver()
    assert {evaluation["n"] for evaluation in world.evaluations} == {20}


def test_no_batch_is_formed_before_the_first_verdict() -> None:
    world, rollout = judging()
    for key in [key for key in rollout.working if key not in rows(rollout)]:
        world.finish(rollout, key)
    world.deliver()
    assert len(world.core.state.ledger.having("reported", "train")) == 8, "two batches' worth are there"
    assert not world.models["policy-0"].told(TrainStep)
    rollout.slow = False
    for key in rows(rollout):
        world.finish(rollout, key)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    first = next(i for i, fact in enumerate(world.facts) if isinstance(fact, Evaluated))
    assert first < next(i for i, fact in enumerate(world.facts) if isinstance(fact, Committed))


def periodic_round() -> tuple[World, Model, int]:
    """A world where a periodic round is open, on the version given, and the rollout is slow."""
    world = small_world(evaluation={**EVALUATION, "every": 1}, train={"batches": 6, "max_staleness": 3})
    rollout = world.models["rollout-0"]
    world.run(lambda: verdicts(world) == [(0, "first")])
    rollout.slow = True
    for _ in range(100):
        world.deliver()
        judged = world.core.state.evaluation.round
        if judged is not None:
            assert judged.why == "periodic"
            return world, rollout, judged.version
        world.finish(rollout)
    raise AssertionError("no round was opened")


def test_training_goes_on_while_a_periodic_round_is_open() -> None:
    world, rollout, judged = periodic_round()
    version = world.core.state.version
    while train := [key for key in rollout.working if key not in rows(rollout)]:
        world.finish(rollout, train[0])
        world.deliver()
    assert world.core.state.evaluation.round is not None
    assert world.core.state.version > version
    assert world.core.state.version == judged + 4, "until nothing may be leased with the old weights any more"


def test_weights_wait_until_the_round_on_the_old_ones_is_over() -> None:
    world, rollout, judged = periodic_round()
    before = len(rollout.told(ReceiveWeights))
    while train := [key for key in rollout.working if key not in rows(rollout)]:
        world.finish(rollout, train[0])
        world.deliver()
    assert world.core.state.version > judged
    assert len(rollout.told(ReceiveWeights)) == before
    assert rollout.holds is not None and rollout.holds.version == judged
    rollout.slow = False
    for key in rows(rollout):
        world.finish(rollout, key)
    world.deliver()
    assert len(rollout.told(ReceiveWeights)) > before
    assert world.ended is not None and world.ended.outcome == "complete"


def test_an_answer_by_another_version_is_judged_again() -> None:
    world, rollout = judging()
    key = rows(rollout)[0]
    report = rollout.report(key)
    wrong = GroupReport(**{f: getattr(report, f) for f in report.__struct_fields__} | {"newest": 1})
    assert world.say(rollout, wrong) == "fresh"
    [again] = world.of(Requeued)
    assert isinstance(again, Requeued)
    assert again.cause == "judged with versions 0..1, not 0"
    assert (key[0], 2) in rollout.working
    assert world.core.state.evaluation.round is not None
    assert world.core.state.evaluation.round.answers == {}


def test_a_row_that_cannot_be_judged_counts_as_wrong_and_the_round_ends() -> None:
    world, rollout = judging()
    rollout.rewards = lambda group, samples: [1.0] * samples
    keys = rows(rollout)
    world.say(rollout, LeaseReturned(*keys[0], 1, "reward_failed", "the verifier crashed"))
    for key in keys[1:]:
        world.say(rollout, rollout.report(key))
    [verdict] = world.of(Evaluated)
    assert isinstance(verdict, Evaluated)
    assert (verdict.n, verdict.correct) == (5, 4)


def test_a_gating_round_outlives_the_loss_of_everyone_who_judged_it() -> None:
    world, _ = judging()
    world.replace("rollout-0")
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert verdicts(world)[0] == (0, "first")


def test_a_periodic_round_that_nobody_can_finish_is_cancelled_and_its_rows_are_discarded() -> None:
    world, rollout, judged = periodic_round()
    while world.core.state.version == judged:
        world.finish(rollout, next(key for key in rollout.working if key not in rows(rollout)))
        world.deliver()
    world.replace("rollout-0")
    causes = [fact.cause for fact in world.of(Discarded) if isinstance(fact, Discarded)]
    assert causes == ["round_cancelled"] * 5
    world.deliver()
    assert (judged, "periodic") not in verdicts(world)
    assert world.ended is not None and world.ended.outcome == "complete"
    assert verdicts(world)[-1] == (6, "last")


def test_a_joiner_is_synced_during_a_round_only_to_the_version_that_is_judged() -> None:
    world, _ = judging()
    joiner = world.join("rollout-1", "rollout")
    world.deliver()
    assert joiner.holds == Position(1, 0, 0)


def test_sft_ends_early_when_its_rule_holds() -> None:
    world = small_world(evaluation=EVALUATION, sft=SFT)
    rollout = world.models["rollout-0"]
    rollout.rewards = lambda group, samples: (
        [float(world.core.state.version >= 4)] if samples == 1 else [float(i % 2) for i in range(samples)]
    )
    world.deliver()
    assert verdicts(world)[:2] == [(2, "rule"), (4, "rule")]
    assert world.of(StageBegan)[1] == StageBegan("train", 4)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_sft_trains_all_its_batches_when_its_rule_never_holds() -> None:
    world = small_world(evaluation=EVALUATION, sft=SFT)
    world.models["rollout-0"].rewards = lambda group, samples: [float(i % 2) for i in range(samples)]
    world.deliver()
    assert verdicts(world)[:3] == [(2, "rule"), (4, "rule"), (6, "first")]
    assert world.of(StageBegan)[1] == StageBegan("train", 6)


def test_the_same_weights_are_not_judged_twice() -> None:
    world = small_world(evaluation=EVALUATION, sft={**SFT, "stop": {"accuracy": 0.0, "every": 2}})
    world.deliver()
    assert verdicts(world) == [(2, "rule"), (4, "periodic"), (5, "last")], "2 is also the first version of the stage"


def test_engines_get_no_weights_during_sft_unless_a_verdict_hangs_on_them() -> None:
    world = small_world(sft={**SFT, "stop": None}, train=None)
    world.deliver()
    versions = [order.position.version for order in world.models["rollout-0"].told(ReceiveWeights)]
    assert versions in ([], [6]), "at most the final ones"
    assert world.ended is not None and world.ended.outcome == "complete"


def test_sft_that_nobody_judges_needs_no_rollouts() -> None:
    world = small_world(sft={**SFT, "stop": None}, train=None, rollout={"replicas": 0}, rollouts=0)
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"


def test_without_evaluation_nothing_is_judged() -> None:
    world = small_world()
    world.deliver()
    assert not world.of(Evaluated)
    assert "eval" not in {fact.purpose for fact in world.of(Issued)}


def test_a_verdict_leaves_a_file_with_its_interval() -> None:
    world = small_world(evaluation=EVALUATION)
    world.models["rollout-0"].rewards = lambda group, samples: [1.0] if samples == 1 else [0.0, 1.0]
    world.deliver()
    first = world.evaluations[0]
    assert (first["suite"], first["version"], first["why"], first["n"], first["correct"]) == (
        "heldout",
        0,
        "first",
        5,
        5,
    )
    assert first["accuracy"] == 1.0
    assert first["interval"] == list(wilson_interval(5, 5))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(5, 5, 0.5655, 1.0), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (1, 3, 0.0615, 0.7923)],
)
def test_the_interval_is_wilsons(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_a_score_counts_as_correct_from_the_bar_on() -> None:
    suites = {"heldout": {"problems": 4, "correct_at": 0.5}}
    world = small_world(evaluation={"every": 100, "suites": suites})
    scores = iter([0.5, 0.49, 1.0, 0.5 - 1e-12])
    world.models["rollout-0"].rewards = lambda group, samples: (
        [next(scores, 0.0)] if samples == 1 else [float(i % 2) for i in range(samples)]
    )
    world.run(lambda: len(verdicts(world)) == 1)
    [verdict] = world.of(Evaluated)
    assert isinstance(verdict, Evaluated)
    assert (verdict.n, verdict.correct) == (4, 3)


def test_a_round_with_rows_open_cannot_be_closed() -> None:
    answers = {"heldout": {0: Answer(1.0, "")}}
    evaluation = Evaluation(round=Round(1, 0, "train", "first", 0.0, {"heldout": 1, "other": 1}, answers))
    with pytest.raises(ValueError, match="every row is judged"):
        evaluation.close()


def test_a_verdict_is_about_exactly_these_weights() -> None:
    world = World(recipe(evaluation=EVALUATION))
    evaluation = world.core.state.evaluation
    evaluation.round = Round(1, 3, "train", "periodic", 0.0, {"heldout": 1}, {"heldout": {0: Answer(1.0, "")}})
    evaluation.close()
    assert evaluation.judged(1, 3)
    assert not evaluation.judged(2, 3), "another lineage has other weights"
    assert not evaluation.judged(1, 2)
