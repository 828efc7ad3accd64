"""What a replica computes on: GPUs with all its ranks, or CPUs; what is said where a recipe wants more than is there.

No GPU is wanted here: what the driver and torch would tell is pretended.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import Backend, BackendConfig

from services.policy.device import CPU, GPU, choose_device, take_device
from services.policy.ranks.group import BACKENDS
from services.policy.ranks.nodes import Nodes
from shared import gpus
from shared.config import RecipeError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(count: int, cuda: str | None = "13.0") -> None:
        monkeypatch.setattr(gpus, "identities", lambda: tuple(map(str, range(count))))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv(gpus.VISIBLE, ",".join(map(str, range(count))))

    return has


@pytest.mark.parametrize(
    ("found", "cuda", "ranks", "device"),
    [
        (0, "13.0", 1, CPU),
        (1, "13.0", 1, GPU),
        (2, "13.0", 2, GPU),
        (4, "13.0", 2, GPU),
        (1, "13.0", 2, CPU),
        (1, None, 1, CPU),
    ],
    ids=["no GPU", "its own", "one each", "more than it needs", "too few for all", "a torch for CPUs"],
)
def test_all_ranks_compute_on_gpus_or_none(
    tools: Any, machine: Any, found: int, cuda: str | None, ranks: int, device: torch.device
) -> None:
    machine(found, cuda)
    assert choose_device(tools.recipe(), ranks) == device


@pytest.mark.parametrize(("found", "cuda"), [(1, "13.0"), (2, None)], ids=["too few", "a torch for CPUs"])
def test_where_the_recipe_wants_gpus_too_few_are_refused_with_what_is_there(
    tools: Any, machine: Any, found: int, cuda: str | None
) -> None:
    machine(found, cuda)
    recipe = tools.recipe(weights__backend="nccl")
    with pytest.raises(RecipeError, match=f"expected a GPU for each rank.*got {found} GPUs for 2 ranks.*torch"):
        choose_device(recipe, 2)


def test_a_further_rank_does_as_rank_0_does(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2)
    assert take_device(None) == CPU
    assert take_device(1) == GPU
    machine(2, None)
    with pytest.raises(gpus.GpuError, match="expected a GPU, and a torch that was built for it, as rank 0 has"):
        take_device(1)


def test_ranks_count_the_gpus_of_their_own_node() -> None:
    nodes = Nodes.parse("a:3,b:2", "ssh {node}", 5)
    assert [nodes.place(rank) for rank in range(5)] == [0, 1, 2, 0, 1]
    assert (nodes.here_too, Nodes.here(4).here_too) == (3, 4)


def test_what_lies_on_gpus_goes_by_nccl_and_all_else_by_gloo() -> None:
    assert BackendConfig(Backend(BACKENDS["cuda"])).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
