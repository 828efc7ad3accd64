"""Rollouts in narrow numbers, by the engine's own kernels where it has them on this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from shared.engines.base import Engine, EngineError
from tests.engines.conftest import MakeEngine, replace
from tests.engines.families import ask, forward_logprobs, prompt, run, tiny

# what each engine computes with on a machine without a GPU
ON_CPU = {
    "transformers": ("fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"),
    "vllm": ("fp8", "fp8_block") if torch.cpu._is_amx_tile_supported() else ("fp8",),
    "sglang": (),
}


def logprobs(engine: Engine, key: str) -> tuple[list[int], np.ndarray]:
    sample = run(engine, ask(key, prompt(9), new=30))[key, 0]
    return sample.tokens.tolist(), sample.logprobs


def plain(seed: int) -> PreTrainedModel:
    return tiny("qwen3", seed, wide=True).to(torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what engines can do with a GPU is another list")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_block"])
def test_weights_are_quantised_again_with_every_update(
    make_engine: MakeEngine, engine_name: str, quantization: str
) -> None:
    if quantization not in ON_CPU[engine_name]:
        pytest.skip(f"{engine_name} has no {quantization} on a CPU")
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="what engines can do with a GPU is another list")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_a_format_that_the_engine_does_not_have_is_refused_with_those_that_it_has(
    make_engine: MakeEngine, engine_name: str, quantization: str
) -> None:
    if quantization in ON_CPU[engine_name]:
        pytest.skip(f"{engine_name} has {quantization}")
    with pytest.raises(EngineError, match=f"rollout.quantization = '{quantization}'.*quantises to") as refused:
        make_engine(plain(0), dtype="bfloat16", quantization=quantization)
    for other in ON_CPU[engine_name]:
        assert other in str(refused.value)
