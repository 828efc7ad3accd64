"""The learning rate over a stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.policy.optimizer import Optimizer
from shared.config.schema import OptimizerTable, SftTable, TrainTable


def rates(table: OptimizerTable, steps: int) -> list[float]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Optimizer([("weight", parameter)], table)
    used = []
    for _ in range(steps):
        parameter.grad = torch.ones(2)
        optimizer.collect()
        used.append(optimizer.step(1.0, 0.0))
    return used


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    table = SftTable(dataset="rows", batches=8, batch_size=1, lr=1.0, warmup_steps=4)
    assert rates(table, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_rate_falls_from_its_height_to_almost_nothing_at_the_last_step() -> None:
    table = SftTable(dataset="rows", batches=6, batch_size=1, lr=1.0, warmup_steps=2, schedule="linear")
    assert rates(table, 7) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_batch_of_several_steps_counts_them_all() -> None:
    table = TrainTable(dataset="rows", batches=2, batch_size=2, lr=1.0, mu=2, minibatches=2, schedule="linear")
    assert rates(table, 8) == pytest.approx([1 - step / 8 for step in range(8)])
