"""A training step of a Qwen3-0.6B-shaped model in bfloat16 on one GPU: tokens a second, MFU, peak memory.

`python -m benchmarks.gpu_step`, part of `make gpu-check`. Writes `results/gpu_step_DEVICE.{json,md}`. Random weights,
random tokens, no download: the step is the policy's own (packed micro-batches, log-probs by blocks of the vocabulary,
SFT loss, float32 masters and AdamW). `--device cpu --layers 1 --rows 2 --length 96 --steps 2` shows without a GPU that
it runs; its figures mean nothing there, and are written only where `--out` says so.

MFU counts what the model's arithmetic needs, not what recomputing adds: 6 FLOPs a token for each weight of a matrix
(embedding rows are looked up, the head is a matrix), and 12 x layers x heads x head_dim x (length / 2) for causal
attention; over the device's peak of dense bfloat16.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

from benchmarks.machine import RESULTS, describe_machine, write_results
from services.policy.batch import Row, TrainSequence
from services.policy.layouts.compose import Layout
from services.policy.losses import sft_loss, token_weights
from services.policy.optimizer import Optimizer
from shared.config.schema import SftTable
from shared.models.build import build_model

PROMPT = 64
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16, of the vendors' data sheets, by a part of the device's name."""
SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "rope_theta": 1e6,
}  # fmt: skip
"""Of Qwen/Qwen3-0.6B's config.json."""


def peak_of(device: str) -> float | None:
    """FLOPs a second that a device of this name has at most; None for one that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def flops_of(config: Qwen3Config, matrices: int, lengths: list[int]) -> float:
    """What forward and backward of rows of these lengths need; `matrices` are the weights that tokens multiply with."""
    wide = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return float(sum(6 * matrices * length + 12 * wide * length * length / 2 for length in lengths))


def matrices_of(model: PreTrainedModel) -> int:
    """Weights of matrices; a tied embedding counts once, as the head."""
    tied = model.config.tie_word_embeddings
    names = {name: p for name, p in model.named_parameters() if p.ndim == 2 and (tied or "embed" not in name)}
    return sum(parameter.numel() for parameter in names.values())


def rows_of(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of one length with random tokens."""
    draw = np.random.default_rng(0)
    rows = []
    for group in range(count):
        prompt, tokens = (draw.integers(0, vocabulary, n).astype(np.int32) for n in (PROMPT, length - PROMPT))
        rows.append(Row((TrainSequence(group, 1, 0, prompt, tokens, np.zeros(len(tokens), np.float32), 1.0, 1.0),)))
    return rows


class Step:
    """One optimizer step, over and over on the same rows."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = torch.device(given.device)
        self.config = Qwen3Config(**SHAPE | {"num_hidden_layers": given.layers})
        model = build_model(self.config, 0, torch.bfloat16, "sdpa")
        self.matrices = matrices_of(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.layout = Layout(model, checkpointing=given.checkpointing, device=self.device)
        table = SftTable(dataset="none", batches=1, batch_size=1, lr=1e-6)
        self.optimizer = Optimizer(self.layout.parameters().items(), table)
        self.rows = rows_of(given.rows, given.length, self.config.vocab_size)
        self.limit = given.micro_batch_tokens

    def run(self) -> float:
        """The mean loss of a token; what was begun on the device has ended."""
        self.optimizer.clear()
        tokens = sum(len(sample.tokens) for row in self.rows for sample in row.responses)
        micros = [micro.to(self.device) for micro in self.layout.micro_batches(self.rows, self.limit)]
        total = torch.zeros((), device=self.device)

        def loss(index: int, found: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal total
            weights = token_weights(micros[index].lengths, "token_mean", tokens=tokens, sequences=len(self.rows))
            result = sft_loss(*found, weights, tokens=tokens)
            total = total + result.loss.detach()
            return result.loss

        self.layout.train(micros, loss, self.optimizer.collect)
        self.optimizer.clip(self.layout.norm(self.optimizer.gradients()), 1.0)
        self.optimizer.step(1e-6, 0.0)
        return float(total)  # waits for the device


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A first step that warms up, then some that count."""
    step = Step(given)
    losses, seconds = [step.run()], []
    on_gpu = step.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(given.steps):
        began = time.perf_counter()
        losses.append(step.run())
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if not losses[-1] < losses[0]:
        raise AssertionError(f"expected the loss to fall over {given.steps} steps on the same rows, got {losses}")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    lengths = [row.length for row in step.rows]
    middle, peak = statistics.median(seconds), peak_of(name)
    flops = flops_of(step.config, step.matrices, lengths)
    return {
        "device": name, "machine": describe_machine(), "torch": torch.__version__, "layers": given.layers,
        "parameters": step.parameters, "rows": given.rows, "length": given.length,
        "micro_batch_tokens": given.micro_batch_tokens, "checkpointing": given.checkpointing, "steps": given.steps,
        "seconds": round(middle, 4), "slowest": round(max(seconds), 4), "fastest": round(min(seconds), 4),
        "tokens_per_second": round(sum(lengths) / middle),
        "mfu": round(flops / middle / peak, 4) if peak is not None else None,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4),
    }  # fmt: skip


def as_markdown(result: dict[str, Any]) -> str:
    """What was run, and a table of one line."""
    mfu = f"{result['mfu']:.1%}" if result["mfu"] is not None else "peak unknown"
    memory = f"{result['peak_gb']:.2f}" if result["peak_gb"] is not None else "-"
    layers = "Qwen3-0.6B's shape" if result["layers"] == SHAPE["num_hidden_layers"] else f"{result['layers']} layers"
    kept = "computed again in backward" if result["checkpointing"] else "kept"
    return "\n".join(
        [
            f"Device: {result['device']}. Machine: {result['machine']}, torch {result['torch']}.",
            "",
            f"{layers}, {result['parameters']:,} weights in bfloat16 with float32 masters and moments, random tokens: "
            f"{result['rows']} rows of {result['length']} tokens a step, micro-batches of at most "
            f"{result['micro_batch_tokens']}, activations {kept}; median of {result['steps']} steps "
            f"({result['fastest']} to {result['slowest']} s) after one. The loss fell from {result['first_loss']} to "
            f"{result['last_loss']}.",
            "",
            "| s a step | tokens/s | MFU | peak GB |",
            "|---|---|---|---|",
            f"| {result['seconds']} | {result['tokens_per_second']:,} | {mfu} | {memory} |",
            "",
        ]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results, on a GPU)")
    given = parser.parse_args()
    result = measure(given)
    folder = given.out or (RESULTS if given.device.startswith("cuda") else None)
    if folder is None:
        print(as_markdown(result))
        return
    name = re.sub(r"[^a-z0-9]+", "_", result["device"].lower()).strip("_")
    write_results(folder, f"gpu_step_{name}", result, as_markdown(result))


if __name__ == "__main__":
    main()
