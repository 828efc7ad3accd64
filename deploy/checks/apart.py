"""What `orrery up` looks at before it makes anything: data, rewards and model, in a process of its own.

The supervisor lives as long as the run, and would keep every library that was imported to look. `look_apart` is for
commands; `python -m deploy.checks.apart` is the process: recipe as JSON on stdin, the faults as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from shared.config import Recipe

_REPOSITORY = Path(__file__).resolve().parents[2]


def look_apart(recipe: Recipe) -> list[str]:
    """What is wrong with the recipe's data, rewards and model, in words; waits `timeouts.load_s` at most.

    A look that takes longer, or fails, finds nothing: the services will say what is wrong.
    """
    search = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    try:
        looked = subprocess.run(
            [sys.executable, "-m", "deploy.checks.apart"],
            input=recipe.model_dump_json().encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": search},
            timeout=recipe.timeouts.load_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    return [str(fault) for fault in json.loads(looked.stdout)] if looked.returncode == 0 else []


def main() -> int:
    """Look at the recipe that stdin has."""
    from deploy.checks.recipe import look

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    found = look(Recipe.model_validate_json(sys.stdin.buffer.read()), starting=True)
    json.dump(found.faults, answer)
    answer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
