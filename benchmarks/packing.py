"""What packed micro-batches, log-probabilities by blocks of the vocabulary and gradient checkpointing bring.

`python -m benchmarks.packing`, or `make bench-packing`; one CPU thread. Writes `results/packing.{json,md}`.

- Tokens a second of a gradient computation over long-tailed lengths: rows packed in lines as the policy does, beside
  the same rows padded: B rows by the longest of them, longest first, B x S within the same limit, the Hugging Face
  model's own forward under a dense mask. In turns in one process; both compute the same loss, which is checked.
- Peak memory of the log-probabilities of a large vocabulary, forward and backward, beside whole logits; and that of a
  step with and without gradient checkpointing. Each in a process of its own; values and gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from services.policy.batch import Row, TrainSequence
from services.policy.layouts.compose import Layout
from services.policy.logprobs import token_logprobs
from services.policy.losses import sft_loss, token_weights
from services.policy.optimizer import Optimizer
from shared.config.schema import BuildTable, ModelTable, SftTable
from shared.models import load_model

PROMPT = 32
VOCABULARY = 512
"""Of the character tokenizer that built models have."""
TABLE = SftTable(dataset="none", batches=1, batch_size=1, lr=1.0)
LOSS_TOLERANCE = 1e-6
"""Relative. Gradients may differ by a hundred times as much: they are sums in another order."""


def make_rows(count: int, median: float, sigma: float, longest: int, seed: int) -> list[Row]:
    """Prompts of one length with a response each, whose lengths are lognormal as those of reasoning traces are."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(math.log(median), sigma, count), 1, longest - PROMPT).astype(int)
    rows = []
    for group, length in enumerate(lengths):
        prompt, tokens = (draw.integers(0, VOCABULARY, size=n).astype(np.int32) for n in (PROMPT, int(length)))
        sample = TrainSequence(group, 1, 0, prompt, tokens, np.zeros(int(length), np.float32), 1.0, 1.0)
        rows.append(Row((sample,)))
    return rows


def make_model(hidden: int, layers: int, context: int) -> PreTrainedModel:
    """A Qwen3 in float32 with random weights, the same ones each time."""
    build = BuildTable(
        hidden_size=hidden, intermediate_size=3 * hidden, layers=layers, heads=hidden // 32, kv_heads=hidden // 64,
        context=context,
    )  # fmt: skip
    return load_model(ModelTable(build=build), 0, weights=True).eval()


# --- lengths: packed beside padded ------------------------------------------------------------------------------------


class Packed:
    """Gradients as the policy computes them."""

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool = False) -> None:
        self.layout = Layout(model, checkpointing=checkpointing)
        self.optimizer = Optimizer(self.layout.parameters().items(), TABLE)

    def gradients(self, rows: Sequence[Row], limit: int) -> tuple[float, int]:
        """The mean loss of a token, and the tokens that the model computed; gradients are in hand afterwards."""
        self.optimizer.clear()
        tokens = sum(len(s.tokens) for row in rows for s in row.responses)
        micros = self.layout.micro_batches(rows, limit)
        total = 0.0

        def loss(index: int, found: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal total
            weights = token_weights(micros[index].lengths, "token_mean", tokens=tokens, sequences=len(rows))
            result = sft_loss(*found, weights, tokens=tokens)
            total += float(result.loss.detach())
            return result.loss

        self.layout.train(micros, loss, self.optimizer.collect)
        return total, sum(micro.size for micro in micros)

    def norm(self) -> float:
        """Of the gradients in hand."""
        return float(self.layout.norm(self.optimizer.gradients()))


class Padded:
    """The same by padded micro-batches and the model's own forward, log_softmax and backward."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def gradients(self, rows: Sequence[Row], limit: int) -> tuple[float, int]:
        """As those of `Packed`; the tokens are those with padding."""
        self.model.zero_grad()
        tokens = sum(len(s.tokens) for row in rows for s in row.responses)
        total, computed = 0.0, 0
        for members in _padded(rows, limit):
            size = members[0].length
            inputs = torch.zeros(len(members), size, dtype=torch.int64)
            seen, scored = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
            for index, row in enumerate(members):
                line = np.concatenate([row.prompt, row.responses[0].tokens])
                inputs[index, : len(line)] = torch.from_numpy(line)
                seen[index, : len(line)] = 1
                scored[index, len(row.prompt) : len(line)] = True
            hidden = self.model.model(input_ids=inputs, attention_mask=seen, use_cache=False).last_hidden_state
            # a place says what comes after it; logits of the responses alone, as the policy's are
            logits = self.model.lm_head(hidden[:, :-1][scored[:, 1:]])
            logprobs = torch.log_softmax(logits, -1)
            loss = -logprobs.gather(-1, inputs[scored][:, None]).sum() / tokens
            loss.backward()
            total += float(loss.detach())
            computed += inputs.numel()
        return total, computed

    def norm(self) -> float:
        """Of the gradients on the parameters."""
        norms = [torch.linalg.vector_norm(p.grad) for p in self.model.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms)))


def _padded(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """Rows longest first, as many in a micro-batch as keep B x S within the limit, but one at least."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batches and batches[-1][0].length * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def measure_lengths(given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns on the same rows."""
    rows = make_rows(given.rows, given.median, given.sigma, given.longest, given.seed)
    model, other = (make_model(given.hidden, given.layers, given.longest) for _ in range(2))
    ways: dict[str, Packed | Padded] = {"packed": Packed(model), "padded": Padded(other)}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, dict[str, Any]] = {}
    for attempt in range(given.rounds + 1):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            loss, computed = way.gradients(rows, given.limit)
            took, used = time.perf_counter() - started, time.process_time() - used
            if attempt:  # the first of each warms up
                wall[name].append(took)
                cpu[name].append(used)
            else:
                found[name] = {"loss": loss, "grad_norm": way.norm(), "computed_tokens": computed}
    expect_equal("loss", found["packed"]["loss"], found["padded"]["loss"], LOSS_TOLERANCE)
    expect_equal("norm", found["packed"]["grad_norm"], found["padded"]["grad_norm"], 100 * LOSS_TOLERANCE)
    lengths = [row.length for row in rows]
    tokens = sum(lengths)
    for name in ways:
        seconds = statistics.median(wall[name])
        found[name] |= {"seconds": round(seconds, 3), "cpu_seconds": round(statistics.median(cpu[name]), 3)}
        found[name]["tokens_per_second"] = round(tokens / seconds)
    return {
        "rows": given.rows, "tokens": tokens, "limit": given.limit, "hidden": given.hidden, "layers": given.layers,
        "rounds": given.rounds, "lognormal": [given.median, given.sigma, given.longest],
        "lengths": [int(q) for q in np.quantile(lengths, [0.1, 0.5, 0.9, 1.0])],
        **{f"{clock}ratio": ratios(times) for clock, times in (("", wall), ("cpu_", cpu))},
        **found,
    }  # fmt: skip


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long the padded way took, round by round: median and middle half."""
    each = [padded / packed for packed, padded in zip(times["packed"], times["padded"], strict=True)]
    low, middle, high = statistics.quantiles(each, n=4)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def expect_equal(what: str, one: float, other: float, tolerance: float) -> None:
    """AssertionError where two numbers are farther apart than `tolerance`, relatively."""
    if abs(one - other) > tolerance * abs(other):
        raise AssertionError(f"{what}: expected both ways to give the same to {tolerance}, got {one} and {other}")


# --- memory: a process for each way -----------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status; this benchmark wants Linux")


def watched(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` gives, by how many bytes it raised this process's memory at its peak, and its CPU seconds."""
    before, used = resident("VmRSS"), time.process_time()
    found = work()
    return found, {"bytes": resident("VmHWM") - before, "cpu_seconds": round(time.process_time() - used, 3)}


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as one writes them down."""
    logprobs = torch.log_softmax(hidden @ weight.T, -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def run_logprobs(way: str, given: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Forward and backward of one way to log-probabilities."""
    score = token_logprobs if way == "blocks" else whole_logits
    few = torch.zeros(2, 2, requires_grad=True)
    score(few, few, torch.zeros(2, dtype=torch.int64))[0].sum().backward()  # what torch loads once
    torch.manual_seed(0)
    hidden = torch.empty(given.tokens, given.width).normal_().requires_grad_()
    weight = torch.empty(given.vocabulary, given.width).normal_(std=given.width**-0.5).requires_grad_()
    targets = torch.randint(given.vocabulary, (given.tokens,))

    def work() -> tuple[Tensor, Tensor]:
        logprobs, entropy = score(hidden, weight, targets)
        logprobs.mean().backward()
        return logprobs.detach(), entropy

    (logprobs, entropy), cost = watched(work)
    assert hidden.grad is not None and weight.grad is not None
    return {"logprobs": logprobs, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}, cost


def run_checkpointing(way: str, given: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of long rows, keeping what layers computed or computing it again."""
    rows = make_rows(given.long_rows, given.longest_row, 0.0, given.longest_row, given.seed)
    model = make_model(given.hidden, given.deep, given.longest_row)
    packed = Packed(model, checkpointing=way == "checkpointed")
    packed.gradients(make_rows(1, 8, 0.0, given.longest_row, given.seed), given.longest_row)  # what torch loads once
    packed.optimizer.clear()
    (loss, _), cost = watched(lambda: packed.gradients(rows, given.long_rows * given.longest_row))
    return {"loss": torch.tensor(loss), **packed.optimizer.gradients()}, cost


MAPPED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Has glibc give large tensors back to the system when they go; its heap of many sizes keeps gaps otherwise."""
WAYS = {"logprobs": ("blocks", "logits"), "checkpointing": ("checkpointed", "kept")}
RUNS = {"logprobs": run_logprobs, "checkpointing": run_checkpointing}


def measure_memory(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways of a part, each in a process of its own; their results are equal."""
    costs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[part]}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.memory_rounds):
            for way in WAYS[part]:
                command = [sys.executable, "-m", "benchmarks.packing", *sys.argv[1:], "--child", part, way, folder]
                plain, mapped = (_child(command, setting) for setting in ({}, MAPPED))
                costs[way].append({**plain, "mapped_bytes": mapped["bytes"]})
        one, other = (torch.load(Path(folder) / way, weights_only=True) for way in WAYS[part])
    apart = 0.0
    for name in other:
        scale = float(other[name].abs().max()) or 1.0
        apart = max(apart, float((one[name] - other[name]).abs().max()) / scale)
    expect_equal(part, 1.0 + apart, 1.0, 100 * LOSS_TOLERANCE)
    medians = {way: {k: statistics.median(c[k] for c in each) for k in each[0]} for way, each in costs.items()}
    new, old = (medians[way] for way in WAYS[part])
    ratio = {name: round(new[name] / old[name], 3) for name in new}
    return {**medians, "share": ratio, "largest_difference": apart, "rounds": given.memory_rounds}


def _child(command: list[str], setting: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **setting}, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- the report -------------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any]) -> str:
    """Three short tables, with what was compared."""
    mix, logprobs, kept = result["lengths"], result["logprobs"], result["checkpointing"]
    ten, middle, ninety, longest = mix["lengths"]
    ratio, cpu, given = mix["ratio"], mix["cpu_ratio"], result["given"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. One thread, float32.",
        "",
        f"Gradients of {mix['rows']} rows of long-tailed lengths (lognormal; 10 % are below {ten} tokens, half below "
        f"{middle}, 90 % below {ninety}, the longest has {longest}), {mix['tokens']} tokens, a Qwen3 of "
        f"{mix['layers']} layers x {mix['hidden']}, micro-batches of at most {mix['limit']} tokens; medians of "
        f"{mix['rounds']} rounds in turns. Both give the same loss.",
        "",
        "| micro-batches | tokens/s | s | CPU s | tokens computed | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("packed", "padded"):
        way = mix[name]
        lines.append(
            f"| {name} | {way['tokens_per_second']} | {way['seconds']} | {way['cpu_seconds']} | "
            f"{way['computed_tokens']} | {way['loss']:.7f} |"
        )
    lines += [
        "",
        f"Ratio: **{ratio['median']:.2f}** (middle half: {ratio['low']:.2f} to {ratio['high']:.2f}); of CPU time "
        f"{cpu['median']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}).",
        "",
        "Memory at the peak above that before, each way in a process of its own: as it is, and with large tensors "
        "given back to the system at once (`MALLOC_MMAP_THRESHOLD_`), which is what the tensors take; and CPU time:",
        "",
        "| | MB | MB of tensors | CPU s |",
        "|---|---|---|---|",
    ]
    what = f"{given['tokens']} log-probs of {given['vocabulary']}, hidden {given['width']}"
    deep = f"{given['deep']} layers, {given['long_rows']} x {given['longest_row']} tokens"
    for title, cost in (
        (f"{what}: by blocks", logprobs["blocks"]),
        (f"{what}: whole logits", logprobs["logits"]),
        (f"{deep}: with checkpointing", kept["checkpointed"]),
        (f"{deep}: without", kept["kept"]),
    ):
        lines.append(
            f"| {title} | {cost['bytes'] / 1e6:.0f} | {cost['mapped_bytes'] / 1e6:.0f} | {cost['cpu_seconds']:.2f} |"
        )
    blocks, again = logprobs["share"], kept["share"]
    lines += [
        "",
        f"Log-probs by blocks take **{blocks['bytes']:.0%}** of the memory ({blocks['mapped_bytes']:.0%} of that of "
        f"tensors) and {blocks['cpu_seconds']:.0%} of the time; checkpointing **{again['bytes']:.0%}** "
        f"({again['mapped_bytes']:.0%}) and {again['cpu_seconds']:.0%}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write; or, as a child, one way of one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--median", type=float, default=150.0, help="tokens of the middle response")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of a response's length")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a row at most")
    parser.add_argument("--limit", type=int, default=16384, help="tokens of a micro-batch, the recipes' default")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--deep", type=int, default=12, help="layers of the model with checkpointing")
    parser.add_argument("--long-rows", type=int, default=2)
    parser.add_argument("--longest-row", type=int, default=4096)
    parser.add_argument("--child", nargs=3, metavar=("PART", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.child:
        part, way, folder = given.child
        found, cost = RUNS[part](way, given)
        torch.save(found, Path(folder) / way)
        print(json.dumps(cost))
        return
    settings = {name: value for name, value in vars(given).items() if name != "child"}
    result = {
        "machine": describe_machine(),
        "given": settings,
        "lengths": measure_lengths(given),
        **{part: measure_memory(part, given) for part in WAYS},
        "load_average": load_average(),
    }
    write_results(RESULTS, "packing", result, as_markdown(result))


if __name__ == "__main__":
    main()
