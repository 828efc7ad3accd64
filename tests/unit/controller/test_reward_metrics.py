"""Parts of the reward in the metrics of a step: means over all of its samples, each part apart."""

from __future__ import annotations

import msgspec

from shared.messages import GroupReport
from tests.unit.controller.world import small_world


def test_each_part_is_the_mean_over_all_samples_of_the_step() -> None:
    world = small_world(train={"batches": 1})
    rollout = world.models["rollout-0"]
    report = rollout.report

    def with_parts(key: tuple[int, int]) -> GroupReport:
        made = report(key)
        parts = {"right": [1.0, 0.0]} | ({"mine/rare": [1.0, 1.0]} if made.group % 2 else {})
        return msgspec.structs.replace(made, parts=parts)

    rollout.report = with_parts  # type: ignore[method-assign]
    world.deliver()
    (line,) = world.metrics
    assert line["reward/right"] == 0.5
    assert line["reward/mine/rare"] == 0.5, "absent from half of the groups: 0 there"
