"""Which device the ranks of a replica compute on: each on a GPU of its own, or all on CPUs.

Rank 0 chooses for all, since their collectives are of one kind; the others take what it chose. Invariant: the choice is
made, and GPUs of other ranks are out of sight, before anything of CUDA is touched.
"""

from __future__ import annotations

import torch

from shared import gpus
from shared.config import Recipe, RecipeError
from shared.telemetry import get_logger

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def choose_device(recipe: Recipe, here: int) -> torch.device:
    """The device of rank 0, which has `here` ranks of its replica on its node, itself among them.

    RecipeError if the recipe wants GPUs (as `prepare` of shared/nccl/device.py has it) and there are too few of them.
    """
    found = len(gpus.identities())
    if found >= here and torch.version.cuda is not None:
        get_logger().info("this replica computes on GPUs", found=found, ranks=here, torch=torch.__version__)
        return GPU
    got = f"{found} GPUs for {here} ranks on this node, and torch {torch.__version__}"
    if recipe.weights.backend == "nccl":
        raise RecipeError(
            f'expected a GPU for each rank of a policy (weights.backend = "nccl"), and a torch that was built for '
            f'them, got {got}; give it more GPUs, install that torch, or set weights.backend = "auto"'
        )
    if found:
        get_logger().warning("this replica computes on CPUs, and leaves the GPUs that are here", got=got)
    else:
        get_logger().info("this replica computes on CPUs: no GPU is here")
    return CPU


def take_device(place: int | None) -> torch.device:
    """The device of a further rank: the GPU at that place of those of its node, or the CPU. GpuError."""
    if place is None:
        return CPU
    gpus.take(place)
    if gpus.first_gpu() is None or torch.version.cuda is None:
        raise gpus.GpuError(
            f"expected a GPU, and a torch that was built for it, as rank 0 has, got torch {torch.__version__} and "
            f"{gpus.VISIBLE}={gpus.names()}; replicas compute on GPUs with all their ranks or with none"
        )
    return GPU
