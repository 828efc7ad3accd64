"""What a seed stands for: the recipe, the fleet, how quick everyone is."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from shared.config import Recipe
from shared.messages import DatasetIdentity, Device

NCCL = "2.32.3"
DATASETS = (DatasetIdentity("train", 40, "aa"), DatasetIdentity("heldout", 6, "bb"))


@dataclass
class Plan:
    """`ranks` are those of each replica by name; `speed` multiplies how long a replica takes for anything."""

    seed: int
    recipe: Recipe
    segment_bytes: int
    replicas: dict[str, int]
    speed: dict[str, float]
    wall_shift_s: float = 0.0
    batches: int = field(init=False)

    def __post_init__(self) -> None:
        self.batches = sum(t.batches for t in (self.recipe.sft, self.recipe.train) if t is not None)

    def device(self, replica: str, rank: int) -> Device | None:
        """The GPU of a rank: all have one where meshes must be NCCL's; else some have none, and two may share one."""
        backend = self.recipe.weights.backend
        draw = random.Random(f"{self.seed}/gpu/{replica}/{rank}")
        if backend == "gloo" or (backend == "auto" and draw.random() < 0.2):
            return None
        shared = backend == "auto" and draw.random() < 0.2
        return Device(gpu="shared" if shared else f"{replica}.{rank}", nccl=NCCL)


def plan_of(seed: int) -> Plan:
    """The plan of a seed."""
    draw = random.Random(f"{seed}/plan")
    deterministic = draw.random() < 0.25
    sft, train = draw.random() < 0.75, draw.random() < 0.95
    train = train or not sft
    minibatches = draw.choice([1, 1, 2])
    batch = {"dataset": "train", "lr": 1e-3}
    evaluation = draw.random() < 0.7
    tree: dict[str, Any] = {
        "run": {"seed": seed, "deterministic": deterministic},
        "model": {"build": {}},
        "data": {
            "train": {"kind": "reasoning_gym", "task": "chain_sum"},
            "heldout": {"kind": "reasoning_gym", "task": "chain_sum", "seed": 1},
        },
        "rollout": {"slots": draw.choice([2, 4, 16]), "replicas": 1},
        "checkpoint": {"every": draw.randint(1, 4), "keep": draw.choice([1, 2, 2])},
        "bus": {"heartbeat_s": 0.5, "lost_after_s": draw.choice([2.0, 4.0]), "resend_s": 0.5, "window": 32},
        "timeouts": {
            "register_s": 20.0,
            "load_s": 12.0,
            "lease_s": draw.choice([8.0, 15.0]),
            "step_s": 12.0,
            "checkpoint_s": 10.0,
            "mesh_s": 4.0,
            "transfer_s": 6.0,
            "rejoin_s": draw.choice([3.0, 6.0]),
            "stall_s": 120.0,
            "exit_s": 4.0,
        },
        "journal": {"snapshot_every": draw.choice([15, 60, 5000])},
    }
    if sft:
        tree["sft"] = {**batch, "batches": draw.randint(1, 3), "batch_size": draw.randint(2, 4)}
        if evaluation and draw.random() < 0.4:
            tree["sft"]["stop"] = {"accuracy": draw.choice([0.5, 0.9]), "every": draw.randint(1, 2)}
    if train:
        tree["train"] = {
            **batch,
            "batches": draw.randint(2, 5),
            "batch_size": minibatches * draw.randint(1, 3),
            "minibatches": minibatches,
            "mu": draw.choice([1, 1, 2]),
            "samples": 2,
            "max_staleness": 0 if deterministic else draw.randint(0, 4),
            "filter_equal_rewards": draw.random() < 0.6,
        }
    if evaluation:
        suite = {"problems": draw.randint(2, 6)}
        tree["evaluation"] = {"every": draw.randint(1, 3), "suites": {"heldout": suite}}
    rollouts = 1 if deterministic else draw.randint(1, 4)
    names = ["policy-0", *(f"rollout-{number}" for number in range(rollouts))]
    segment_bytes = draw.choice([1 << 10, 1 << 14, 1 << 20])
    replicas = {name: draw.choice([1, 1, 1, 2, 3]) for name in names}
    speed = {name: draw.choice([0.5, 1.0, 1.0, 1.0, 2.0]) for name in names}
    if not deterministic:
        _draw_policies(seed, tree, replicas, speed)
    if evaluation:
        _draw_evaluators(seed, deterministic, tree, replicas, speed)
    _draw_fanout(seed, deterministic, tree, replicas, speed)
    _draw_backend(seed, tree)
    return Plan(seed, Recipe.model_validate(tree), segment_bytes, replicas, speed)


def _draw_backend(seed: int, tree: dict[str, Any]) -> None:
    """Meshes of NCCL in some lives, or of whichever the members' GPUs allow.

    From a stream of its own, so that the other lives are what they were before.
    """
    draw = random.Random(f"{seed}/backend")
    if draw.random() < 0.35:
        tree["weights"]["backend"] = draw.choice(["nccl", "auto"])
        tree["timeouts"]["mint_s"] = draw.choice([1.5, 3.0])


def _draw_fanout(
    seed: int, deterministic: bool, tree: dict[str, Any], replicas: dict[str, int], speed: dict[str, float]
) -> None:
    """How many transfers a source serves at a time, and in some lives more rollouts than one source serves soon."""
    draw = random.Random(f"{seed}/fanout")
    tree["weights"] = {"fanout": draw.choice([1, 2, 2, 3]), "slow_s": draw.choice([1.0, 3.0, 10.0])}
    tree["weights"]["every"] = random.Random(f"{seed}/sync interval").choice([1, 1, 2, 4])
    if not deterministic and draw.random() < 0.25:
        for number in range(4, 4 + draw.randint(2, 5)):
            replicas[f"rollout-{number}"] = draw.choice([1, 1, 2])
            speed[f"rollout-{number}"] = draw.choice([0.5, 1.0, 2.0, 6.0])


def _draw_policies(seed: int, tree: dict[str, Any], replicas: dict[str, int], speed: dict[str, float]) -> None:
    """Several policies in some lives, and more batches for them to join in.

    From a stream of its own, so that the other lives are what they were before.
    """
    draw = random.Random(f"{seed}/policies")
    count = draw.choice([1, 1, 2, 3])
    tree["policy"] = {"replicas": count}
    if count > 1 and "train" in tree:
        tree["train"]["batches"] = draw.randint(6, 16)
    for number in range(1, count):
        replicas[f"policy-{number}"] = draw.choice([1, 1, 2])
        speed[f"policy-{number}"] = draw.choice([0.5, 1.0, 1.0, 2.0])


def _draw_evaluators(
    seed: int, deterministic: bool, tree: dict[str, Any], replicas: dict[str, int], speed: dict[str, float]
) -> None:
    """Who judges, and on what: evaluators of their own in some lives, several suites in some.

    From a stream of its own, so that the other lives are what they were before there were evaluators.
    """
    draw = random.Random(f"{seed}/evaluators")
    if draw.random() < 0.25:
        tree["evaluation"]["suites"]["sampled"] = {
            "dataset": "heldout",
            "problems": draw.randint(1, 4),
            "samples": draw.randint(1, 3),
            "temperature": 1.0,
        }
    if draw.random() < 0.5:
        count = 1 if deterministic else draw.choice([1, 1, 2])
        tree["evaluator"] = {"engine": "own", "replicas": count, "slots": draw.choice([2, 4, 16])}
        for number in range(count):
            replicas[f"evaluator-{number}"] = draw.choice([1, 1, 1, 2, 3])
            speed[f"evaluator-{number}"] = draw.choice([0.5, 1.0, 2.0, 4.0])
