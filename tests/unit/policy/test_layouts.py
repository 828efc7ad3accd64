"""What a layout asks of a model, and what one of a single rank does. Layouts of several: tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from services.policy.layouts.compose import Layout
from services.policy.layouts.fit import architecture_of, check_fit
from shared.messages import Position
from shared.models import ModelError
from shared.weights.slices import Parallel

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("config", "parallel", "said"),
    [
        (Qwen3Config(**SIZES), Parallel(tp=8), "4 key/value heads, got tp = 8"),
        (Qwen3Config(**SIZES), Parallel(pp=5), "a stage a layer, got 5 stages for 4 layers"),
        (Qwen3Config(**SIZES), Parallel(ep=2), "expected a model with experts, got 2 ranks"),
        (Qwen3MoeConfig(**SIZES, num_experts=6), Parallel(ep=2, tp=2), "divide the 6 experts, got 2 x 2"),
        (LlamaConfig(**SIZES, mlp_bias=True), Parallel(tp=2), "no bias, which each of 2 ranks would add"),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=0), Parallel(), "sliding windows"),
    ],
    ids=["heads", "layers", "no experts", "experts", "biases", "windows"],
)
def test_a_layout_that_a_model_cannot_have_is_refused_with_the_reason(
    config: Any, parallel: Parallel, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        check_fit(config, parallel)


def test_what_fits_is_not_refused() -> None:
    check_fit(Qwen3MoeConfig(**SIZES, num_experts=8), Parallel(pp=4, replicate=3, fsdp=5, ep=2, cp=3, tp=4))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_the_architecture_is_read_off_the_configuration(tools: Any, family: str) -> None:
    layout = tools.trainer(tools.recipe(family)).layout
    read = architecture_of(layout.model.config)
    model = layout.model
    assert read.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert (read.layers, read.heads, read.kv_heads) == (2, 2, 1)
    assert bool(read.experts) == (family == "qwen3_moe")


def test_weights_are_exchanged_and_come_back_to_the_bit(tools: Any) -> None:
    layout: Layout = tools.trainer(tools.recipe()).layout
    before = {name: weight.clone() for name, weight in layout.weights().items()}
    others = {name: torch.full_like(weight, 2.0) for name, weight in before.items()}
    layout.swap(others)
    assert all((weight == 2.0).all() for weight in layout.weights().values())
    assert all(torch.equal(others[name], weight) for name, weight in before.items())
    layout.swap(others)
    assert all(torch.equal(weight, before[name]) for name, weight in layout.weights().items())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_layers_computed_again_in_backward_give_the_same_gradients(tools: Any, family: str) -> None:
    found = []
    for again in (False, True):
        trainer = tools.trainer(tools.recipe(family, policy__gradient_checkpointing=again))
        trainer.compute(*tools.step(trainer.recipe, Position(0, 0, 0)))
        found.append(tools.gradients(trainer))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])
