"""The optimizer is AdamW to the bit, wherever its state lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from services.policy import checkpoint, optimizer
from services.policy.optimizer import Optimizer
from services.policy.state import head_of, tensors_of
from services.policy.trainer import Trainer
from shared.config.schema import SftTable
from shared.messages import CommitStep, Position

TABLE = SftTable(dataset="rows", batches=8, batch_size=1, lr=1.0, warmup_steps=2, beta2=0.95)
RATES = ((1e-2, 0.1), (1e-2, 0.1), (3e-3, 0.1), (3e-3, 0.0), (5e-2, 0.2))


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "VISIT_ELEMENTS", 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_steps_are_torch_adamw_s_on_float32(dtype: torch.dtype, offload: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (20, 30), "a.bias": (20,), "b.weight": (7, 20), "empty": (0, 4), "norm": (20,)}
    own = {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in shapes.items()}
    true = {name: nn.Parameter(parameter.detach().float().clone()) for name, parameter in own.items()}
    decayed, plain = ([p for p in true.values() if (p.ndim >= 2) == many] for many in (True, False))
    adam = torch.optim.AdamW([{"params": decayed}, {"params": plain}], betas=(TABLE.beta1, TABLE.beta2))
    ours = Optimizer(own.items(), TABLE, offload=offload)
    for lr, decay in RATES:
        for name, parameter in own.items():
            parameter.grad = torch.randn(shapes[name], generator=draw).to(dtype)
            true[name].grad = parameter.grad.float()
        ours.collect()
        rate = ours.rate(lr)
        for group, weight_decay in zip(adam.param_groups, (decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = rate, weight_decay
        adam.step()
        assert ours.step(lr, decay) == rate
        for name, parameter in own.items():
            assert torch.equal(parameter, true[name].to(dtype)), name
    for name, tensor in ours.tensors().items():
        kind, _, parameter_name = name.partition("/")
        master = true[parameter_name]
        assert torch.equal(tensor, master.detach() if kind == "master" else adam.state[master][kind]), name


def train(trainer: Trainer, tools: Any, lr: float, batches: int = 2) -> None:
    for _ in range(batches):
        here = trainer.position
        step, frames = tools.step(trainer.recipe, here, seed=here.step, hyperparameters={"train.lr": lr})
        trainer.compute(step, frames)
        trainer.apply(CommitStep(step.step, step.attempt, here.lineage))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_state_trains_saves_and_resumes_to_the_same_bits(tools: Any, tmp_path: Path, dtype: str) -> None:
    """Each goes on from the other's checkpoint, with another learning rate than before."""
    kept, offloaded = (tools.recipe(model__dtype=dtype, policy__optimizer_offload=off) for off in (False, True))
    found = []
    for before, after in ((kept, kept), (offloaded, offloaded), (kept, offloaded), (offloaded, kept)):
        first = tools.trainer(before)
        train(first, tools, 1e-3)
        folder = tmp_path / str(len(found))
        path, _ = checkpoint.save(head_of(first), tensors_of(first), folder, "run", "recipe", 2)
        second = tools.trainer(after)
        checkpoint.load(second, path, Position(0, 2, 2))
        train(second, tools, 4e-3)
        found.append({name: tensor.clone() for name, tensor in tensors_of(second).items()})
    assert any(name.startswith("optimizer/master/") for name in found[0]) == (dtype == "bfloat16")
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        assert [name for name, tensor in found[0].items() if not torch.equal(tensor, others[name])] == []


def test_offloaded_state_lives_in_memory_that_no_step_exchanges(tools: Any) -> None:
    trainer = tools.trainer(tools.recipe(policy__optimizer_offload=True))
    train(trainer, tools, 1e-3, batches=1)
    assert trainer.optimizer is not None
    homes = {name: tensor.data_ptr() for name, tensor in trainer.optimizer.tensors().items()}
    train(trainer, tools, 1e-3, batches=1)
    assert {name: tensor.data_ptr() for name, tensor in trainer.optimizer.tensors().items()} == homes
