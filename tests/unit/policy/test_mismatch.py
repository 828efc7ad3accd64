"""Faults planted between a real engine and a real trainer, and what the trainer says they are."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from services.policy.batch import TrainSequence, rows_of
from services.policy.layouts.compose import Layout
from services.policy.packing import MicroBatch, pack
from services.policy.trainer import Snapshot, Trainer
from shared.engines.base import Request
from shared.engines.transformers import TransformersEngine
from shared.messages import CommitStep, Position, Sampling
from tests.engines.families import VOCABULARY, prompt, run, tiny


def drawn(
    engine: TransformersEngine, *, asked: float = 1.0, recorded: float = 1.0, before: tuple[int, ...] = ()
) -> MicroBatch:
    """Samples of the engine as a micro-batch; `before` is what it read in front of the recorded prompt."""
    found = []
    for group in range(8):
        tokens = prompt(10 + group, group)
        request = Request(group, [*before, *tokens], 4, Sampling(asked, 1.0, 0, 24), group)
        for (_, sample), made in run(engine, request).items():
            response = made.tokens, made.logprobs
            found.append(TrainSequence(group, 1, sample, torch.tensor(tokens).int().numpy(), *response, 1.0, recorded))
    return pack(rows_of(found, 1 << 14, 64))


def trained(model: PreTrainedModel, steps: int, seed: int) -> PreTrainedModel:
    """The model some steps of a real optimizer later, always towards the same texts."""
    model = deepcopy(model)
    texts = torch.randint(0, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trainer_of(tools: Any, model: PreTrainedModel, reference: PreTrainedModel) -> Trainer:
    trainer = Trainer(
        Layout(model), tools.recipe(), Position(0, 10, 10), lambda epoch: pytest.fail("there is one member")
    )
    tensors = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    trainer.reference = Snapshot(Position(0, 0, 0), tensors)
    return trainer


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The stage's first weights, and those of now."""
    first = tiny("qwen3", wide=True)
    return first, trained(first, 12, seed=1)


def off(trainer: Trainer, batch: MicroBatch) -> float:
    [(logprobs, _)] = trainer.layout.predict([batch])
    return float((logprobs - batch.engine_logprobs).abs().mean())


def test_a_true_engine_is_nothing_to_look_at(tools: Any, models: Any) -> None:
    first, now = models
    trainer = trainer_of(tools, now, first)
    assert off(trainer, drawn(TransformersEngine(deepcopy(now), slots=32, stops=[]))) < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_a_wrong_temperature(tools: Any, models: Any, temperature: float) -> None:
    first, now = models
    trainer = trainer_of(tools, now, first)
    batch = drawn(TransformersEngine(deepcopy(now), slots=32, stops=[]), asked=temperature)
    likely = trainer.cause_of_mismatch(batch)
    assert (likely.cause, likely.detail) == ("temperature", f"{temperature:g} times the temperature")
    assert likely.explained > 0.99


@pytest.mark.parametrize("quantization", ["nvfp4", "mxfp4", "fp8"])
def test_a_quantised_engine(tools: Any, models: Any, quantization: Any) -> None:
    first, now = models
    trainer = trainer_of(tools, now, first)
    engine = TransformersEngine(deepcopy(now), slots=32, stops=[], quantization=quantization)
    likely = trainer.cause_of_mismatch(drawn(engine))
    assert (likely.cause, likely.detail) == ("quantized", f"rounding to {quantization}")


@pytest.mark.parametrize("behind", [1, 2, 3])
def test_weights_of_some_steps_ago(tools: Any, behind: int) -> None:
    recipe = tools.recipe(model__dtype="float32", train__lr=0.01)
    trainer = tools.trainer(recipe)
    held = []
    for number in range(12):
        held.append(deepcopy(trainer.model))
        step, frames = tools.step(recipe, trainer.position, attempt=number + 1, seed=number // 6)
        trainer.compute(step, frames)
        trainer.apply(CommitStep(step.step, step.attempt, 0))
    engine = TransformersEngine(held[-behind], slots=32, stops=[])
    likely = trainer.cause_of_mismatch(drawn(engine))
    assert likely.cause == "stale"
    assert "the last step taken back" in likely.detail


def test_weights_that_never_came(tools: Any, models: Any) -> None:
    first, now = models
    trainer = trainer_of(tools, now, first)
    likely = trainer.cause_of_mismatch(drawn(TransformersEngine(deepcopy(first), slots=32, stops=[])))
    assert (likely.cause, likely.detail) == ("stale", "the stage's first weights")
    assert likely.explained > 0.99


def test_another_prompt_than_the_recorded_one(tools: Any, models: Any) -> None:
    first, now = models
    trainer = trainer_of(tools, now, first)
    engine = TransformersEngine(deepcopy(now), slots=32, stops=[])
    likely = trainer.cause_of_mismatch(drawn(engine, before=(5, 9, 31, 7, 7, 2)))
    assert likely.cause == "prompt"
    assert "chat template" in str(likely)
