"""Quantise and dequantise against the formats' definitions, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from shared.engines.base import EngineError
from shared.engines.quantization import quantize_dequantize, quantized_weights
from shared.engines.transformers import TransformersEngine
from tests.engines.families import ask, forward_logprobs, prompt, run, tiny
from tests.staged import stage

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted({abs(float(it)) for it in torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn) if it == it})


def nearest(value: float, codes: list[float]) -> float:
    """The code nearest to a number, ties to the code of even index, with the number's sign."""
    size = min(abs(value), codes[-1])
    index = min(range(len(codes)), key=lambda i: (abs(codes[i] - size), i % 2))
    return math.copysign(codes[index], value)


def by_blocks(weight: torch.Tensor, size: int, scale_of, codes: list[float]) -> torch.Tensor:
    """Each block of a row scaled by `scale_of(its largest number)`, rounded, scaled back."""
    rows = []
    for row in weight.tolist():
        out = []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            scale = scale_of(max(map(abs, block)))
            out += [nearest(value / scale, codes) * scale for value in block]
        rows.append(out)
    return torch.tensor(rows)


def power_of_two(largest: float, exponent: int) -> float:
    return 2.0 ** max(-127, math.floor(math.log2(largest)) - exponent) if largest else 2.0**-127


def weights(rows: int = 6, columns: int = 64, scale: float = 0.02) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * scale
    weight[2] = 0
    weight[3, :16] = 0
    return weight


@pytest.mark.parametrize("scale", [0.02, 3e-5, 40.0])
def test_mxfp4_is_e2m1_with_a_power_of_two_for_32_numbers(scale: float) -> None:
    weight = weights(scale=scale)
    expected = by_blocks(weight, 32, lambda largest: power_of_two(largest, 2), E2M1)
    assert torch.equal(quantize_dequantize(weight, "mxfp4"), expected)


@pytest.mark.parametrize("scale", [0.02, 3e-5, 40.0])
def test_mxfp8_is_e4m3_with_a_power_of_two_for_32_numbers(scale: float) -> None:
    weight = weights(scale=scale)
    expected = by_blocks(weight, 32, lambda largest: power_of_two(largest, 8), E4M3)
    assert torch.equal(quantize_dequantize(weight, "mxfp8"), expected)


def test_nvfp4_is_e2m1_with_an_e4m3_scale_for_16_numbers_and_one_for_the_tensor() -> None:
    weight = weights()
    whole = float(weight.abs().max()) / (448 * 6)

    def scale(largest: float) -> float:
        return nearest(max(largest / 6 / whole, E4M3[8]), E4M3) * whole

    expected = by_blocks(weight, 16, scale, E2M1)
    torch.testing.assert_close(quantize_dequantize(weight, "nvfp4"), expected, rtol=1e-6, atol=0)


def test_fp8_has_a_scale_a_row_and_fp8_block_one_for_128_by_128() -> None:
    weight = weights(200, 300)
    rows = by_blocks(weight, 300, lambda largest: largest / 448 or 1.0, E4M3)
    torch.testing.assert_close(quantize_dequantize(weight, "fp8"), rows, rtol=1e-6, atol=0)
    got = quantize_dequantize(weight, "fp8_block")
    for top in (0, 128):
        for left in (0, 128, 256):
            block = weight[top : top + 128, left : left + 128]
            scale = float(block.abs().max()) / 448
            expected = torch.tensor([[nearest(value / scale, E4M3) * scale for value in row] for row in block.tolist()])
            torch.testing.assert_close(got[top : top + 128, left : left + 128], expected, rtol=1e-6, atol=0)


def test_the_result_has_type_and_shape_of_the_weight_and_experts_are_apart() -> None:
    experts = torch.stack([weights(), 100 * weights()]).bfloat16()
    got = quantize_dequantize(experts, "nvfp4")
    assert got.dtype == torch.bfloat16 and got.shape == experts.shape
    assert torch.equal(got[0], quantize_dequantize(experts[0], "nvfp4"))
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_dequantize(torch.zeros(4, 48), "mxfp4")


def test_linear_layers_and_experts_are_narrow_and_nothing_else() -> None:
    dense = quantized_weights(tiny("qwen3"), "mxfp4")
    assert {name.split(".")[-2] for name in dense} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    sparse = quantized_weights(tiny("qwen3_moe"), "mxfp4")
    assert {name.rpartition("experts.")[2] for name in sparse if "mlp" in name} == {"gate_up_proj", "down_proj"}


def test_a_model_that_does_not_fit_the_blocks_is_refused_with_what_fits() -> None:
    odd = torch.nn.Sequential(torch.nn.Linear(48, 8))
    with pytest.raises(
        EngineError, match=r"multiple of 32 wide, but 0.weight has shape \(8, 48\).*fp8, fp8_block, nvfp4"
    ):
        quantized_weights(odd, "mxfp8")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("quantization", ["fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_an_engine_generates_with_rounded_weights_after_every_update(family: str, quantization) -> None:
    engine = TransformersEngine(tiny(family, 1), slots=2, stops=[], quantization=quantization)
    for version, seed in enumerate((2, 3)):
        model = tiny(family, seed)
        engine.pause()
        engine.update(stage(model), version)
        engine.resume()
        sample = run(engine, ask(version, prompt(9), temperature=1.0))[version, 0]
        exact = forward_logprobs(model, prompt(9), sample.tokens.tolist())
        with torch.no_grad():
            for parameter in quantized_weights(model, quantization).values():
                parameter.copy_(quantize_dequantize(parameter, quantization))
        rounded = forward_logprobs(model, prompt(9), sample.tokens.tolist())
        torch.testing.assert_close(torch.tensor(sample.logprobs), rounded, atol=1e-4, rtol=0)
        assert (rounded - exact).abs().max() > 1e-3
