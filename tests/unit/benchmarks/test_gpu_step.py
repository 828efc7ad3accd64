"""The arithmetic behind MFU, against counts by hand; the step itself runs on a CPU too."""

from __future__ import annotations

import argparse

import pytest
import torch
from transformers import Qwen3Config

from benchmarks import gpu_step


def test_flops_are_six_a_weight_and_token_and_causal_attention() -> None:
    config = Qwen3Config(num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    assert gpu_step.flops_of(config, 1000, [10]) == 6 * 1000 * 10 + 12 * 2 * 4 * 8 * 10 * 10 / 2
    assert gpu_step.flops_of(config, 1000, [10, 10]) == 2 * gpu_step.flops_of(config, 1000, [10])


def test_the_peak_goes_by_the_devices_name() -> None:
    assert gpu_step.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_step.peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert gpu_step.peak_of("CPU") is None


def test_qwen3_0_6b_has_as_many_weights_as_its_name_says() -> None:
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(Qwen3Config(**gpu_step.SHAPE))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert whole == pytest.approx(0.596e9, rel=0.01)
    assert gpu_step.matrices_of(model) == pytest.approx(whole, rel=0.001)


def test_a_small_step_runs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_step, "SHAPE", gpu_step.SHAPE | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    )
    given = argparse.Namespace(
        device="cpu", layers=2, rows=2, length=gpu_step.PROMPT + 16, micro_batch_tokens=128, steps=3,
        checkpointing=False,
    )  # fmt: skip
    result = gpu_step.measure(given)
    assert result["last_loss"] <= result["first_loss"]
    table = gpu_step.as_markdown(result)
    assert "| peak unknown | - |" in table
    assert f"{result['parameters']:,} weights" in table
