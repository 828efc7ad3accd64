"""The memory plan: held to what autograd keeps, published sizes, sums by hand, and the recipes' own headers."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.plan import launch_plan
from deploy.plan.memory import fit
from deploy.plan.memory.activations import Line
from deploy.plan.memory.model import ModelShape, shape_of
from deploy.plan.memory.parts import GIB, fullest
from deploy.plan.memory.policy import held_by, policy_processes
from deploy.plan.memory.published import PUBLISHED
from services.policy.batch import Row, TrainSequence
from services.policy.decoder import text_model
from services.policy.layouts.compose import Layout
from shared.config import Recipe, load_recipe
from shared.config.schema import BuildTable, ModelTable, PolicyParallelTable
from shared.models import load_model
from shared.weights.slices import Parallel

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))
HARDWARE = re.compile(r"^# Hardware: (\S+) x (\d+): (.+)$", re.MULTILINE)
VARIANT = re.compile(r"^# Variant: [^:]+: (.+)$", re.MULTILINE)


def recipe_of(path: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": path, "dtype": "bfloat16"},
            "data": {"rows": {"kind": "reasoning_gym", "task": "chain_sum"}},
            "train": {"dataset": "rows", "batches": 1, "batch_size": 1, "lr": 1e-3},
        }
    )


def kept_by_forward(model: Any, lengths: list[int]) -> tuple[dict[int, int], int]:
    """Bytes that a real forward keeps for backward in each layer, weights apart, and the tokens of its line."""
    layout = Layout(model)
    rows = []
    for group, length in enumerate(lengths):
        prompt, tokens, logprobs = np.zeros(16, np.int32), np.full(length, 3, np.int32), np.zeros(length, np.float32)
        rows.append(Row((TrainSequence(group, 1, 0, prompt, tokens, logprobs, 1.0, 1.0),)))
    (micro,) = layout.micro_batches(rows, 1 << 20)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = defaultdict(int)
    seen: dict[int, torch.Tensor] = {}
    at = [-1]
    for index, layer in enumerate(text_model(model).layers):
        layer.register_forward_pre_hook(
            lambda _module, _args, _kwargs, index=index: at.__setitem__(0, index), with_kwargs=True
        )

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and place not in seen:
            seen[place] = tensor  # alive, so that no other tensor takes its place
            sizes[at[0]] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layout.decoder(micro)
    return sizes, micro.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_activations_of_a_layer_are_what_a_forward_keeps(family: Any, dtype: Any) -> None:
    table = ModelTable(
        build=BuildTable(
            family=family, hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=2, head_dim=16, context=512
        ),
        dtype=dtype,
    )
    for lengths, ragged, tolerance in (([100] * 4, False, 0.002), ([100, 50, 20, 99], True, 0.05)):
        sizes, tokens = kept_by_forward(load_model(table, 0, weights=True), lengths)
        line = Line(shape_of(table), PolicyParallelTable(), tokens, getattr(torch, dtype).itemsize, ragged)
        # the first layer also has what all share, the last one the norm behind it
        assert line.kept_by_layer() == pytest.approx(sizes[1], rel=tolerance)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
        ("Qwen/Qwen2.5-VL-7B", 8_292_166_656),
        ("nvidia/Cosmos-Reason1-7B", 8_292_166_656),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_published_shapes_have_their_models_parameters(name: str, parameters: int) -> None:
    assert name in PUBLISHED
    assert shape_of(ModelTable(path=name)).parameters == parameters


@pytest.fixture(scope="module", name="seven")
def _seven() -> ModelShape:
    return shape_of(ModelTable(path="Qwen/Qwen2.5-7B-Instruct"))


def test_static_parts_of_a_rank_are_sixteen_bytes_a_parameter_and_two_for_the_reference(seven: ModelShape) -> None:
    (process,) = policy_processes(recipe_of("Qwen/Qwen2.5-7B-Instruct"), seven, gpu=True)
    parts = process.device[0].parts
    n = 7_615_616_512
    assert (parts["weights"], parts["float32 masters"], parts["optimizer moments"]) == (2 * n, 4 * n, 8 * n)
    assert (parts["reference weights"], parts["gradients added up"]) == (2 * n, 4 * n)


def with_policy(**policy: Any) -> Recipe:
    tree = recipe_of("Qwen/Qwen2.5-7B-Instruct").model_dump(exclude_none=True)
    tree["policy"] = {**tree["policy"], **policy}
    return Recipe.model_validate(tree)


def test_ranks_of_a_layout_hold_the_model_once(seven: ModelShape) -> None:
    parallel = Parallel.of(with_policy(parallel={"fsdp": 4, "pp": 2}).policy.parallel)
    held = [held_by(seven, parallel, rank).own for rank in range(parallel.world)]
    assert sum(held) == seven.parameters


def test_what_ranks_hand_on_is_the_model_once_though_several_hold_the_same(seven: ModelShape) -> None:
    parallel = Parallel.of(with_policy(parallel={"fsdp": 2, "cp": 2, "tp": 2}).policy.parallel)
    held = [held_by(seven, parallel, rank) for rank in range(parallel.world)]
    assert sum(each.owned for each in held) == seven.parameters < sum(each.own for each in held)


@pytest.mark.parametrize(("replicas", "copies"), [(1, 1), (2, 2)])
def test_rank_0_keeps_the_state_that_was_saved_last_and_one_for_a_joiner(
    seven: ModelShape, replicas: int, copies: int
) -> None:
    first, *others = policy_processes(with_policy(parallel={"fsdp": 2}, replicas=replicas), seven, gpu=True)
    saved = {
        part: size
        for part, size in first.host[-1].parts.items()
        if part in ("copy for checkpoints", "copy for a joiner")
    }
    assert saved and set(saved.values()) == {16 * seven.parameters} and len(saved) == copies
    assert all(not phase.parts.get("copy for checkpoints") for other in others for phase in other.host)


@pytest.mark.parametrize("axis", ["fsdp", "tp", "pp"])
def test_every_axis_that_cuts_weights_frees_memory(seven: ModelShape, axis: str) -> None:
    alone, shared = (
        max(fullest(each.device).total for each in policy_processes(recipe, seven, gpu=True))
        for recipe in (
            with_policy(gradient_checkpointing=True),
            with_policy(gradient_checkpointing=True, parallel={axis: 2}),
        )
    )
    assert shared < 0.7 * alone


def test_checkpointing_keeps_a_layers_input_alone(seven: ModelShape) -> None:
    kept, again = (
        policy_processes(with_policy(gradient_checkpointing=each), seven, gpu=True)[0].device[0].parts["activations"]
        for each in (False, True)
    )
    line = Line(seven, PolicyParallelTable(), 16384, 2)
    assert kept >= 28 * line.kept_by_layer()
    assert again < kept / 10


def test_knobs_free_what_a_new_plan_says(seven: ModelShape) -> None:
    recipe = with_policy(micro_batch_tokens=4096)
    (verdict, *_) = fit.verdicts(recipe, seven, 80 * GIB, 0)
    best = fit.knobs(recipe, seven, 80 * GIB, "policy", 0)
    turned = fit.verdicts(with_policy(micro_batch_tokens=4096, gradient_checkpointing=True), seven, 80 * GIB, 0)[0]
    frees = {knob.setting: knob.frees for knob in best}
    assert frees["--set policy.gradient_checkpointing=true"] == verdict.needs - turned.needs
    assert [knob.frees for knob in best] == sorted(frees.values(), reverse=True)


def test_an_engine_on_a_gpu_makes_its_cache_of_what_weights_leave(seven: ModelShape) -> None:
    tree = recipe_of("Qwen/Qwen2.5-7B-Instruct").model_dump(exclude_none=True)
    tree["rollout"] = {**tree["rollout"], "engine": "vllm", "memory": 0.5}
    recipe = Recipe.model_validate(tree)
    roomy, tight = ({v.role: v for v in fit.verdicts(recipe, seven, size * GIB, 0)}["rollout"] for size in (80, 32))
    assert roomy.fits and sum(roomy.phase.parts.values()) == 80 * GIB
    assert not tight.fits  # half of it does not hold the weights and one sequence


def test_narrow_weights_take_about_half(seven: ModelShape) -> None:
    from deploy.plan.memory.engine import engine_weights

    whole, narrow = (engine_weights(seven, 2, each) for each in (None, "fp8"))
    head = 2 * 152064 * 3584 * 2  # embeddings and head stay as they are
    assert narrow - head == pytest.approx((whole - head) / 2, rel=0.01)


# --- recipes ----------------------------------------------------------------------------------------------------------


def variants() -> list[Any]:
    """Every recipe, and each of the variants that its header tells."""
    found = []
    for path in RECIPES:
        sets = [line.replace("--set ", "").split() for line in VARIANT.findall(path.read_text(encoding="utf-8"))]
        found += [pytest.param(path, keys, id=" ".join([path.stem, *keys])) for keys in ([], *sets)]
    return found


@pytest.mark.parametrize(("path", "keys"), variants())
def test_recipes_are_valid_and_fit_the_hardware_of_their_header(path: Path, keys: list[str]) -> None:
    recipe = load_recipe(path, keys)
    named = HARDWARE.search(path.read_text(encoding="utf-8"))
    if named is None:
        assert recipe.model.build is not None or recipe.model.path == "models/smollm2-135m", "name the hardware"
        return
    card, count, shares = named[1], int(named[2]), dict(share.split() for share in named[3].split(", "))
    gpu = fit.gpu_bytes(card)
    shape = shape_of(recipe.model)
    for verdict in fit.verdicts(recipe, shape, gpu, 0):
        assert verdict.fits, f"{verdict.role} needs {verdict.needs / GIB:.1f} GiB of {card}: {verdict.phase.parts}"
    if keys:
        return
    cards: dict[str, int] = defaultdict(int)
    for name, own in fit.processes(recipe, shape, gpu).items():
        cards[name.rpartition("-")[0]] += sum(bool(process.device) for process in own)
    assert {role: int(number) for role, number in shares.items()} == {r: n for r, n in cards.items() if n}
    assert sum(cards.values()) == count


def test_the_plan_has_every_replica_that_is_launched(seven: ModelShape) -> None:
    recipe = with_policy(replicas=2)
    launched = {process.name for process in launch_plan(recipe).replicas}
    assert set(fit.processes(recipe, seven, None)) == launched
