"""The three engines in turns on the recipe's model: samples a second; updates in flight beside drain-and-wait.

`python -m benchmarks.engine_speed`, or `make bench-engines`, which makes the environments first.
Each engine runs in its own environment, with the recipe's threads and slots, and gets the same requests. In each round
every engine answers `--requests` requests, then lives through `--syncs` updates of its weights while work is always
waiting, and through as many where all samples end before each, and the next begin after it.
Writes `results/engines.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, describe_machine, load_average, write_results
from deploy.local.environments import python_for

ENGINES = ("transformers", "vllm", "sglang")


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, recipe: Path) -> None:
        command = [python_for(engine), "-m", "benchmarks.engine_speed.worker", str(recipe), engine]  # type: ignore[arg-type]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answer()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Have it measure one thing."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # engines print to it, too
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"a worker ended with code {self._process.wait()} before it had measured; see above")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all engines."""
    workers = {engine: Worker(engine, given.recipe) for engine in ENGINES}
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        found: dict[str, Any] = {}
        for engine, worker in workers.items():
            sync = {"count": given.syncs, "every": given.every}
            found[engine] = {
                "throughput": worker.ask(measure="throughput", requests=given.requests),
                "keep": worker.ask(measure="keep", **sync),
                "drain": worker.ask(measure="drain", **sync),
            }
            print(number, engine, found[engine], flush=True)
        rounds.append(found)
    for worker in workers.values():
        worker.close()
    return {
        "machine": describe_machine(),
        "load_average": load_average(),
        "settings": {name: str(value) for name, value in vars(given).items()},
        "rounds": rounds,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Medians over the rounds."""
    settings = result["settings"]
    lines = [
        f"Machine: {result['machine']}. Load average when it ended: {result['load_average']}. `{settings['recipe']}`'s "
        f"model, one thread an engine, the engines in turns in each of {settings['rounds']} rounds; medians, ratios "
        f"within a round. {settings['requests']} requests of 8 samples; {settings['syncs']} updates, one for every "
        f"{settings['every']} tokens.",
        "",
        "| engine | samples/s | tokens/s | in flight, tokens/s | drain and wait, tokens/s | ratio | update, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine in ENGINES:
        found = [one[engine] for one in result["rounds"]]

        def middle(kind: str, name: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(one[kind][name] for one in found)

        ratio = statistics.median(one["keep"]["tokens_per_second"] / one["drain"]["tokens_per_second"] for one in found)
        lines.append(
            f"| {engine} | {middle('throughput', 'samples_per_second'):.0f} "
            f"| {middle('throughput', 'tokens_per_second'):.0f} | {middle('keep', 'tokens_per_second'):.0f} "
            f"| {middle('drain', 'tokens_per_second'):.0f} | **{ratio:.2f}** "
            f"| {1000 * middle('keep', 'pause_seconds'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--syncs", type=int, default=100)
    parser.add_argument("--every", type=int, default=5000, help="tokens between two updates")
    given = parser.parse_args()
    result = measure(given)
    write_results(RESULTS, "engines", result, as_markdown(result))


if __name__ == "__main__":
    main()
