"""How fast a policy trains, and in how much memory: figures of the machine, beside those of what was learnt.

Model FLOPs are counted as in Narayanan et al., "Efficient large-scale language model training on GPU clusters" (arXiv
2104.04473, section 5.1), and MFU is that of Chowdhery et al., "PaLM" (arXiv 2204.02311, appendix B): a weight costs a
token 2 FLOPs in forward and 4 in backward, a pair of query and key 4 x heads x head_dim and twice that; what gradient
checkpointing computes again does not count. Where their formulas are of equal sequences, this counts what is there:
the pairs that attention shows by the real lengths of rows (causal: half of a square), those experts' weights that a
token uses, the head where a distribution is asked for. A vision tower is not counted.

Invariant: what depends on the machine is known by its name (`of_the_machine`), and compared nowhere.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from services.policy.batch import Row

FORWARD, STEP = 1, 3
"""What passes cost, in forward passes: backward is two."""

TOKENS, FLOPS, PEAK = "machine/tokens", "machine/flops", "machine/peak_flops"
"""Sums over the members of a step, from which `rates` are made."""
MEMORY = "machine/peak_memory_bytes"

PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("GB200", 2500e12, 5000e12),
    ("B200", 2250e12, 4500e12),
    ("H200 NVL", 835e12, 1671e12),
    ("H200", 989e12, 1979e12),
    ("GH200", 989e12, 1979e12),
    ("H100 PCIe", 756e12, 1513e12),
    ("H100 NVL", 835e12, 1671e12),
    ("H100", 989e12, 1979e12),
    ("H800", 989e12, 1979e12),
    ("H20", 148e12, 296e12),
    ("A100", 312e12, None),
    ("A800", 312e12, None),
    ("L40S", 362e12, 733e12),
    ("L40", 181e12, 362e12),
    ("L4", 121e12, 242e12),
    ("A40", 149.7e12, None),
    ("A10G", 70e12, None),
    ("A10", 125e12, None),
    ("RTX A6000", 154.8e12, None),
    ("RTX 4090", 165.2e12, 330.3e12),
    ("RTX 3090", 71e12, None),
)
"""Dense FLOP/s of tensor cores in bfloat16 and in fp8, by a word of the device's name; from NVIDIA's data sheets."""


def of_the_machine(name: str) -> bool:
    """Whether a metric tells of the machine and its load, so that two equal steps may differ in it."""
    return name.startswith("machine/") or name.endswith("_seconds")


def work_of(
    rows: Sequence[Row], config: PretrainedConfig, passes: int, devices: int, peak: float | None
) -> dict[str, float]:
    """What a replica of so many devices has to do for these rows: `TOKENS`, `FLOPS`, and its devices' `PEAK`.

    Each row is computed so many times, counted in forward passes. Padding is no work. An unknown peak is NaN, and so is
    every sum with it.
    """
    tokens = sum(row.length for row in rows)
    return {
        TOKENS: float(tokens),
        FLOPS: float(passes * forward_flops(rows, config)),
        PEAK: devices * (peak or math.nan),
    }


def rates(work: dict[str, float], seconds: float) -> dict[str, float]:
    """`machine/tokens_per_s`, and `machine/mfu` where the peak of the devices is known, out of `work_of`'s sums."""
    found = {"machine/tokens_per_s": work[TOKENS] / seconds}
    if work[PEAK] > 0:
        found["machine/mfu"] = work[FLOPS] / (seconds * work[PEAK])
    return found


def forward_flops(rows: Sequence[Row], config: PretrainedConfig) -> int:
    """Model FLOPs of one forward pass over rows."""
    text: Any = config.get_text_config()
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    layers, width = int(text.num_hidden_layers), int(text.hidden_size)
    queries, keys = int(text.num_attention_heads) * head_dim, int(text.num_key_value_heads) * head_dim
    weights = 2 * width * (queries + keys) * layers + sum(_mlp_weights(text, layer) for layer in range(layers))
    tokens = sum(row.length for row in rows)
    asked = sum(len(response.tokens) for row in rows for response in row.responses)
    pairs = sum(_pairs(row) for row in rows)
    return 2 * tokens * weights + 4 * queries * layers * pairs + 2 * asked * width * int(text.vocab_size)


def _mlp_weights(text: Any, layer: int) -> int:
    """Weights that a token meets in a layer's MLP: the router's and those of its experts, or all."""
    width, experts = int(text.hidden_size), int(getattr(text, "num_experts", 0) or 0)
    sparse = (layer + 1) % int(getattr(text, "decoder_sparse_step", 1) or 1) == 0
    if not experts or not sparse or layer in (getattr(text, "mlp_only_layers", None) or ()):
        return 3 * width * int(text.intermediate_size)
    return 3 * width * int(text.moe_intermediate_size) * int(text.num_experts_per_tok) + width * experts


def _pairs(row: Row) -> int:
    """Pairs of a query and a key that it sees: the prompt's own, and each response's with the prompt and itself."""
    prompt = len(row.prompt)
    lengths = [len(response.tokens) for response in row.responses]
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense peak in that type; None where it is not known: on a CPU, or a GPU that is not listed."""
    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """The peak of a GPU by its name; None where the table has none."""
    for known, half, eighth in PEAKS:
        if re.search(rf"\b{known}\b", name):
            if dtype in (torch.bfloat16, torch.float16):
                return half
            return eighth if dtype.itemsize == 1 else None
    return None


def peak_memory(device: torch.device) -> float:
    """Most bytes so far: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":  # ru_maxrss begins with that of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return 1024.0 * int(found[1])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
