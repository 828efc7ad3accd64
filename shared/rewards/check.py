"""Can the parts of a recipe be made here? Asked before a run begins, in a process of its own.

`check_rewards` is for commands; `python -m shared.rewards.check` is the process: it reads the parts as JSON on stdin,
makes them, and ends with 0, or with 2 and the reason on stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pydantic import TypeAdapter

from shared.config import Recipe, RecipeError
from shared.config.schema import MathPart, PythonPart, RewardPart

PARTS: TypeAdapter[list[RewardPart]] = TypeAdapter(list[RewardPart])
_REFUSED = 2
_REPOSITORY = Path(__file__).resolve().parents[2]


def check_rewards(recipe: Recipe) -> None:
    """RecipeError if a module, function or package of the rewards cannot be had; waits `timeouts.load_s` at most."""
    parts: list[RewardPart] = [part for part in recipe.rewards.parts if isinstance(part, PythonPart | MathPart)]
    if not parts:
        return
    search = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    try:
        checked = subprocess.run(
            [sys.executable, "-m", "shared.rewards.check"],
            input=PARTS.dump_json(parts),
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": search},
            timeout=recipe.timeouts.load_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        names = ", ".join(part.name for part in parts)
        raise RecipeError(
            f"importing the reward parts {names} took longer than timeouts.load_s = {recipe.timeouts.load_s:g} s; "
            "do the slow work at the function's first call, or raise the limit"
        ) from None
    if checked.returncode == _REFUSED:
        raise RecipeError(checked.stdout.decode(errors="replace").strip())
    if checked.returncode:
        raise RecipeError(
            f"importing the reward parts ended their process (exit code {checked.returncode}); "
            "import the module by hand to see why"
        )


def main() -> int:
    """Make every part that stdin describes."""
    from shared.rewards.build import build_part

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints while it is imported is no answer
    try:
        for part in PARTS.validate_json(sys.stdin.buffer.read()):
            build_part(part)
    except RecipeError as error:
        print(error, file=answer, flush=True)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
