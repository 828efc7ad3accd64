"""Orrery's services beside TRL's GRPOTrainer.

`python -m benchmarks.trl_compare`, or `make bench-trl`.
The same model, data, batch and settings. TRL runs in an environment of its own (`.venv-trl`), so that what it wants
never decides what Orrery runs with. Writes `results/trl.{json,md}`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.machine import RESULTS, ROOT, write_results
from benchmarks.rl.rounds import as_markdown, measure, parser


def versions(python: Path) -> str:
    """What the environment of `python` has; SystemExit with advice where it has no TRL."""
    code = "from importlib.metadata import version as v; print('trl', v('trl'), 'transformers', v('transformers'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(
            f"expected a Python with trl at {python}, got {error}; 'make bench-trl' makes one, or give --python"
        ) from None
    return done.stdout.strip()


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__.partition("\n")[0])
    arguments.add_argument("--python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    given = arguments.parse_args()
    counted = (
        f"TRL is {versions(given.python)}, with `generate` of transformers (its default); groups with equal rewards "
        "are kept in both (`filter_equal_rewards = false`), so every sample that is drawn is trained on."
    )
    result = measure(given, "TRL", [str(given.python), "-m", "benchmarks.rl.trl_loop"], counted)
    write_results(RESULTS, "trl", result, as_markdown(result))


if __name__ == "__main__":
    main()
