"""Training on samples of quantised engines: `python -m benchmarks.quantised_rollout` (`make bench-quantised`).

For each seed the recipe's SFT stage is run once, in full precision; from the model that it leaves, RL is run with
engines of full precision, of NVFP4 (transformers, emulated) and of FP8 (vLLM, by its own kernels, which want AMX), the
narrow ones with importance correction and without. Two verdicts on the same held-out problems: of the model as the
engine rounds it, and of the export in full precision. Writes `results/quantised_rollout.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomlkit

from benchmarks.live.run import LiveRun, leave_nothing_behind
from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from deploy.readers.evaluations import before_and_after, read_evaluations
from services.controller.audit import audit_run

NVFP4 = ("rollout.engine=transformers", "rollout.quantization=nvfp4")
FP8 = ("rollout.engine=vllm", "rollout.quantization=fp8_block")  # fp8 has no fast kernel on any CPU
CORRECTED, UNCORRECTED = ("train.is_correction=truncate",), ("train.is_correction=none",)
ARMS: dict[str, tuple[str, ...]] = {
    "full precision": ("rollout.engine=transformers", *CORRECTED),
    "NVFP4 (transformers), corrected": (*NVFP4, *CORRECTED),
    "NVFP4 (transformers), not corrected": (*NVFP4, *UNCORRECTED),
    "FP8 (vLLM), corrected": (*FP8, *CORRECTED),
    "FP8 (vLLM), not corrected": (*FP8, *UNCORRECTED),
}
"""What generates, and whether its samples are weighted; the rest is the recipe's."""
LIMIT_S = 3600.0
"""Longest time for one run."""
EVERY = 100_000
"""Batches between two verdicts: only the first and the last are judged."""


@dataclass(frozen=True)
class ArmResult:
    """One run of RL. Accuracies are shares; figures of mismatch are means over its steps."""

    seed: int
    arm: str
    problems: int
    before: float
    rounded: float
    exported: float
    mismatch_abs: float
    mismatch_kl: float
    outside: float
    cut: float
    reward: float
    clean: bool


def write_stages(recipe: Path, seed: int, problems: int, folder: Path) -> tuple[Path, Path]:
    """The recipe cut in two: SFT alone, and RL alone from the export of a run in `folder`/sft."""
    base = tomlkit.parse(recipe.read_text(encoding="utf-8"))
    base["run"]["seed"] = seed  # type: ignore[index]
    for suite in base["evaluation"]["suites"].values():  # type: ignore[index, union-attr]
        suite["problems"] = problems
    sft, rl = (tomlkit.parse(tomlkit.dumps(base)) for _ in range(2))
    del sft["train"]
    del rl["sft"]
    rl["model"] = {"path": str(folder / "sft" / "export")}
    rl["evaluation"]["every"] = EVERY  # type: ignore[index]
    paths = folder / "sft.toml", folder / "rl.toml"
    folder.mkdir(parents=True, exist_ok=True)
    for path, document in zip(paths, (sft, rl), strict=True):
        path.write_text(tomlkit.dumps(document), encoding="utf-8")
    return paths


def run_to_end(recipe: Path, overrides: Sequence[str], folder: Path) -> None:
    """Run a recipe; SystemExit with what it said if it did not come through."""
    with LiveRun(folder) as run:
        code = run.up(recipe, overrides).wait(LIMIT_S)
        if code:
            raise SystemExit(f"expected {folder} to run to its end, got exit code {code}:\n{run.tail()}")


def judge_export(folder: Path, recipe: Path) -> float:
    """Held-out accuracy of the run's export, by an engine of full precision."""
    out = folder / "exported.json"
    command = [sys.executable, "-m", "deploy.cli", "eval", str(folder / "export")]
    subprocess.run([*command, "--recipe", str(recipe), "--out", str(out)], cwd=ROOT, check=True, capture_output=True)
    return float(json.loads(out.read_text(encoding="utf-8"))["accuracy"])


def result_of(seed: int, arm: str, folder: Path, recipe: Path) -> ArmResult:
    """What the run of one arm came to."""
    judged = before_and_after(read_evaluations(folder / "eval"), rl=True)
    if len(judged) != 2:
        raise SystemExit(f"{folder}: expected a verdict before and one after RL, got {len(judged)}")
    before, after = judged
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def mean(name: str, lines: Sequence[dict[str, Any]] = steps) -> float:
        return statistics.fmean(line[name] for line in lines)

    return ArmResult(
        seed=seed,
        arm=arm,
        problems=after.n,
        before=before.correct / before.n,
        rounded=after.correct / after.n,
        exported=judge_export(folder, recipe),
        mismatch_abs=mean("mismatch_abs"),
        mismatch_kl=mean("mismatch_kl"),
        outside=mean("mismatch_outside"),
        cut=mean("importance_cut"),
        reward=mean("reward", steps[-20:]),
        clean=not audit_run(folder).faults,
    )


def as_markdown(result: dict[str, Any]) -> str:
    """A line an arm: accuracy by seed, and the mismatch."""
    found = [ArmResult(**one) for one in result["runs"]]
    seeds = sorted({it.seed for it in found})
    starts = {it.seed: it.before for it in found if it.arm == "full precision"}
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. `{result['recipe']}`: "
        f"SFT once a seed in full precision, which leaves "
        f"{', '.join(f'{100 * starts[seed]:.1f} %' for seed in seeds)} (seeds {', '.join(map(str, seeds))}), then RL "
        f"from there; judged greedily on {found[0].problems} problems that training never sees.",
        "",
        "| engine of the rollout | as exported, by seed | mean | as the engine rounds it | log-ratio | KL "
        "| outside the trust band | weights cut | audits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = [it for it in found if it.arm == arm]
        if not runs:
            continue

        def mean(name: str, runs: Sequence[ArmResult] = runs) -> float:
            return statistics.fmean(getattr(it, name) for it in runs)

        by_seed = ", ".join(f"{100 * it.exported:.1f}" for it in sorted(runs, key=lambda it: it.seed))
        lines.append(
            f"| {arm} | {by_seed} | **{100 * mean('exported'):.1f} %** | {100 * mean('rounded'):.1f} % "
            f"| {mean('mismatch_abs'):.4f} | {mean('mismatch_kl'):.5f} | {100 * mean('outside'):.2f} % "
            f"| {100 * mean('cut'):.2f} % | {'clean' if all(it.clean for it in runs) else 'NOT CLEAN'} |"
        )
    lines += [
        "",
        "*log-ratio*: mean absolute difference of the trainer's and the engine's log-probabilities of a sampled token, "
        "in nats; staleness of at most one version is in it, for full precision too. FP8 is computed by vLLM with "
        "bfloat16 activations; NVFP4 weights are emulated, activations stay float32.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every arm of every seed, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the runs are kept; those done are not repeated"
    )
    given = parser.parse_args()
    leave_nothing_behind()
    of_rl = [it for it in given.overrides if not it.startswith("sft.")]
    stages: dict[int, Path] = {}
    for seed in given.seeds:
        folder = (given.folder / f"seed-{seed}").absolute()
        sft, stages[seed] = write_stages(given.recipe, seed, given.problems, folder)
        if not (folder / "sft" / "export" / "config.json").is_file():
            run_to_end(sft, [it for it in given.overrides if not it.startswith("train.")], folder / "sft")
    runs: list[ArmResult] = []
    for number, (arm, overrides) in enumerate(ARMS.items()):
        for seed, rl in stages.items():
            folder = rl.with_name(f"arm-{number}")
            kept = folder.with_suffix(".json")
            if not kept.is_file():
                run_to_end(rl, [*overrides, *of_rl], folder)
                kept.write_text(json.dumps(asdict(result_of(seed, arm, folder, rl))), encoding="utf-8")
            runs.append(ArmResult(**json.loads(kept.read_text(encoding="utf-8"))))
            print(json.dumps(asdict(runs[-1])), flush=True)
    result = {
        "machine": describe_machine(),
        "load_average": load_average(),
        "recipe": str(given.recipe.resolve().relative_to(ROOT)),
        "overrides": given.overrides,
        "runs": [asdict(run) for run in runs],
    }
    write_results(RESULTS, "quantised_rollout", result, as_markdown(result))


if __name__ == "__main__":
    main()
