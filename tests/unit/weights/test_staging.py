"""Staged copies of weights and loading them in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.config.schema import BuildTable, ModelTable
from shared.models import load_model
from shared.weights import TensorSpec, WeightsError, digest_of, load_into, manifest_of
from tests.staged import stage


class Mixed(nn.Module):
    """Tied and untied parameters, persistent and other buffers, several types and odd shapes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.scalar = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("kept", torch.randint(0, 9, (3,)))
        self.register_buffer("derived", torch.randn(2), persistent=False)


def test_the_manifest_lists_everything_once_in_the_models_order() -> None:
    assert manifest_of(Mixed(0)) == [
        TensorSpec("short", "bfloat16", [5]),
        TensorSpec("scalar", "float32", []),
        TensorSpec("nothing", "float32", [0, 4]),
        TensorSpec("kept", "int64", [3]),
        TensorSpec("embed.weight", "float32", [7, 3]),
    ]


def test_weights_of_built_models_are_staged_with_ties_once() -> None:
    table = ModelTable(
        build=BuildTable(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, head_dim=8)
    )
    model = load_model(table, 0, weights=True)
    staged = stage(model)
    assert list(staged.tensors) == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in staged.tensors


def test_a_staged_copy_does_not_follow_the_trainer() -> None:
    model = Mixed(0)
    staged = stage(model)
    before = {name: tensor.clone() for name, tensor in staged.tensors.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in staged.tensors.items())
    assert digest_of(staged.tensors) == staged.digest != stage(model).digest


def test_loading_makes_models_equal_in_place_and_keeps_ties() -> None:
    source, target = Mixed(0), Mixed(1)
    places = [parameter.data_ptr() for parameter in target.parameters()]
    derived = target.derived.clone()
    load_into(target, stage(source).tensors)
    assert stage(target).digest == stage(source).digest
    assert [parameter.data_ptr() for parameter in target.parameters()] == places
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.head.weight, source.embed.weight)
    assert torch.equal(target.derived, derived)
    assert all(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("short"), "'short': expected torch.bfloat16 .5., got no such tensor"),
        (
            lambda tensors: tensors.update(short=tensors["short"].float()),
            "expected torch.bfloat16 .5., got torch.float32",
        ),
        (lambda tensors: tensors.update(short=tensors["short"][:4]), "expected torch.bfloat16 .5., got .* .4."),
        (lambda tensors: tensors.update(more=tensors["short"]), "'more': expected no such tensor, got torch.bfloat16"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(change, text: str) -> None:
    target = Mixed(1)
    before = stage(target).digest
    tensors = dict(stage(Mixed(0)).tensors)
    change(tensors)
    with pytest.raises(WeightsError, match=text):
        load_into(target, tensors)
    assert stage(target).digest == before


def test_tensors_with_memory_in_common_but_other_shapes_are_both_staged() -> None:
    model = nn.Module()
    base = torch.randn(6)
    model.register_buffer("flat", base)
    model.register_buffer("square", base.view(2, 3))
    assert [spec.name for spec in manifest_of(model)] == ["flat", "square"]
