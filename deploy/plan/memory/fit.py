"""A whole recipe's memory against what there is, and which knob frees how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.plan.launch import launch_plan
from deploy.plan.memory.engine import engine_processes
from deploy.plan.memory.model import ModelShape
from deploy.plan.memory.parts import GIB, MIB, Phase, ProcessMemory, fullest
from deploy.plan.memory.policy import policy_processes
from shared.config import Recipe

GPUS = {
    "L4-24GB": 23034,
    "RTX4090-24GB": 24564,
    "A100-40GB": 40960,
    "L40S-48GB": 46068,
    "A100-80GB": 81920,
    "H100-80GB": 81559,
    "H200-141GB": 143771,
    "B200-180GB": 183359,
}
"""Memory of known cards in MiB, as nvidia-smi tells it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the fullest process of a role fits: what it `needs` of what there `is`, in bytes."""

    role: str
    process: ProcessMemory
    phase: Phase
    needs: int
    available: int

    @property
    def fits(self) -> bool:
        """True if it does."""
        return self.needs <= self.available


@dataclass(frozen=True, slots=True)
class Knob:
    """A change of the recipe and the bytes that it frees of the fullest process of a role."""

    setting: str
    frees: int


def gpu_bytes(name: str) -> int:
    """Memory of a card by its name, or by a size such as 24GB. ValueError."""
    if name in GPUS:
        return GPUS[name] * MIB
    number = name.upper().removesuffix("GB")
    if number.replace(".", "", 1).isdigit():
        return int(float(number) * GIB)
    raise ValueError(f"--gpu {name}: expected a size such as 24GB, or one of {', '.join(GPUS)}")


def replicas(recipe: Recipe) -> dict[str, list[str]]:
    """The names of each role's replicas, which all hold a model."""
    found: dict[str, list[str]] = {}
    for replica in launch_plan(recipe).replicas:
        found.setdefault(replica.role, []).append(replica.name)
    return found


def processes(recipe: Recipe, shape: ModelShape, gpu: int | None) -> dict[str, list[ProcessMemory]]:
    """The processes of every replica. ValueError for a layout that the model cannot have."""
    found: dict[str, list[ProcessMemory]] = {}
    for role, names in replicas(recipe).items():
        for name in names:
            if role == "policy":
                found[name] = policy_processes(recipe, shape, gpu=gpu is not None)
            else:
                found[name] = engine_processes(recipe, shape, name, gpu)
    return found


def verdicts(recipe: Recipe, shape: ModelShape, gpu: int | None, ram: int) -> list[Verdict]:
    """With GPUs, one a rank: the fullest of each role on its card. Without: all processes in this machine's `ram`."""
    found = processes(recipe, shape, gpu)
    if gpu is None:
        return [_machine(found, ram)]
    answers = []
    for role, names in replicas(recipe).items():
        on_cards = [process for name in names for process in found[name] if process.device]
        if on_cards:
            worst = max(on_cards, key=lambda process: fullest(process.device).total)
            phase = fullest(worst.device)
            answers.append(Verdict(role, worst, phase, phase.total, gpu))
    return answers


def host_bytes(found: dict[str, list[ProcessMemory]]) -> dict[str, int]:
    """Memory of the host that each replica's processes need together, if all are at their fullest at one time."""
    return {name: sum(fullest(process.host).total for process in own) for name, own in found.items()}


def _machine(found: dict[str, list[ProcessMemory]], ram: int) -> Verdict:
    needs = host_bytes(found)
    everything = ProcessMemory("this machine", f"{len(found)} replicas", (), (Phase("all at once", needs),))
    return Verdict("this machine", everything, everything.host[0], sum(needs.values()), ram)


def cards(recipe: Recipe, shape: ModelShape) -> dict[str, list[str]]:
    """The known cards on which each role fits."""
    found: dict[str, list[str]] = {}
    for name in GPUS:
        for verdict in verdicts(recipe, shape, gpu_bytes(name), 0):
            found.setdefault(verdict.role, [])
            if verdict.fits:
                found[verdict.role].append(name)
    return found


def knobs(recipe: Recipe, shape: ModelShape, gpu: int | None, role: str, ram: int) -> list[Knob]:
    """Settings that would free memory of the role's fullest process, the largest first; each was planned anew."""
    before = _needs(recipe, shape, gpu, role, ram)
    found = []
    for keys in _changes(recipe, shape, role):
        try:
            changed = Recipe.model_validate(_with(recipe.model_dump(exclude_none=True), keys))
            frees = before - _needs(changed, shape, gpu, role, ram)
        except ValueError:  # a mix that the model, or the schema, does not allow
            continue
        if frees > 0:
            found.append(Knob(" ".join(f"--set {key}={_written(value)}" for key, value in keys.items()), frees))
    return sorted(found, key=lambda knob: -knob.frees)


def _needs(recipe: Recipe, shape: ModelShape, gpu: int | None, role: str, ram: int) -> int:
    return next(v.needs for v in verdicts(recipe, shape, gpu, ram) if v.role == role)


def _changes(recipe: Recipe, shape: ModelShape, role: str) -> Iterator[dict[str, Any]]:
    """What a person may turn, one thing at a time."""
    policy, rollout = recipe.policy, recipe.rollout
    if role in ("policy", "this machine"):
        if not policy.gradient_checkpointing:
            yield {"policy.gradient_checkpointing": True}
        if policy.micro_batch_tokens > 1:
            yield {"policy.micro_batch_tokens": policy.micro_batch_tokens // 2}
        if recipe.model.dtype == "float32":
            yield {"model.dtype": "bfloat16"}
        if recipe.train is not None and recipe.train.mu * recipe.train.minibatches > 1:
            yield {"train.mu": 1, "train.minibatches": 1}
    if role == "policy":
        parallel = policy.parallel
        for axis in ("fsdp", "tp", "pp", *(("ep",) if shape.experts else ())):
            yield {f"policy.parallel.{axis}": 2 * getattr(parallel, axis)}
        if parallel.tp > 1 and not parallel.sequence:
            yield {"policy.parallel.sequence": True}
    if role in ("rollout", "evaluator"):
        yield {"rollout.parallel.tp": 2 * rollout.parallel.tp}
        if rollout.quantization is None and role == "rollout":
            yield {"rollout.quantization": "fp8"}
    if role == "this machine":
        yield {"rollout.slots": max(1, rollout.slots // 2)}


def _with(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in keys.items():
        *tables, key = dotted.split(".")
        table = tree
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return tree


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
