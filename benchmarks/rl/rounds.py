"""Rounds in which the ways take turns, each in processes of its own; ratios are of one round, medians over rounds.

Used by `benchmarks.sync_loop` and `benchmarks.trl_compare`. The start of every way is the model that the recipe's SFT
stage leaves, made once. Every process is gone, or killed at its time limit, when a round is over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomlkit

from benchmarks.machine import ROOT, describe_machine, load_average
from benchmarks.rl.task import HELDOUT, Outcome, judge, judged
from shared.config import load_recipe

LIMIT_S = 900.0
"""Longest time for one run of one way."""


def measure(given: argparse.Namespace, way: str, command: Sequence[str], counted: str) -> dict[str, Any]:
    """Orrery and `way` (`command` RECIPE --batches ..) in turns; the result for JSON."""
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rl-", dir=given.folder) as name:
        work = Path(name)
        start = given.start.absolute() if given.start else _sft(given.recipe, work)
        recipes = [_rl_recipe(given.recipe, start, work, given.batches, seed + 1) for seed in range(given.rounds)]
        rounds: list[tuple[Outcome, Outcome]] = []
        for index, recipe in enumerate(recipes):
            ours = _services(recipe, work / f"services-{index}", given.problems)
            theirs = _loop(command, recipe, work / f"loop-{index}", given)
            rounds.append((ours, theirs))
            rates = [outcome.samples_per_s(given.warm) for outcome in rounds[-1]]
            print(f"round {index + 1}: orrery {rates[0]:.1f}, {way} {rates[1]:.1f} samples/s", flush=True)
        last = load_recipe(recipes[-1])
        before = judge(start, last.data[HELDOUT], given.problems, last.rollout.max_new_tokens) / given.problems
    train = last.train
    assert train is not None
    ratios = [ours.samples_per_s(given.warm) / theirs.samples_per_s(given.warm) for ours, theirs in rounds]
    return {
        "machine": describe_machine(),
        "load_average": load_average(),
        "recipe": str(given.recipe),
        "way": way,
        "counted": counted,
        "batches": given.batches,
        "warm": given.warm,
        "batch": f"{train.batch_size} x {train.samples}",
        "threads": given.threads,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "accuracy_before": before,
        "problems": given.problems,
        "rounds": [[msgspec.to_builtins(outcome) for outcome in pair] for pair in rounds],
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with what was compared."""
    pairs = [[msgspec.convert(outcome, Outcome) for outcome in pair] for pair in result["rounds"]]
    warm = result["warm"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}.",
        "",
        f"RL part of `{result['recipe']}`, {result['batches']} batches of {result['batch']} samples from the same "
        f"weights ({100 * result['accuracy_before']:.1f} % of {result['problems']} held-out problems right), "
        f"medians of {len(pairs)} rounds in turns, each with a seed of its own. {result['counted']} "
        f"samples/s leave out start-up and the first {warm} batches; accuracy is after all batches: at equal samples.",
        "",
        "| | samples/s | trained tokens/s | start-up to last step, s | held-out accuracy after |",
        "|---|---|---|---|---|",
    ]
    for way in range(2):
        outcomes = [pair[way] for pair in pairs]
        rate = statistics.median(outcome.samples_per_s(warm) for outcome in outcomes)
        tokens = statistics.median(
            outcome.tokens / (outcome.samples_per_batch * len(outcome.ends)) * outcome.samples_per_s(warm)
            for outcome in outcomes
        )
        whole = statistics.median(outcome.whole_s for outcome in outcomes)
        accuracy = ", ".join(f"{100 * outcome.accuracy:.1f} %" for outcome in outcomes)
        lines.append(f"| {outcomes[0].way} | {rate:.1f} | {tokens:.0f} | {whole:.1f} | {accuracy} |")
    shown = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return "\n".join([*lines, "", f"Ratio: **{result['ratio']:.2f}** (rounds: {shown})."]) + "\n"


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both benchmarks take."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batches", type=int, default=20, help="RL batches in each round")
    made.add_argument("--warm", type=int, default=4, help="first batches that are not timed")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the other way")
    made.add_argument("--problems", type=int, default=500, help="held-out problems that judge the outcome")
    made.add_argument("--start", type=Path, help="model folder to begin with (default: run the recipe's SFT stage)")
    made.add_argument("--folder", type=Path, default=ROOT / "runs", help="where temporary folders are made")
    return made


def _sft(recipe: Path, work: Path) -> Path:
    """The model that the recipe's SFT stage leaves."""
    tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    tree.pop("train")
    path = work / "sft.toml"
    path.write_text(tomlkit.dumps(tree), encoding="utf-8")
    _orrery_up(path, work / "sft")
    return work / "sft" / "export"


def _rl_recipe(recipe: Path, start: Path, work: Path, batches: int, seed: int) -> Path:
    """The recipe's RL stage from `start`; nothing but training in the time that counts, and no group left out.

    `seed` is the run's: it decides which prompts come, for every way alike, and what is drawn.
    """
    tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    for table in ("sft", "evaluation", "evaluator"):
        tree.pop(table, None)
    tree["model"] = {"path": str(start)}
    # the other ways keep a constant rate
    tree["train"] |= {"batches": batches, "filter_equal_rewards": False, "schedule": "constant"}
    tree["run"] = {**tree.get("run", {}), "seed": seed}
    path = work / f"rl-{seed}.toml"
    path.write_text(tomlkit.dumps(tree), encoding="utf-8")
    return path


def _services(recipe: Path, folder: Path, problems: int) -> Outcome:
    _orrery_up(recipe, folder)
    loaded = load_recipe(recipe)
    assert loaded.train is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [line["time"] for line in lines]
    began = (folder / "config.toml").stat().st_mtime
    outcome = {
        "way": "orrery",
        "samples_per_batch": loaded.train.batch_size * loaded.train.samples,
        "ends": ends,
        "whole_s": ends[-1] - began,
        "tokens": sum(line["tokens"] for line in lines),
        "rewards": [line["reward"] for line in lines],
    }
    return judged(outcome, folder / "export", loaded, problems)


def _loop(command: Sequence[str], recipe: Path, folder: Path, given: argparse.Namespace) -> Outcome:
    folder.mkdir()
    arguments = ["--batches", str(given.batches), "--threads", str(given.threads), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    _run([*command, str(recipe), *arguments], folder / "output.txt", environment)
    outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    return judged(outcome, folder, load_recipe(recipe), given.problems)


def _orrery_up(recipe: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "up", str(recipe), "--run-folder", str(folder)]
    _run(command, folder.with_suffix(".txt"), dict(os.environ))


def _run(command: Sequence[str], output: Path, environment: dict[str, str]) -> None:
    """Run to the end, its text going to `output`; RuntimeError with the last of it if it fails or takes too long."""
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code: int | str = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = f"no end within {LIMIT_S:g} s"
        finally:
            if process.poll() is None:
                _end(process)
    if code:
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"expected {' '.join(command)} to succeed, got {code}:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop it as a person does, then by force: a supervisor ends its services when it is told to stop."""
    for request in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        process.send_signal(request)
        try:
            process.wait(30)
            return
        except subprocess.TimeoutExpired:
            continue
