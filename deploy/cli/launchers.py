"""What may start a run's processes. The launch plan is the same for all; a launcher decides how, and where."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.config import Recipe


class Launcher(StrEnum):
    """The names that a person gives."""

    local = "local"
    slurm = "slurm"
    compose = "compose"


def check(launcher: Launcher, recipe: Recipe) -> None:
    """RecipeError for what the launcher could never start."""
    if recipe.policy.nodes > 1 and launcher is not Launcher.slurm:
        from shared.config import RecipeError

        raise RecipeError(f"policy.nodes is {recipe.policy.nodes}: a cluster has several; use --launcher slurm")
    match launcher:
        case Launcher.local:
            from deploy.local import check_environments, check_gpus

            check_environments(recipe)
            check_gpus(recipe)
        case Launcher.slurm:
            from deploy.slurm.launcher import check_recipe

            check_recipe(recipe)
        case Launcher.compose:
            from deploy.compose import check_images

            check_images(recipe)


def start(launcher: Launcher, recipe: Recipe, folder: Path, verbose: bool) -> int:
    """Run what `folder` holds to its end, or to the end of a person's patience; the exit code."""
    match launcher:
        case Launcher.local:
            from deploy.cli.supervise import supervise

            return supervise(recipe, folder, verbose)
        case Launcher.slurm:
            from deploy.cli.slurm import submit_and_follow

            return submit_and_follow(recipe, folder, verbose)
        case Launcher.compose:
            from deploy.cli.supervise import supervise
            from deploy.compose import containers

            return supervise(recipe, folder, verbose, containers)


def runner(folder: Path) -> str | None:
    """Who runs what `folder` holds now, for a person; None if nobody does."""
    from deploy.local import holder, launcher_of

    owner = holder(folder)
    if owner is not None:
        return f"supervised by process {owner}"
    if launcher_of(folder) == Launcher.slurm.value:
        from deploy.slurm.launcher import state_of

        return state_of(folder)
    if launcher_of(folder) == Launcher.compose.value:
        from deploy.compose.left import running

        return "in containers whose launcher has ended" if running(folder) else None
    return None
