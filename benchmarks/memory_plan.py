"""What `orrery plan --memory` says of a policy beside what its process takes.

`python -m benchmarks.memory_plan`, or `make bench-memory-plan`; one CPU thread. Writes `results/memory_plan.{json,md}`.

Each cell is a process of its own that does what the policy service does with its learner and trainer: loads the model,
computes steps of several micro-batches of long-tailed lengths under RL with a reference, applies them, publishes and
saves. Before that it does so once with a tiny model, since torch imports, loads and compiles much at the first use. The
kernel's high-water mark of its memory (VmHWM) is set back before each phase; what is compared is the mark above the
memory after the tiny model, and the plan without its share for imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from deploy.plan.memory.model import shape_of
from deploy.plan.memory.parts import MIB, Phase
from deploy.plan.memory.policy import INTERPRETER, policy_processes
from shared.config import Recipe

TOLERANCE = 0.2
"""How far a plan may be off its process's peak."""
STEPS = 3
PROMPT = 24

QWEN2 = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 2816, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32768, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen2.5-0.5B with everything smaller: a vocabulary that weighs as much as the layers."""
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model": {"path": "qwen2", "dtype": "bfloat16"},
        "policy": {"micro_batch_tokens": 768},
    },
    "qwen3": {
        "model": {
            "build": {
                "family": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "layers": 8, "heads": 8,
                "kv_heads": 4, "head_dim": 64, "context": 2048,
            }
        },
        "policy": {"micro_batch_tokens": 768},
    },
    "qwen3_moe": {
        "model": {
            "build": {
                "family": "qwen3_moe", "hidden_size": 384, "intermediate_size": 512, "layers": 8, "heads": 6,
                "kv_heads": 2, "head_dim": 64, "experts": 8, "experts_per_token": 2, "context": 2048,
            },
            "dtype": "bfloat16",
        },
        "policy": {"micro_batch_tokens": 768},
        "train": {"minibatches": 2},
    },
}  # fmt: skip


def make_recipe(name: str, folder: Path, *, checkpointing: bool) -> Recipe:
    """The recipe of one cell; a model that has a folder lies in `folder`."""
    cell = MODELS[name]
    model = dict(cell["model"])
    if "path" in model:
        model["path"] = str(folder / model["path"])
    return Recipe.model_validate(
        {
            "model": model,
            "data": {"rows": {"kind": "reasoning_gym", "task": "chain_sum"}},
            "train": {
                "dataset": "rows", "batches": 100, "batch_size": 4, "samples": 4, "lr": 1e-5, "kl_weight": 0.01,
                **cell.get("train", {}),
            },
            "policy": {**cell["policy"], "gradient_checkpointing": checkpointing},
            "rollout": {"max_new_tokens": 512},
        }
    )  # fmt: skip


def small(recipe: Recipe) -> Recipe:
    """The same with a model of a few thousand parameters."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 32}
    tree = recipe.model_dump(exclude_none=True)
    family = recipe.model.build.family if recipe.model.build is not None else "qwen2"
    tree["model"] = {"build": {"family": family, **sizes, "context": 2048}, "dtype": recipe.model.dtype}
    return Recipe.model_validate(tree)


# --- the process that is measured -------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {field} in /proc/self/status; this benchmark wants Linux")


def forget_peak() -> None:
    """Set VmHWM back to VmRSS (man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Peaks:
    """The most memory of each phase, above what was there before."""

    def __init__(self) -> None:
        self.base = resident("VmRSS")
        self.bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done within belongs to the phase."""
        forget_peak()
        yield
        self.bytes[name] = max(self.bytes.get(name, 0), resident("VmHWM") - self.base)


def measure(recipe: Recipe, folder: Path, steps: int) -> dict[str, int]:
    """Live some steps as the policy service does; the peak of each phase, and the base that they stand on."""
    import numpy as np

    from services.policy import checkpoint
    from services.policy.copies import Copies
    from services.policy.device import CPU
    from services.policy.layouts.grid import Grid
    from services.policy.learner import Learner, prepare_torch
    from services.policy.state import head_of
    from shared.arrays import pack
    from shared.config import live_values
    from shared.messages import AssignedGroup, CommitStep, GradientsReady, LoadState, Position, TrainStep
    from shared.weights import StagedWeights

    def no_mesh(epoch: int) -> Any:
        raise RuntimeError(f"expected steps of one member, got one of mesh epoch {epoch}")

    train = recipe.train
    assert train is not None
    prepare_torch(recipe, CPU)
    peaks = Peaks()
    learner = Learner(recipe, folder, no_mesh, Grid.alone())
    with peaks.phase("loading"):
        learner.load(LoadState("initial", Position(0, 0, 0), ""))
    trainer = learner.loaded()
    vocabulary = int(trainer.model.config.get_text_config().vocab_size)
    offered: list[StagedWeights] = []
    copies, area = Copies(learner, lambda order: nullcontext([])), None
    draw = np.random.default_rng(0)
    per_batch = train.mu * train.minibatches
    for number in range(steps * per_batch):
        groups, frames, tokens = [], [], 0
        for group in range(train.batch_size // train.minibatches):
            lengths = np.clip(draw.lognormal(4.8, 0.6, train.samples), 1, recipe.rollout.max_new_tokens).astype(int)
            total = int(lengths.sum())
            headers, payload = pack(
                {
                    "prompt": draw.integers(0, vocabulary, PROMPT).astype(np.int32),
                    "tokens": draw.integers(0, vocabulary, total).astype(np.int32),
                    "logprobs": np.full(total, -6.0, np.float32),
                    "versions": np.zeros(total, np.int32),
                }
            )
            advantages = draw.standard_normal(train.samples).tolist()
            groups.append(AssignedGroup(group, 1, "train", PROMPT, lengths.tolist(), advantages, 1.0, headers))
            frames += payload
            tokens += total
        step = TrainStep(
            step=number, attempt=1, stage="train", position=trainer.position, index=number % per_batch,
            steps_in_batch=per_batch, members=[], mesh=None, groups=groups, tokens=tokens,
            sequences=len(groups) * train.samples, revision=0, hyperparameters=live_values(recipe),
        )  # fmt: skip
        with peaks.phase("gradients"):
            vote = trainer.compute(step, frames)
        assert isinstance(vote, GradientsReady) and vote.finite
        with peaks.phase("optimizer step"):
            trainer.apply(CommitStep(step.step, 1, 0))
        if step.index == per_batch - 1:
            with peaks.phase("checkpoint"):
                area = copies.take(trainer, area)
                checkpoint.save(head_of(trainer), area.tensors, folder / "checkpoints", "run", "recipe", 1)
            with peaks.phase("publishing"):
                offered[:] = [learner.stage(trainer.position)[0]]
    return {"base": peaks.base, **peaks.bytes}


# --- the comparison ---------------------------------------------------------------------------------------------------


def planned(recipe: Recipe) -> dict[str, Phase]:
    """The plan's phases, without what imports take."""
    (process,) = policy_processes(recipe, shape_of(recipe.model), gpu=False)
    return {phase.name: phase for phase in process.host}


def compare(name: str, folder: Path, *, checkpointing: bool) -> dict[str, Any]:
    """One cell: peaks of a fresh process beside the plan."""
    recipe = make_recipe(name, folder, checkpointing=checkpointing)
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--child", name, "--folder", str(folder)]
    command += ["--checkpointing"] * checkpointing
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    peaks["publishing"] = max(peaks["publishing"], peaks.pop("checkpoint"))  # copies are all that it has besides
    phases = {
        phase: {"planned": found.total - INTERPRETER, "measured": peaks[phase]}
        for phase, found in planned(recipe).items()
    }
    peak = {kind: max(each[kind] for each in phases.values()) for kind in ("planned", "measured")}
    parts = max(planned(recipe).values(), key=lambda phase: phase.total).parts
    return {
        "model": name, "checkpointing": checkpointing, "parameters": shape_of(recipe.model).parameters,
        "micro_batch_tokens": recipe.policy.micro_batch_tokens, "dtype": recipe.model.dtype, "phases": phases,
        "base": peaks["base"], "parts": {part: size for part, size in parts.items() if size}, **peak,
        "off": round(peak["planned"] / peak["measured"] - 1, 3),
    }  # fmt: skip


def make_folder(folder: Path) -> None:
    """A Hugging Face folder of the model that no [model.build] can describe."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    sizes = dict(QWEN2)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    model.bfloat16().save_pretrained(folder / "qwen2")


def as_markdown(result: dict[str, Any]) -> str:
    """A line a cell, with the phases behind it."""
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. One thread. MiB, without "
        "what was there before. The largest phase is the process's peak.",
        "",
        "| model | parameters | type | tokens | checkpointing | planned | measured | off | planned / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        phases = ", ".join(
            f"{name} {each['planned'] // MIB} / {each['measured'] // MIB}" for name, each in cell["phases"].items()
        )
        lines.append(
            f"| {cell['model']} | {cell['parameters'] / 1e6:.0f} M | {cell['dtype']} | {cell['micro_batch_tokens']} | "
            f"{'yes' if cell['checkpointing'] else 'no'} | {cell['planned'] // MIB} | {cell['measured'] // MIB} | "
            f"**{100 * cell['off']:+.0f} %** | {phases} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every cell, or, as a child, be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        recipe = make_recipe(given.child, given.folder, checkpointing=given.checkpointing)
        with tempfile.TemporaryDirectory() as run:
            measure(small(recipe), Path(run) / "small", 1)  # what torch loads and compiles once
            print(json.dumps(measure(recipe, Path(run) / "whole", STEPS)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        cells = []
        for name in given.models:
            for checkpointing in (False, True):
                cells.append(compare(name, Path(folder), checkpointing=checkpointing))
                print(as_markdown({"machine": "", "load_average": "", "cells": cells[-1:]}).splitlines()[-1])
    result = {"machine": describe_machine(), "load_average": load_average(), "cells": cells}
    write_results(given.results, "memory_plan", result, as_markdown(result))
    worst = max(cells, key=lambda cell: abs(cell["off"]))
    if abs(worst["off"]) > TOLERANCE:
        raise SystemExit(
            f"expected plans within {TOLERANCE:.0%} of the peak, got {worst['off']:+.0%} ({worst['model']})"
        )


if __name__ == "__main__":
    main()
