"""Rollouts in narrow numbers, by the engine's own kernels where it has them on this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from shared.config import load_recipe
from shared.engines.base import Engine, EngineError
from shared.engines.load import load_engine
from shared.models import load_model
from tests.engines.conftest import MakeEngine, replace
from tests.engines.families import ask, forward_logprobs, prompt, run, tiny

FORMATS = ("fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4")
ON_CPU = {
    "transformers": FORMATS,
    "vllm": ("fp8", "fp8_block") if torch.cpu._is_amx_tile_supported() else ("fp8",),
    "sglang": (),
}
ON_GPU = {"transformers": FORMATS, "vllm": FORMATS, "sglang": ("fp8", "mxfp8", "mxfp4", "nvfp4")}
OLDEST = {"fp8": (8, 9), "fp8_block": (9, 0), "mxfp8": (10, 0), "mxfp4": (10, 0), "nvfp4": (10, 0)}


def able(engine: str) -> list[str]:
    """The formats that an engine computes with on this machine."""
    if not torch.cuda.is_available():
        return list(ON_CPU[engine])
    here = torch.cuda.get_device_capability()
    return [it for it in ON_GPU[engine] if engine == "transformers" or here >= OLDEST[it]]


def logprobs(engine: Engine, key: str) -> tuple[list[int], np.ndarray]:
    sample = run(engine, ask(key, prompt(9), new=30))[key, 0]
    return sample.tokens.tolist(), sample.logprobs


def plain(seed: int) -> PreTrainedModel:
    return tiny("qwen3", seed, wide=True).to(torch.bfloat16)


@pytest.mark.parametrize("quantization", FORMATS)
def test_weights_are_quantised_again_with_every_update(
    make_engine: MakeEngine, engine_name: str, quantization: str
) -> None:
    if quantization not in able(engine_name):
        pytest.skip(f"{engine_name} has no {quantization} on this machine")
    first, second = plain(0), plain(1)
    engine = make_engine(first, dtype="bfloat16", quantization=quantization)
    tokens, before = logprobs(engine, "a")
    replace(engine, second, 1)
    others, _ = logprobs(engine, "b")
    replace(engine, first, 2)
    again, after = logprobs(engine, "c")
    assert others != tokens == again
    assert np.array_equal(before, after)
    exact = forward_logprobs(first.float(), prompt(9), tokens).numpy()
    # narrow numbers: near the exact ones, and further off than the rounding of bfloat16 alone
    off = np.abs(before - exact).mean()
    assert 0.01 < off < 0.5


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_format_that_the_engine_does_not_have_is_refused_with_those_that_it_has(
    make_engine: MakeEngine, engine_name: str, quantization: str
) -> None:
    if quantization in able(engine_name):
        pytest.skip(f"{engine_name} has {quantization}")
    with pytest.raises(EngineError, match=f"rollout.quantization = '{quantization}'.*quantises to") as refused:
        make_engine(plain(0), dtype="bfloat16", quantization=quantization)
    for other in able(engine_name):
        assert other in str(refused.value)


def test_rollouts_may_be_narrow_whatever_the_policy_trains_in(engine_name: str) -> None:
    # a real folder and a real start, as a rollout does it
    if not able(engine_name):
        pytest.skip(f"{engine_name} has no narrow format on this machine")
    quantization = able(engine_name)[-1]
    recipe = load_recipe(
        "recipes/quickstart.toml", [f"rollout.engine={engine_name}", f"rollout.quantization={quantization}"]
    )
    assert recipe.model.dtype == "float32"
    engine, _ = load_engine(recipe, "rollout-0")
    try:
        model = load_model(recipe.model, recipe.run.seed, weights=True)
        replace(engine, model, 0)
        tokens, found = logprobs(engine, "a")
        exact = forward_logprobs(model, prompt(9), tokens).numpy()
        assert 0 < np.abs(found - exact).mean() < 0.1
    finally:
        engine.close()
