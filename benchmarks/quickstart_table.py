"""What a newcomer's first run comes to: `python -m benchmarks.quickstart_table` (`make quickstart-table`).

Runs a recipe once a seed, one run after another, each judged greedily on held-out problems that training never sees:
accuracy where SFT ends, accuracy after GRPO, and the gain with the lower end of its two-sided 95 % interval. Both
verdicts are on the same problems, so the gain is a mean of paired differences. Writes `results/quickstart.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from deploy.readers.evaluations import Evaluation, before_and_after, read_evaluations
from shared.config import Recipe, load_recipe

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
LIMIT_S = 1800.0
"""Longest time for one run."""


@dataclass(frozen=True)
class SeedResult:
    """One run. Accuracies and gains are shares, times are seconds."""

    seed: int
    problems: int
    sft: float
    final: float
    gain: float
    low: float
    paired: bool
    sft_batches: int
    startup_s: float
    sft_s: float
    grpo_s: float
    whole_s: float


def paired_gain(before: Mapping[int, bool], after: Mapping[int, bool]) -> tuple[float, float]:
    """Mean gain over the same problems and the lower end of its 95 % interval.

    With b problems gained and c lost of n, the differences (1, -1 or 0) have mean g = (b - c) / n and variance
    (b + c) / n - g^2; the interval is g +- 1.96 sqrt(variance / n). ValueError unless both judged the same problems.
    """
    if before.keys() != after.keys() or not before:
        raise ValueError(
            f"expected two verdicts on the same problems, got {len(before)} and {len(after)}, "
            f"{len(before.keys() & after.keys())} of them in both"
        )
    n = len(before)
    differences = [int(after[row]) - int(before[row]) for row in before]
    gain = sum(differences) / n
    variance = sum(map(abs, differences)) / n - gain * gain
    return gain, gain - Z95 * math.sqrt(variance / n)


def unpaired_gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Gain and lower end as if the verdicts were on different problems: the variances of the two shares add up."""
    shares = [verdict.correct / verdict.n for verdict in (before, after)]
    variance = sum(share * (1 - share) / verdict.n for share, verdict in zip(shares, (before, after), strict=True))
    gain = shares[1] - shares[0]
    return gain, gain - Z95 * math.sqrt(variance)


def answers(folder: Path, verdict: Evaluation, dataset: str, correct_at: float) -> dict[int, bool]:
    """Which rows a judged version answered right, from the run's sample lines."""
    found: dict[int, bool] = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            judged = (line["purpose"], line["dataset"], line["lineage"], line["versions"])
            if judged == ("eval", dataset, verdict.lineage, [verdict.version, verdict.version]):
                found[line["row"]] = line["rewards"][0] >= correct_at
    return found


def run_seed(recipe: Path, seed: int, overrides: Sequence[str], folder: Path) -> SeedResult:
    """Run the recipe with `seed` for model and run; its folder is left for a look."""
    command = [sys.executable, "-m", "deploy.cli", "up", str(recipe), "--run-folder", str(folder)]
    for override in (f"run.seed={seed}", *overrides):
        command += ["--set", override]
    output = folder.with_suffix(".txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    began, clock = time.time(), time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            code = process.wait(LIMIT_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(600)
    if code:
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"expected seed {seed} to run to its end, got exit code {code}:\n{tail}")
    return seed_result(seed, folder, began, time.perf_counter() - clock)


def seed_result(seed: int, folder: Path, began: float, whole_s: float) -> SeedResult:
    """What the run in `folder` came to."""
    recipe = load_recipe(folder / "config.toml")
    evaluations = [v for v in read_evaluations(folder / "eval") if v.suite == _suite(recipe)]
    judged = before_and_after(evaluations, rl=True)
    if len(judged) != 2:
        raise SystemExit(f"{folder}: expected a verdict before and one after GRPO, got {len(judged)}")
    before, after = judged
    (gain, low), paired = _gain(recipe, folder, before, after)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sft = [line for line in lines if line["stage"] == "sft"]
    train = [line for line in lines if line["stage"] == "train"]
    first = sft[0]["time"] - sft[0]["step_seconds"]
    return SeedResult(
        seed=seed,
        problems=after.n,
        sft=before.correct / before.n,
        final=after.correct / after.n,
        gain=gain,
        low=low,
        paired=paired,
        sft_batches=len(sft),
        startup_s=first - began,
        sft_s=sft[-1]["time"] - first,
        grpo_s=train[-1]["time"] - sft[-1]["time"],
        whole_s=whole_s,
    )


def _gain(
    recipe: Recipe, folder: Path, before: Evaluation, after: Evaluation
) -> tuple[tuple[float, float], bool]:  # fmt: skip
    """The gain with its bound, and whether it could be paired."""
    assert recipe.evaluation is not None
    suite = recipe.evaluation.suites[before.suite]
    dataset = recipe.evaluation.dataset(before.suite)
    one, two = (answers(folder, verdict, dataset, suite.correct_at) for verdict in (before, after))
    whole = all(
        (len(found), sum(found.values())) == (verdict.n, verdict.correct)
        for found, verdict in ((one, before), (two, after))
    )
    return (paired_gain(one, two), True) if whole else (unpaired_gain(before, after), False)


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with how it was made."""
    seeds = [SeedResult(**seed) for seed in result["seeds"]]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. `{result['recipe']}`, "
        f"one run a seed (of model and run), judged greedily on {seeds[0].problems} problems that training never sees.",
        "",
        "| seed | where SFT ends | after GRPO | gain | at least (95 %) | start-up | SFT | GRPO | whole run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for it in seeds:
        shares = " | ".join(f"{100 * share:.1f} %" for share in (it.sft, it.final))
        gains = " | ".join(f"{100 * gain:+.1f}" for gain in (it.gain, it.low))
        times = " | ".join(f"{seconds:.0f} s" for seconds in (it.startup_s, it.sft_s, it.grpo_s, it.whole_s))
        lines.append(f"| {it.seed} | {shares} | {gains} | {times} |")
    kind = (
        "paired by problem"
        if all(it.paired for it in seeds)
        else "not paired by problem in every run (samples missing)"
    )
    lines += [
        "",
        f"Gains are in points, {kind}; *at least* is the lower end of the two-sided 95 % interval. SFT and GRPO times "
        "hold the evaluations on the way; the installation is in none of them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every seed, print, write."""
    parser = argparse.ArgumentParser(description="The quickstart's outcome over several seeds.")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--problems", type=int, default=500, help="held-out problems in each evaluation")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder in runs/)")
    parser.add_argument("--collect", action="store_true", help="read the runs in --folder instead of running")
    given = parser.parse_args()
    if given.collect and given.folder is None:
        parser.error("--collect wants the --folder of runs made before")
    recipe = load_recipe(given.recipe)
    overrides = [f"evaluation.suites.{_suite(recipe)}.problems={given.problems}", *given.overrides]
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quickstart-", dir=ROOT / "runs") as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        seeds = []
        for seed in given.seeds:
            run = folder / f"seed-{seed}"
            kept = run.with_suffix(".json")
            if given.collect:
                seeds.append(SeedResult(**json.loads(kept.read_text(encoding="utf-8"))))
                continue
            seeds.append(run_seed(given.recipe, seed, overrides, run))
            kept.write_text(json.dumps(asdict(seeds[-1])), encoding="utf-8")
            print(json.dumps(asdict(seeds[-1])), flush=True)
    result = {
        "machine": describe_machine(),
        "load_average": load_average(),
        "recipe": str(given.recipe),
        "overrides": overrides,
        "seeds": [asdict(seed) for seed in seeds],
    }
    write_results(RESULTS, "quickstart", result, as_markdown(result))


def _suite(recipe: Recipe) -> str:
    """The suite that the table is about: the one that ends SFT, or the first."""
    if recipe.evaluation is None:
        raise SystemExit("the recipe has no [evaluation]: there is nothing to put into a table")
    return recipe.stop_suite or next(iter(recipe.evaluation.suites))


if __name__ == "__main__":
    main()
