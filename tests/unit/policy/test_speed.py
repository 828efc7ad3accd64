"""The machine's figures: FLOPs as torch counts them, peaks by name, and what the trainer reports of a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.policy.batch import Row, TrainSequence
from services.policy.packing import pack
from services.policy.speed import (
    FLOPS,
    MEMORY,
    PEAK,
    TOKENS,
    forward_flops,
    of_the_machine,
    peak_flops,
    peak_memory,
    peak_of,
    rates,
    work_of,
)

MATRICES = {"aten.mm", "aten.addmm", "aten.bmm", "aten._grouped_mm"}
CPU = torch.device("cpu")


def grouped(tokens: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    """Experts' matrices [experts, k, n], of which each token [k] meets one: torch's counter does not know them."""
    return 2 * math.prod(tokens) * weights[-1]


def row(prompt: int, *responses: int) -> Row:
    tokens = np.ones(prompt, dtype=np.int32)
    return Row(
        tuple(
            TrainSequence(1, 1, index, tokens, np.full(n, 9, np.int32), np.zeros(n, np.float32), 1.0, 1.0)
            for index, n in enumerate(responses)
        )
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_weights_cost_what_torch_counts_on_a_real_forward_pass(tools: Any, family: str) -> None:
    trainer = tools.trainer(tools.recipe(family))
    rows = [row(5, 7, 3), row(4, 6)]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        trainer.layout.predict([pack(rows)])
    counted = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if str(operator) in MATRICES)
    text = trainer.model.config
    pairs = sum(count_pairs(each) for each in rows)
    attention = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * pairs
    assert forward_flops(rows, text) - attention == counted


def count_pairs(each: Row) -> int:
    """By the mask, place by place."""
    micro = pack([each])
    seen = (micro.parts[:, None] == micro.parts) | (micro.parts == 0)
    return int(seen.tril().sum())


@pytest.mark.parametrize("responses", [(7, 3), (1,), (2, 2, 2)])
def test_a_longer_prompt_costs_its_weights_and_the_pairs_that_the_mask_shows(
    tools: Any, responses: tuple[int, ...]
) -> None:
    text = tools.trainer(tools.recipe()).model.config
    pair = 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    two, one, none = (row(prompt, *responses) for prompt in (9, 8, 1))
    token = forward_flops([two], text) - forward_flops([one], text) - pair * (count_pairs(two) - count_pairs(one))
    apart = forward_flops([two], text) - forward_flops([none], text)
    assert apart == 8 * token + pair * (count_pairs(two) - count_pairs(none))


def test_rates_are_over_the_time_and_the_devices(tools: Any) -> None:
    text = tools.trainer(tools.recipe()).model.config
    rows = [row(5, 7, 3)]
    work = work_of(rows, text, passes=3, devices=4, peak=1e9)
    assert work == {TOKENS: 15.0, FLOPS: 3.0 * forward_flops(rows, text), PEAK: 4e9}
    assert rates(work, 0.5) == {"machine/tokens_per_s": 30.0, "machine/mfu": work[FLOPS] / 2e9}


def test_one_device_whose_peak_is_not_known_leaves_mfu_out(tools: Any) -> None:
    text = tools.trainer(tools.recipe()).model.config
    known, unknown = (work_of([row(5, 7)], text, 3, 1, peak) for peak in (1e9, None))
    both = {name: known[name] + unknown[name] for name in known}
    assert math.isnan(both[PEAK]) and rates(both, 1.0) == {"machine/tokens_per_s": 24.0}


@pytest.mark.parametrize(
    ("name", "half", "eighth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA H20", 148e12, 296e12),
        ("NVIDIA GH200 480GB", 989e12, 1979e12),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA A10", 125e12, None),
        ("NVIDIA A10G", 70e12, None),
        ("NVIDIA L40S", 362e12, 733e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 330.3e12),
        ("Somebody's GPU", None, None),
    ],
)
def test_peaks_go_by_the_devices_name_and_the_type(name: str, half: float | None, eighth: float | None) -> None:
    assert peak_of(name, torch.bfloat16) == peak_of(name, torch.float16) == half
    assert peak_of(name, torch.float8_e4m3fn) == eighth
    assert peak_of(name, torch.float32) is None


def test_a_processors_peak_is_not_known() -> None:
    assert peak_flops(CPU, torch.bfloat16) is None


def test_peak_memory_is_what_the_process_had_at_most() -> None:
    before = peak_memory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    during = peak_memory(CPU)
    del held
    after = peak_memory(CPU)
    assert during >= 64 << 20
    assert min(during / before, after / during) > 0.99, "it only rises, but for what the kernel has not counted yet"


def test_the_trainer_reports_the_tokens_of_its_rows_and_no_mfu_where_no_peak_is_known(tools: Any) -> None:
    recipe = tools.recipe()
    trainer = tools.trainer(recipe)
    step, frames = tools.step(recipe, stage="sft", samples=1)
    metrics = trainer.compute(step, frames).metrics
    tokens = step.tokens + sum(group.prompt_length for group in step.groups)
    assert metrics["machine/tokens_per_s"] * metrics["train_seconds"] == pytest.approx(tokens)
    assert metrics[MEMORY] > 0
    assert {name for name in metrics if of_the_machine(name)} == {"machine/tokens_per_s", MEMORY, "train_seconds"}


def test_passes_of_the_reference_count_and_a_known_peak_gives_mfu(tools: Any) -> None:
    done = []
    for kl_weight in (0.0, 0.1):
        recipe = tools.recipe(train__kl_weight=kl_weight)
        trainer = tools.trainer(recipe)
        trainer._peak = 1e12
        metrics = trainer.compute(*tools.step(recipe)).metrics
        done.append(metrics["machine/mfu"] * metrics["train_seconds"])
    assert done[1] == pytest.approx(done[0] * 4 / 3)
