"""Orrery's services beside a synchronous loop written by hand.

`python -m benchmarks.sync_loop`, or `make bench-sync-loop`.
The same model, data, batch and settings; the loop (`benchmarks/rl/by_hand.py`) has one process and all cores, the
services have one core each for generation and training, which run side by side. Writes `results/sync_loop.{json,md}`.
"""

from __future__ import annotations

import sys

from benchmarks.machine import RESULTS, write_results
from benchmarks.rl.rounds import as_markdown, measure, parser

COUNTED = (
    "The loop is one process with `generate` of transformers; groups with equal rewards are kept in both "
    "(`filter_equal_rewards = false`), so every sample that is drawn is trained on."
)


def main() -> None:
    """Measure, print, write."""
    given = parser(__doc__.partition("\n")[0]).parse_args()
    result = measure(given, "by hand", [sys.executable, "-m", "benchmarks.rl.by_hand"], COUNTED)
    write_results(RESULTS, "sync_loop", result, as_markdown(result))


if __name__ == "__main__":
    main()
