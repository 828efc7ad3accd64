"""Evaluators of their own: who judges, which weights they get when, and that training does not wait for them."""

from __future__ import annotations

from services.controller.core.events import DeadlinePassed
from services.controller.core.outcome import Discarded, Evaluated, Finished, Synced
from shared.messages import Grant, Lease, Position, ReceiveWeights, Register, SendWeights, TrainStep
from tests.unit.controller.world import Model, World, small_world

SUITES = {
    "heldout": {"problems": 5},
    "sampled": {"dataset": "heldout", "problems": 3, "samples": 2, "temperature": 1.0},
}


def own_world(
    evaluators: int = 1, *, every: int = 2, slow: bool = False, slots: int = 16, **tables: dict[str, object] | None
) -> World:
    """A world with evaluators; nothing is delivered yet."""
    evaluation = {"every": every, "suites": SUITES}
    world = small_world(evaluation=evaluation, evaluator={"engine": "own", "slots": slots}, **tables)
    for number in range(evaluators):
        world.join(f"evaluator-{number}", "evaluator", slow=slow)
    return world


def periodic_round(evaluators: int = 1) -> tuple[World, Model, int]:
    """A world where a periodic round is open on the version given, and the first evaluator does not answer."""
    world = own_world(evaluators, every=1, slots=16 if evaluators == 1 else 3, train={"batches": 8})
    evaluator = world.models["evaluator-0"]
    world.run(lambda: len(verdicts(world)) == 2)
    for number in range(evaluators):
        world.models[f"evaluator-{number}"].slow = True
    world.run(lambda: bool(evaluator.working))
    judged = world.core.state.evaluation.round
    assert judged is not None and judged.why == "periodic"
    return world, evaluator, judged.version


def verdicts(world: World) -> list[tuple[int, str, str]]:
    return [(fact.version, fact.why, fact.suite) for fact in world.of(Evaluated) if isinstance(fact, Evaluated)]


def grants(model: Model) -> list[Grant]:
    return [grant for order in model.told(Lease) if isinstance(order, Lease) for grant in order.grants]


def received(model: Model) -> list[int]:
    return [order.position.version for order in model.told(ReceiveWeights) if isinstance(order, ReceiveWeights)]


def complete(world: World) -> bool:
    return world.ended is not None and world.ended.outcome == "complete"


def answer_all(world: World, evaluator: Model) -> None:
    evaluator.slow = False
    for key in list(evaluator.working):
        world.finish(evaluator, key)
    world.deliver()


def test_evaluators_judge_and_rollouts_do_not() -> None:
    world = own_world(train={"batches": 5})
    world.deliver()
    assert complete(world)
    assert {grant.purpose for grant in grants(world.models["evaluator-0"])} == {"eval"}
    assert {grant.purpose for grant in grants(world.models["rollout-0"])} == {"train"}
    assert (0, "first", "heldout") in verdicts(world)
    assert verdicts(world)[-1][:2] == (5, "last")


def test_every_suite_has_its_own_rows_sampling_and_verdict() -> None:
    world = own_world()
    world.deliver()
    asked = grants(world.models["evaluator-0"])[:8]
    assert [(g.suite, g.row, g.samples, g.sampling.temperature) for g in asked] == [
        *[("heldout", row, 1, 0.0) for row in range(5)],
        *[("sampled", row, 2, 1.0) for row in range(3)],
    ]
    first = {str(record["suite"]): record for record in world.evaluations[:2]}
    assert (first["heldout"]["n"], first["sampled"]["n"]) == (5, 3)
    assert first["sampled"]["accuracy"] == 0.5, "of two samples each time one is right"


def test_a_verdict_is_split_by_category() -> None:
    world = own_world(slow=True)
    world.deliver()
    evaluator = world.models["evaluator-0"]
    for key, (grant, _) in list(evaluator.working.items()):
        report = evaluator.report(key)
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        correct = [float(grant.row < 2)] * grant.samples
        world.say(evaluator, type(report)(**fields | {"category": f"kind {grant.row % 2}", "rewards": correct}))
    record = next(record for record in world.evaluations if record["suite"] == "heldout")
    by_category = record["by_category"]
    assert isinstance(by_category, dict)
    assert {name: (each["n"], each["correct"]) for name, each in by_category.items()} == {
        "kind 0": (3, 1.0),
        "kind 1": (2, 1.0),
    }


def test_an_evaluator_gets_only_the_versions_that_it_judges() -> None:
    world = own_world(every=3, train={"batches": 7})
    world.deliver()
    assert sorted(set(received(world.models["evaluator-0"]))) == sorted({version for version, _, _ in verdicts(world)})
    assert len(set(received(world.models["rollout-0"]))) > len(set(received(world.models["evaluator-0"])))


def test_training_and_rollouts_go_on_while_a_periodic_round_is_open() -> None:
    world, evaluator, version = periodic_round()
    world.deliver()
    assert evaluator.working, "the round is still open"
    assert world.core.state.version == 8, "all batches are trained"
    assert max(received(world.models["rollout-0"])) > version
    assert received(evaluator)[-1] == version
    answer_all(world, evaluator)
    assert complete(world)
    assert verdicts(world)[-1] == (8, "last", "sampled")


def test_after_its_round_an_evaluator_gets_the_newest_weights() -> None:
    world, evaluator, version = periodic_round()
    world.run(lambda: world.core.state.version >= version + 3)
    newest = world.core.state.version
    answer_all(world, evaluator)
    assert received(evaluator)[received(evaluator).index(version) + 1] >= newest


def test_the_rows_of_a_lost_evaluator_are_leased_again_to_another_that_holds_the_version() -> None:
    world, evaluator, version = periodic_round(evaluators=2)
    other = world.models["evaluator-1"]
    world.run(lambda: bool(other.working))
    lost = {group for group, _ in evaluator.working}
    world.lose("evaluator-0")
    answer_all(world, other)
    assert lost <= {grant.group for grant in grants(other)}
    assert version in {judged for judged, _, _ in verdicts(world)}
    assert complete(world)


def test_a_round_whose_version_nobody_holds_is_opened_anew_on_the_newest() -> None:
    world, evaluator, version = periodic_round()
    world.run(lambda: world.core.state.version > version)
    rows = len(evaluator.working)
    world.replace("evaluator-0")
    assert [fact.cause for fact in world.of(Discarded) if isinstance(fact, Discarded)] == ["round_cancelled"] * rows
    world.deliver()
    assert complete(world)
    judged = [judged for judged, _, _ in verdicts(world)]
    assert version not in judged
    assert judged[-1] == 8


def test_without_an_evaluator_training_goes_on_up_to_the_last_verdict() -> None:
    world, _, _ = periodic_round()
    world.lose("evaluator-0")
    world.deliver()
    assert world.core.state.version == 8
    assert world.ended is None, "the last version has to be judged"
    world.join("evaluator-0", "evaluator")
    world.deliver()
    assert complete(world)
    assert verdicts(world)[-1][:2] == (8, "last")


def test_a_gating_round_that_nobody_judges_ends_the_run_and_names_who_is_missing() -> None:
    world = own_world(evaluators=0)
    world.deliver()
    assert not world.models["policy-0"].told(TrainStep)
    world.pass_time(world.recipe.timeouts.stall_s + 200.0)
    [finished] = world.of(Finished)
    assert isinstance(finished, Finished)
    assert finished.outcome == "failed"
    assert "evaluator: none registered" in finished.cause


def test_rollouts_and_evaluators_have_a_mesh_each() -> None:
    world, _, version = periodic_round()
    mesh = world.core.state.meshes.of("weights", "policy-0", "rollout-0")
    assert mesh is not None
    world.replace("evaluator-0", slow=True)
    world.run(lambda: world.core.state.version > version + 1)
    now = world.core.state.meshes.of("weights", "policy-0", "rollout-0")
    assert now is not None and now.epoch == mesh.epoch, "the loss of an evaluator takes no rollout's mesh"


def test_an_evaluator_whose_transfer_was_given_up_judges_nothing_before_the_next_one() -> None:
    world = own_world(every=1, train={"batches": 3})
    world.run(lambda: len(verdicts(world)) == 2)
    policy = world.models["policy-0"]
    policy.silent = {SendWeights}
    world.deliver()
    edges = world.core.state.weights.edges.values()
    [edge] = [edge for edge in edges if edge.receiver == "evaluator-0"]
    assert (edge.source, edge.sent, edge.loaded) == ("policy-0", False, "same")
    assert world.state_of("evaluator-0") == "ready"
    policy.silent = set()
    world.now = edge.deadline
    world.step(DeadlinePassed(at=world.now))
    assert world.state_of("evaluator-0") == "stale"
    world.deliver()
    world.pass_time(30.0)
    assert complete(world)


def test_in_a_deterministic_run_a_lost_row_takes_its_whole_round_back() -> None:
    tables: dict[str, dict[str, object]] = {"run": {"deterministic": True}, "train": {"max_staleness": 0}}
    world = own_world(slow=True, **tables)
    world.deliver()
    evaluator = world.models["evaluator-0"]
    first = grants(evaluator)
    world.finish(evaluator)
    world.deliver()
    assert len(evaluator.working) == len(first) - 1
    again = world.replace("evaluator-0", slow=True)
    world.deliver()
    assert [(g.group, g.attempt) for g in grants(again)] == [(g.group, 2) for g in first], "beside the same others"
    answer_all(world, again)
    assert complete(world)


def test_an_evaluator_is_refused_where_the_fleet_judges() -> None:
    world = small_world(evaluation={"suites": {"heldout": {}}})
    model = Model(world, "evaluator-0", "evaluator", 99)
    refusal = world.core.judge_registration(model.register())
    assert refusal is not None
    assert refusal.fault == "role"
    assert "evaluator.engine" in refusal.expected


def test_a_rollback_drops_the_round_and_makes_evaluators_stale() -> None:
    world, evaluator, _ = periodic_round()
    world.replace("policy-0")
    world.deliver()
    answer_all(world, evaluator)
    assert complete(world)
    assert world.core.state.lineage == 2
    synced = [fact for fact in world.of(Synced) if isinstance(fact, Synced) and fact.replica == "evaluator-0"]
    assert synced[-1].lineage == 2
    assert evaluator.holds == Position(2, 8, world.core.state.lineages.committed.step)


def test_in_sft_only_evaluators_get_weights_and_only_when_a_rule_asks() -> None:
    stop = {"accuracy": 1.0, "every": 2, "suite": "heldout"}
    sft = {"dataset": "train", "batches": 4, "batch_size": 4, "lr": 1e-3, "stop": stop}
    world = own_world(sft=sft, train=None)
    world.models["evaluator-0"].rewards = lambda group, samples: [0.0] * samples
    world.deliver()
    assert complete(world)
    assert received(world.models["rollout-0"]) == []
    assert received(world.models["evaluator-0"]) == [2, 4]


def test_a_deterministic_run_judges_the_same_versions_whoever_is_slow() -> None:
    tables: dict[str, dict[str, object]] = {"run": {"deterministic": True}, "train": {"max_staleness": 0, "batches": 5}}
    quick, slow = own_world(every=1, **tables), own_world(every=1, slow=True, **tables)
    quick.deliver()
    for _ in range(20):
        slow.deliver()
        for key in list(slow.models["evaluator-0"].working):
            slow.finish(slow.models["evaluator-0"], key)
    assert complete(quick) and complete(slow)
    assert verdicts(quick) == verdicts(slow)


def test_a_person_registers_nowhere() -> None:
    world = own_world()
    register = world.models["evaluator-0"].register()
    fields = {name: getattr(register, name) for name in register.__struct_fields__}
    refusal = world.core.judge_registration(Register(**fields | {"role": "person", "replica": "someone"}))
    assert refusal is not None and refusal.fault == "role"
