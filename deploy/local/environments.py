"""Which Python runs a process: this one, or that of an engine's own environment beside the repository's code.

vLLM, SGLang and the trainer pin different versions of torch and transformers, so that each engine has an environment
(`make env-vllm`, `make env-sglang`). Where this Python has the engine itself, as in a container image, it is used.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import deploy
from deploy.plan import Environment
from shared.config import Recipe, RecipeError

SOURCE = Path(deploy.__file__).resolve().parent.parent
"""The folder that holds services/ and shared/, and the engines' environments."""


def python_for(engine: Environment) -> str:
    """The interpreter of an environment: this one if it has what is wanted. RecipeError if there is none."""
    if engine in ("controller", "transformers") or importlib.util.find_spec(engine) is not None:
        return sys.executable
    python = SOURCE / f".venv-{engine}" / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise RecipeError(
            f"rollout.engine: {engine!r} has an environment of its own, expected at {python.parent.parent}, "
            f"found none; run 'make env-{engine}', or choose 'transformers'"
        )
    return str(python)


def check_environments(recipe: Recipe) -> None:
    """RecipeError unless every engine of the recipe has an interpreter."""
    for engine in recipe.rollout.engines:
        python_for(engine)
