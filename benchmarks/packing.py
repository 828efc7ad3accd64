"""Packed micro-batches beside padded ones, and log-probabilities with and without logits of the whole vocabulary.

    python -m benchmarks.packing [--rounds 9]       or: make bench-packing

First: gradients of the same rows, whose lengths are long-tailed as those of reasoning traces are, by the policy's
layout (packed) and by a plain loop over micro-batches that are padded to their longest row, as trainers without packing
make them; the same limit of tokens, in turns, losses equal to 1e-6. Second: what forward and backward of
log-probabilities at a vocabulary of 150,000 add to a process's peak memory, by blocks and from whole logits, in a
process each. Third: the same of a training step with and without gradient checkpointing. Writes
`results/packing.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from services.policy.batch import Row, TrainSequence
from services.policy.layouts.compose import Layout
from services.policy.logprobs import token_logprobs

VOCABULARY = 512
LIMIT = 4096
"""Tokens of a micro-batch."""
ROWS = 64
PROMPT = 16
LONGEST = 1500
WIDE = 150_000
TOKENS, HIDDEN = 1024, 512
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(**changes: Any) -> Qwen3ForCausalLM:
    """A small model in float32 from a seed."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **changes}, attn_implementation="sdpa")).eval()


def make_rows(count: int, seed: int = 1) -> list[Row]:
    """Rows of one response each: lengths lognormal with a median of 120 tokens, at most LONGEST."""
    draw = np.random.default_rng(seed)
    found = []
    for group in range(count):
        length = int(np.clip(draw.lognormal(np.log(120), 1.0), 8, LONGEST))
        prompt, tokens = (draw.integers(0, VOCABULARY, size).astype(np.int32) for size in (PROMPT, length))
        found.append(Row((TrainSequence(group, 1, 0, prompt, tokens, np.zeros(length, np.float32), 1.0, 1.0),)))
    return found


def packed(layout: Layout, rows: list[Row]) -> float:
    """The mean negative log-likelihood; gradients are on the parameters."""
    total = sum(len(row.responses[0].tokens) for row in rows)
    micros = layout.micro_batches(rows, LIMIT)
    losses = []

    def loss(_index: int, found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        losses.append(-found[0].sum() / total)
        return losses[-1]

    layout.train(micros, loss, lambda: None)
    return float(sum(loss.detach() for loss in losses))


def padded(model: Qwen3ForCausalLM, rows: list[Row]) -> float:
    """The same with each row padded to the longest of its micro-batch, which are filled in the order of the rows."""
    total = sum(len(row.responses[0].tokens) for row in rows)
    found = 0.0
    for batch in padded_batches(rows):
        size = max(row.length for row in batch)
        inputs = torch.zeros(len(batch), size, dtype=torch.int64)
        mask, labels = torch.zeros_like(inputs), torch.full_like(inputs, -100)
        for index, row in enumerate(batch):
            sequence = np.concatenate([row.prompt, row.responses[0].tokens])
            inputs[index, : row.length], mask[index, : row.length] = torch.from_numpy(sequence), 1
            labels[index, PROMPT : row.length] = inputs[index, PROMPT : row.length]
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / total
        loss.backward()
        found += float(loss)
    return found


def padded_batches(rows: list[Row]) -> list[list[Row]]:
    """Micro-batches of which rows x longest stays within LIMIT."""
    batches: list[list[Row]] = []
    for row in rows:
        longest = max([row.length, *(other.length for other in batches[-1])]) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > LIMIT:
            batches.append([])
        batches[-1].append(row)
    return batches


def compare_packing(rounds: int) -> dict[str, Any]:
    """Tokens a second of the three ways in turns; the losses agree."""
    torch.set_num_threads(1)
    model, other = make_model(), make_model()
    layout = Layout(model)
    rows = make_rows(ROWS)
    in_order, longest_first = rows, sorted(rows, key=lambda row: -row.length)
    ways: dict[str, Callable[[], float]] = {
        "packed": lambda: packed(layout, rows),
        "padded, in the order they come": lambda: padded(other, in_order),
        "padded, longest first": lambda: padded(other, longest_first),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for attempt in range(rounds + 1):
        for name, way in ways.items():
            model.zero_grad()
            other.zero_grad()
            started = time.perf_counter()
            losses[name] = way()
            if attempt:  # the first of each warms up
                seconds[name].append(time.perf_counter() - started)
    apart = max(abs(loss - losses["packed"]) / losses["packed"] for loss in losses.values())
    assert apart <= 1e-6, losses
    tokens = sum(row.length for row in rows)
    computed = {
        "packed": tokens,
        "padded, in the order they come": _computed(in_order),
        "padded, longest first": _computed(longest_first),
    }
    result: dict[str, Any] = {"rows": ROWS, "tokens": tokens, "limit": LIMIT, "losses_apart": apart, "ways": {}}
    for name, took in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(seconds["packed"], took, strict=True)]
        result["ways"][name] = {
            "tokens_per_s": round(tokens / statistics.median(took)),
            "computed": computed[name],
            "ratio": round(statistics.median(ratios), 2),
            "quarters": [round(ratio, 2) for ratio in statistics.quantiles(ratios, n=4)],
        }
    return result


def _computed(rows: list[Row]) -> int:
    return sum(len(batch) * max(row.length for row in batch) for batch in padded_batches(rows))


# --- memory: each in a process of its own -----------------------------------------------------------------------------


def logprobs_memory(how: str) -> dict[str, float]:
    """Forward and backward of the log-probabilities of TOKENS tokens; what they add to the peak, and what came out."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).requires_grad_()
    weight = (torch.randn(WIDE, HIDDEN, generator=draw) * 0.05).requires_grad_()
    targets = torch.randint(WIDE, (TOKENS,), generator=draw)
    before, started = _memory_mb(reset=True), time.perf_counter()
    if how == "blocks":
        logprobs, entropy = token_logprobs(hidden, weight, targets)
    else:
        whole = torch.log_softmax(hidden @ weight.T, -1)
        logprobs = whole.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(whole.detach().exp() * whole.detach()).sum(-1)
    (-logprobs.mean()).backward()
    seconds = time.perf_counter() - started
    assert hidden.grad is not None and weight.grad is not None
    return {
        "mb": _memory_mb() - before, "seconds": seconds,
        "loss": float(-logprobs.mean()), "entropy": float(entropy.mean()),
        "hidden": float(hidden.grad.norm()), "weight": float(weight.grad.norm()),
    }  # fmt: skip


def step_memory(how: str) -> dict[str, float]:
    """A gradient computation of a deeper model over a long line, with or without gradient checkpointing."""
    torch.set_num_threads(1)
    layout = Layout(make_model(num_hidden_layers=12), checkpointing=how == "checkpointing")
    rows = make_rows(12, seed=2)
    before, started = _memory_mb(reset=True), time.perf_counter()
    loss = packed(layout, rows)
    return {"mb": _memory_mb() - before, "seconds": time.perf_counter() - started, "loss": loss}


def _memory_mb(*, reset: bool = False) -> float:
    """The most memory that this process had since the last reset; with one, what it has now (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): forget the peak
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024


def apart(what: str, how: str) -> dict[str, float]:
    """One of the above in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.packing", "--measure", what, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare_memory() -> dict[str, Any]:
    """Both comparisons; what came out is the same."""
    found = {
        what: {how: apart(what, how) for how in hows}
        for what, hows in (("logprobs", ("blocks", "whole")), ("step", ("checkpointing", "plain")))
    }
    for one, other in (found["logprobs"].values(), found["step"].values()):
        for name in one.keys() - {"mb", "seconds"}:
            assert abs(one[name] - other[name]) <= 1e-4 * abs(other[name]), (name, one, other)
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The tables, with what was compared."""
    speed, memory = result["packing"], result["memory"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. One thread.",
        "",
        f"{speed['rows']} rows of {PROMPT} prompt tokens and lognormal responses (median 120, at most {LONGEST}), "
        f"{speed['tokens']} tokens in all, micro-batches of at most {speed['limit']}; a Qwen3 of 4 layers, 256 wide; "
        f"{result['rounds']} rounds in turns. Losses differ by at most {speed['losses_apart']:.0e}.",
        "",
        "| | tokens/s | tokens computed | packed is faster by |",
        "|---|---|---|---|",
    ]
    for name, way in speed["ways"].items():
        low, _, high = way["quarters"]
        faster = "" if name == "packed" else f"**{way['ratio']:.2f}** (middle half {low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {way['tokens_per_s']} | {way['computed']} | {faster} |")
    lines += [
        "",
        f"Peak memory that forward and backward add, a process each: log-probabilities of {TOKENS} tokens, {HIDDEN} "
        f"wide, vocabulary {WIDE}; a gradient computation of 12 layers.",
        "",
        "| | MB | s |",
        "|---|---|---|",
    ]
    names = {
        ("logprobs", "blocks"): "log-probabilities by blocks of the vocabulary",
        ("logprobs", "whole"): "from whole logits",
        ("step", "checkpointing"): "a step with gradient checkpointing",
        ("step", "plain"): "without",
    }
    for (what, how), name in names.items():
        lines.append(f"| {name} | {memory[what][how]['mb']:.0f} | {memory[what][how]['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        what, how = given.measure
        print(json.dumps((logprobs_memory if what == "logprobs" else step_memory)(how)))
        return
    result = {
        "machine": describe_machine(),
        "rounds": given.rounds,
        "packing": compare_packing(given.rounds),
        "memory": compare_memory(),
        "load_average": load_average(),
    }
    write_results(RESULTS, "packing", result, as_markdown(result))


if __name__ == "__main__":
    main()
