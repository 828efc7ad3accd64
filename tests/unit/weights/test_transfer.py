"""Weights over a mesh of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from services.policy.layouts.fit import architecture_of
from shared.config.schema import BuildTable, ModelTable
from shared.mesh import Mesh
from shared.models import load_model
from shared.weights import StagedWeights, WeightsError, load_into, manifest_of, receive_weights, send_weights
from shared.weights.slices import Box, Parallel, PolicyLayout
from shared.weights.staging import Shared, allocate, named_weights
from tests.staged import stage
from tests.unit.mesh.threads import on_each_rank


def built(seed: int, family: str = "qwen3", dtype: str = "float32", kv_heads: int = 1) -> nn.Module:
    table = BuildTable(
        family=family,
        hidden_size=16,
        intermediate_size=24,
        layers=2,
        heads=2,
        kv_heads=kv_heads,
        head_dim=8,
        experts=2,
    )
    return load_model(ModelTable(build=table, dtype=dtype), seed, weights=True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize(("dtype", "bucket"), [("float32", 1000), ("bfloat16", 1 << 20)])
def test_receivers_end_with_the_sources_bits(family: str, dtype: str, bucket: int) -> None:
    models = [built(seed, family, dtype) for seed in range(2)]

    def work(mesh: Mesh) -> str:
        model = models[mesh.rank]
        if mesh.rank == 0:
            staged = stage(model)
            assert send_weights(staged, mesh, bucket) > staged.area.memory.numel()
        else:
            staged = receive_weights(manifest_of(model), mesh, bucket)
            assert stage(model).digest != staged.digest
            load_into(model, staged.tensors)
        return staged.digest

    digests = on_each_rank(2, work)
    assert len(set(digests)) == 1
    assert [stage(model).digest for model in models] == digests
    tokens = torch.tensor([[2, 50, 60]])
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.equal(logits[0], logits[1])


def test_a_mesh_carries_one_version_after_another() -> None:
    models = [built(0), built(1)]

    def work(mesh: Mesh) -> list[str]:
        digests = []
        for version in range(3):
            if mesh.rank == 0:
                with torch.no_grad():
                    models[0].lm_head.weight.add_(version)
                staged = stage(models[0])
                send_weights(staged, mesh, 4096)
            else:
                staged = receive_weights(manifest_of(models[1]), mesh, 4096)
            digests.append(staged.digest)
        return digests

    source, receiver = on_each_rank(2, work)
    assert source == receiver
    assert len(set(source)) == 3


def test_a_bit_that_changes_on_the_way_changes_the_receivers_digest() -> None:
    def work(mesh: Mesh) -> str:
        model = built(0)
        if mesh.rank == 0:
            staged = stage(model)
            staged.tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
            send_weights(staged, mesh, 4096)
            return staged.digest
        return receive_weights(manifest_of(model), mesh, 4096).digest

    source, receiver = on_each_rank(2, work)
    assert source != receiver


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: model.model.layers.pop(1), r"expected model\.norm\.weight .*, got model\.layers\.1\."),
        (lambda model: model.to(torch.bfloat16), r"expected model\.embed_tokens\.weight \(bfloat16 .*got .*float32"),
        (lambda model: model.register_buffer("extra", torch.zeros(1)), r"expected extra .*, got model\.embed_tokens"),
    ],
)
def test_another_models_weights_are_refused_by_the_first_tensor_that_differs(change, text: str) -> None:
    def work(mesh: Mesh) -> None:
        model = built(0)
        if mesh.rank == 1:
            change(model)
            with pytest.raises(WeightsError, match=f"do not fit this model: {text}"):
                receive_weights(manifest_of(model), mesh, 4096)
            return
        with pytest.raises(WeightsError, match="expected all 2 ranks to agree on the weights that travel, 1 refused"):
            send_weights(stage(model), mesh, 4096)

    on_each_rank(2, work)


def test_a_mesh_can_be_used_again_after_a_refusal() -> None:
    def work(mesh: Mesh) -> str:
        model = built(mesh.rank)
        if mesh.rank == 0:
            staged = stage(model)
            with pytest.raises(WeightsError, match="1 refused"):
                send_weights(staged, mesh, 1 << 20)
            send_weights(staged, mesh, 4096)
            return staged.digest
        with pytest.raises(WeightsError, match=r"buckets of 4096 bytes, the source sends 1048576"):
            receive_weights(manifest_of(model), mesh, 4096)
        return receive_weights(manifest_of(model), mesh, 4096).digest

    source, receiver = on_each_rank(2, work)
    assert source == receiver


def test_a_head_that_is_none_is_refused() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 0:
            mesh.broadcast(torch.full((1,), 5), 0)
            mesh.broadcast(torch.full((5,), 7, dtype=torch.uint8), 0)
            mesh.all_reduce(torch.zeros(1, dtype=torch.int32))
            mesh.broadcast(torch.full((1,), -1), 0)
            return
        with pytest.raises(WeightsError, match="expected a manifest"):
            receive_weights([], mesh, 4096)
        with pytest.raises(WeightsError, match="a length of -1"):
            receive_weights([], mesh, 4096)

    on_each_rank(2, work)


def test_the_last_rank_does_not_send() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 1:
            with pytest.raises(
                WeightsError, match="expected a mesh of 1 sources .* the receiver, got mesh rank 1 of 2"
            ):
                send_weights(stage(built(0)), mesh, 4096)

    on_each_rank(2, work)


LAYOUTS = {
    "fsdp2": Parallel(fsdp=2),
    "tp2": Parallel(tp=2),
    "fsdp2 x tp2": Parallel(fsdp=2, tp=2),
    "pp2 x tp2": Parallel(pp=2, tp=2),
    "replicate2 x cp2": Parallel(replicate=2, cp=2),
    "ep2 x fsdp2": Parallel(ep=2, fsdp=2),
}


def parts_of(model: nn.Module, parallel: Parallel) -> list[StagedWeights]:
    """What each rank of a policy stages, cut out of the whole model."""
    shared = Shared(manifest_of(model), PolicyLayout(architecture_of(model.config), parallel))
    whole, found = named_weights(model), []
    for boxes in shared.owned():
        area = allocate(shared.part(boxes))
        for name, box in boxes.items():
            area.tensors[name].copy_(whole[name].detach()[box.within(Box.whole(whole[name].shape))])
        found.append(StagedWeights(area, "", shared))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "bucket"), [("qwen3", 1000), ("qwen3_moe", 1 << 20)])
def test_a_receiver_puts_the_parts_of_all_ranks_together_to_the_bit(family: str, bucket: int, layout: str) -> None:
    if family == "qwen3" and "ep2" in layout:
        pytest.skip("there are no experts to share")
    model, parallel = built(0, family, kv_heads=2), LAYOUTS[layout]
    parts, expected = parts_of(model, parallel), stage(model)
    assert sum(part.area.memory.numel() for part in parts) < 2 * expected.area.memory.numel()

    def work(mesh: Mesh) -> int | StagedWeights:
        if mesh.rank < parallel.world:
            return send_weights(parts[mesh.rank], mesh, bucket)
        return receive_weights(manifest_of(model), mesh, bucket)

    *sent, received = on_each_rank(parallel.world + 1, work)
    assert isinstance(received, StagedWeights)
    assert torch.equal(received.area.memory, expected.area.memory) and received.digest == expected.digest
    assert len(set(sent)) == 1 and sent[0] > expected.area.memory.numel()  # type: ignore[operator]


def test_a_part_of_other_weights_than_rank_0_announces_is_refused_on_all_ranks() -> None:
    model = built(0, kv_heads=2)
    parts = parts_of(model, Parallel(tp=2))
    other = parts_of(model, Parallel(fsdp=2))[1]
    takes_part: list[Callable[[Mesh], object]] = [
        lambda mesh: send_weights(parts[0], mesh, 4096),
        lambda mesh: send_weights(other, mesh, 4096),
        lambda mesh: receive_weights(manifest_of(model), mesh, 4096),
    ]

    def work(mesh: Mesh) -> None:
        text = "announces other weights" if mesh.rank == 1 else "expected all 3 ranks to agree .* 1 refused"
        with pytest.raises(WeightsError, match=text):
            takes_part[mesh.rank](mesh)

    on_each_rank(3, work)


def test_a_layout_of_more_ranks_than_the_mesh_has_sources_is_refused() -> None:
    model = built(0, kv_heads=2)
    part = parts_of(model, Parallel(tp=2))[0]
    text = "expected a mesh of 2 sources of these weights and, behind them, the receiver, got mesh rank 0 of 2"

    def work(mesh: Mesh) -> None:
        with pytest.raises(WeightsError, match=text):
            send_weights(part, mesh, 4096)

    on_each_rank(2, lambda mesh: work(mesh) if mesh.rank == 0 else None)
