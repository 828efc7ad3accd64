"""Weights over a mesh of threads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.config.schema import BuildTable, ModelTable
from shared.mesh import Mesh
from shared.models import load_model
from shared.weights import WeightsError, load_into, manifest_of, receive_weights, send_weights, stage
from tests.unit.mesh.threads import on_each_rank


def built(seed: int, family: str = "qwen3", dtype: str = "float32") -> nn.Module:
    table = BuildTable(
        family=family, hidden_size=16, intermediate_size=24, layers=2, heads=2, kv_heads=1, head_dim=8, experts=2
    )
    return load_model(ModelTable(build=table, dtype=dtype), seed, weights=True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize(("dtype", "bucket"), [("float32", 1000), ("bfloat16", 1 << 20)])
def test_receivers_end_with_the_sources_bits(family: str, dtype: str, bucket: int) -> None:
    models = [built(seed, family, dtype) for seed in range(3)]

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

    digests = on_each_rank(3, work)
    assert len(set(digests)) == 1
    assert [stage(model).digest for model in models] == digests
    tokens = torch.tensor([[2, 50, 60]])
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


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
        # the source and the receiver that agrees with it wait for nothing
        staged, manifest = stage(model), manifest_of(model)
        with pytest.raises(WeightsError, match="expected all 2 receivers to take the weights, 1 refused"):
            send_weights(staged, mesh, 4096) if mesh.rank == 0 else receive_weights(manifest, mesh, 4096)

    on_each_rank(3, work)


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


def test_only_rank_0_sends() -> None:
    def work(mesh: Mesh) -> None:
        if mesh.rank == 1:
            with pytest.raises(WeightsError, match="expected mesh rank 0 as the source"):
                send_weights(stage(built(0)), mesh, 4096)

    on_each_rank(2, work)
