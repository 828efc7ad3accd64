"""Advantages against hand-computed numbers, and the filter of groups that teach nothing."""

from __future__ import annotations

import math

import pytest

from services.controller.core.advantages import EPSILON, all_equal, group_advantages
from services.controller.core.outcome import Consumed, Discarded
from shared.messages import TrainStep
from tests.unit.controller.world import small_world


@pytest.mark.parametrize(
    ("rewards", "kind", "expected"),
    [
        # mean 0.25, population variance (3 * 0.0625 + 0.5625) / 4 = 0.1875, std 0.4330127
        ([0.0, 0.0, 0.0, 1.0], "group_norm", [-0.5773503, -0.5773503, -0.5773503, 1.7320508]),
        ([0.0, 0.0, 0.0, 1.0], "unbiased", [-0.25, -0.25, -0.25, 0.75]),
        # mean 2, deviations -1 0 1, variance 2/3, std 0.8164966
        ([1.0, 2.0, 3.0], "group_norm", [-1.2247449, 0.0, 1.2247449]),
        ([1.0, 2.0, 3.0], "unbiased", [-1.0, 0.0, 1.0]),
        ([0.5, 0.5], "group_norm", [0.0, 0.0]),
        ([-2.0, 4.0], "unbiased", [-3.0, 3.0]),
    ],
)
def test_advantages_are_what_the_formula_gives_by_hand(rewards: list[float], kind: str, expected: list[float]) -> None:
    assert group_advantages(rewards, kind) == pytest.approx(expected, abs=5e-6)  # type: ignore[arg-type]


def test_the_deviation_is_the_populations_and_epsilon_is_added_to_it() -> None:
    first, second = group_advantages([0.0, 1.0], "group_norm")
    assert second == -first == 0.5 / (0.5 + EPSILON)


def test_an_all_but_equal_group_does_not_explode() -> None:
    assert max(group_advantages([1.0, 1.0 + 1e-12], "group_norm")) < 1e-5


def test_advantages_sum_to_nothing() -> None:
    rewards = [0.1, 0.7, 0.7, 0.3, 1.0, 0.0, 0.2]
    for kind in ("group_norm", "unbiased"):
        assert math.fsum(group_advantages(rewards, kind)) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]


def test_equal_means_equal_within_epsilon() -> None:
    assert all_equal([0.3, 0.3 + EPSILON / 2])
    assert not all_equal([0.3, 0.3 + 2 * EPSILON])


@pytest.mark.parametrize(("kind", "expected"), [("group_norm", [-1.0, 1.0]), ("unbiased", [-0.5, 0.5])])
def test_a_step_carries_the_advantages_that_the_recipe_names(kind: str, expected: list[float]) -> None:
    world = small_world(train={"advantage": kind})
    world.deliver()
    step = world.models["policy-0"].told(TrainStep)[0]
    assert isinstance(step, TrainStep)
    assert all(group.advantages == pytest.approx(expected, abs=1e-5) for group in step.groups)


def test_a_group_with_equal_rewards_is_replaced_by_another() -> None:
    world = small_world()
    world.models["rollout-0"].rewards = lambda group, samples: [1.0, 1.0] if group in (2, 5) else [0.0, 1.0]
    world.deliver()
    filtered = [(fact.group, fact.cause) for fact in world.of(Discarded)]
    assert filtered == [(2, "equal_rewards"), (5, "equal_rewards")]
    consumed = [group for fact in world.of(Consumed) if isinstance(fact, Consumed) for group in fact.groups]
    assert len(consumed) == 12
    assert {2, 5}.isdisjoint(consumed)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_the_mean_reward_in_the_metrics_counts_filtered_samples_too() -> None:
    world = small_world(train={"max_staleness": 0})
    world.models["rollout-0"].rewards = lambda group, samples: [1.0, 1.0] if group == 2 else [0.0, 1.0]
    world.deliver()
    first = world.metrics[0]
    assert first["reward_trained"] == 0.5
    assert first["reward"] == pytest.approx((4 * 0.5 + 1.0) / 5)


def test_without_the_filter_equal_groups_train() -> None:
    world = small_world(train={"filter_equal_rewards": False})
    world.models["rollout-0"].rewards = lambda group, samples: [1.0] * samples
    world.deliver()
    assert not world.of(Discarded)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_run_gives_up_when_too_many_groups_in_a_row_teach_nothing() -> None:
    world = small_world(train={"filter_limit": 3})
    world.models["rollout-0"].rewards = lambda group, samples: [0.0] * samples
    world.run(lambda: world.ended is not None)
    assert world.ended is not None
    assert world.ended.outcome == "failed"
    assert "had equal rewards: nothing to learn from" in world.ended.cause
    assert len([f for f in world.of(Discarded) if f.cause == "equal_rewards"]) == 3 * 4


def test_one_group_that_teaches_something_begins_the_count_anew() -> None:
    world = small_world(train={"filter_limit": 1})
    world.models["rollout-0"].rewards = lambda group, samples: [0.0, 1.0] if group % 4 == 0 else [0.0, 0.0]
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
