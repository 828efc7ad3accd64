"""One process that takes its rank's part in every cell whose layout has that rank.

    python -m benchmarks.parallel_table.rank FOLDER RANK FAMILY LAYOUT [FAMILY LAYOUT ...]

Every rank leaves its part of the gradients in FOLDER; rank 0 compares them with one process, and leaves a verdict for
each cell, FAMILY-LAYOUT.json.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.parallel_table.cells import Cell
from benchmarks.parallel_table.families import rows, tiny
from services.policy.layouts.compose import Layout
from services.policy.layouts.grid import Grid
from services.policy.losses import sft_loss, token_weights
from services.policy.optimizer import Optimizer
from shared.config.schema import SftTable
from shared.weights.slices import Box

LIMIT = 30
"""Tokens of a micro-batch: few, so that gradients are accumulated over several."""
TIMEOUT_S = 60.0
TABLE = SftTable(dataset="none", batches=1, batch_size=1, lr=1.0)


def measure(layout: Layout, family: str) -> tuple[float, float, dict[str, Tensor], int]:
    """The loss, the norm, this rank's part of each gradient, and the micro-batches that were accumulated."""
    optimizer = Optimizer(layout.parameters().items(), TABLE)
    samples = rows(family)
    tokens = sum(len(response.tokens) for row in samples for response in row.responses)
    sequences = sum(len(row.responses) for row in samples)
    micros = layout.micro_batches(samples, LIMIT)
    total = {"loss": 0.0}

    def loss(index: int, found: tuple[Tensor, Tensor]) -> Tensor:
        logprobs, entropy = found
        micro = micros[index]
        # tokens of unequal weight: a gradient that is scaled or doubled somewhere shows
        weights = token_weights(micro.lengths, "token_mean", tokens=tokens, sequences=sequences) * micro.advantages
        result = sft_loss(logprobs, entropy, weights, tokens=tokens)
        total["loss"] += float(result.loss)
        return result.loss

    layout.train(micros, loss, optimizer.collect)
    gradients = optimizer.gradients()
    layout.sum_gradients(gradients)
    sums, _ = layout.sum_metrics(total, {})
    return sums["loss"], float(layout.norm(gradients)), gradients, len(micros)


def run(cell: Cell, rank: int, folder: Path) -> None:
    """This rank's part in one cell."""
    parallel = cell.parallel
    store = dist.FileStore(str(folder / f"store-{cell.family}-{cell.layout}"), parallel.world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=parallel.world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        grid = Grid.form(parallel, rank, TIMEOUT_S)
        layout = Layout(tiny(cell.family).eval(), grid, **cell.options)
        loss, norm, gradients, count = measure(layout, cell.family)
        boxes = {name: layout.box(name, rank) for name in gradients}
        told = {name: json.dumps([box.start, box.stop]) for name, box in boxes.items() if box is not None}
        parts = {name: gradient.contiguous() for name, gradient in gradients.items() if name in told}
        save_file(parts, folder / f"part-{rank}.safetensors", metadata=told)
        dist.barrier()
        if rank == 0:
            verdict = compare(cell, loss, norm, folder)
            (folder / f"{cell.family}-{cell.layout}.json").write_text(json.dumps({**verdict, "micro_batches": count}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def compare(cell: Cell, loss: float, norm: float, folder: Path) -> dict[str, Any]:
    """How far loss, norm and gradients are from those of one process; a gradient relative to its tensor's largest."""
    true_loss, true_norm, truth, _ = measure(Layout(tiny(cell.family).eval()), cell.family)
    seen = {name: torch.zeros_like(gradient, dtype=torch.int32) for name, gradient in truth.items()}
    worst, where = 0.0, ""
    for rank in range(cell.parallel.world):
        path = folder / f"part-{rank}.safetensors"
        told = _metadata(path)
        for name, part in load_file(path).items():
            start, stop = json.loads(told[name])
            place = Box(tuple(start), tuple(stop)).within(Box.whole(truth[name].shape))
            seen[name][place] += 1
            apart = (part - truth[name][place]).abs().max() / truth[name].abs().max().clamp(min=1e-12)
            if not apart <= worst:  # NaN is the worst of all
                worst, where = float(apart), f"{name} of rank {rank}"
    missing = [name for name, count in seen.items() if not bool(count.min() > 0)]
    return {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "norm": abs(norm - true_norm) / true_norm,
        "gradient": worst,
        "where": where,
        "missing": missing,
    }


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def main() -> None:
    """All cells of the command line, in order."""
    folder, rank, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    for family, layout in zip(names[::2], names[1::2], strict=True):
        cell = Cell(family, layout)
        if rank >= cell.parallel.world:
            continue
        here = folder / f"{family}-{layout}.parts"
        here.mkdir(exist_ok=True)
        try:
            run(cell, rank, here)
        except Exception as error:  # a cell that can't be says why
            (here / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            print(f"{family} {layout} rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
