"""A policy's model out of its files: what transformers' own loading gives, to the bit, or an error with a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.parallel_table.families import SIZES, tiny
from services.policy.layouts.compose import Layout, load_layout
from shared.models import ModelError, load_model
from shared.models.stored import can_slice

FAMILIES = ["qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "llama"]


def made(family: str) -> PreTrainedModel:
    if family != "llama":
        return tiny(family)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def recipe_of(tools: Any, folder: Path, **model: Any) -> Any:
    recipe = tools.recipe()
    table = type(recipe.model)(path=str(folder), **{"dtype": "float32", **model})
    return recipe.model_copy(update={"model": table})


def load(tools: Any, folder: Path, **model: Any) -> Layout:
    return load_layout(recipe_of(tools, folder, **model), weights=True)


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    mine, theirs = (
        [*each.named_parameters(remove_duplicate=False), *each.named_buffers()] for each in (model, expected)
    )
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    for (name, own), (_, true) in zip(mine, theirs, strict=True):
        assert own.dtype == true.dtype and torch.equal(own, true), name
        assert own.requires_grad == true.requires_grad, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one file", "several", "the model's own names", "narrower"])
def test_the_model_is_transformers_own_to_the_bit(tools: Any, tmp_path: Path, family: str, kind: str) -> None:
    model = made(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if kind == "several" else "1GB")
    if kind == "the model's own names":  # stacks of experts, and today's prefixes
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    assert len(list(tmp_path.glob("*.safetensors"))) > (2 if kind == "several" else 0)
    recipe = recipe_of(tools, tmp_path, dtype="bfloat16" if kind == "narrower" else "float32")
    layout = load_layout(recipe, weights=True)
    assert can_slice(recipe.model)
    assert_same(layout.model, load_model(recipe.model, 0, weights=True))
    tied = layout.model.get_output_embeddings().weight is layout.model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not layout.model.training


def test_without_weights_a_model_has_all_but_values(tools: Any, tmp_path: Path) -> None:
    made("qwen3").save_pretrained(tmp_path)
    wanted = load(tools, tmp_path).manifest
    (tmp_path / "model.safetensors").unlink()
    layout = load_layout(recipe_of(tools, tmp_path), weights=False)
    assert layout.manifest == wanted
    assert not any(weight.is_meta for weight in layout.weights().values())


def test_the_generation_config_comes_along_for_the_export(tools: Any, tmp_path: Path) -> None:
    model = made("qwen2")
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    for weights in (True, False):
        loaded = load_layout(recipe_of(tools, tmp_path), weights=weights).model
        assert loaded.generation_config.eos_token_id == [7, 9]


def test_a_model_of_unknown_ways_is_loaded_whole_by_transformers(tools: Any, tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    recipe = recipe_of(tools, tmp_path, trust_remote_code=True)
    assert not can_slice(recipe.model)
    assert_same(load_layout(recipe, weights=True).model, load(tools, tmp_path).model)


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("family", "edit", "said"),
    [
        ("qwen3", lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"),
         r"of Qwen3ForCausalLM, got files without model\.layers\.1\.self_attn\.q_norm\.weight \(and 0 more\)"),
        ("qwen3", shorter, r"got files with another shape of model\.norm\.weight"),
        ("qwen3_moe", lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"),
         r"with another shape of model\.layers\.2\.mlp\.experts\.gate_up_proj"),
        ("qwen2", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
         r"expected one value of model\.embed_tokens\.weight.*set tie_word_embeddings to false"),
    ],
    ids=["missing", "another shape", "an expert short", "tied and different"],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_name(
    tools: Any, tmp_path: Path, family: str, edit: Any, said: str
) -> None:
    made(family).save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ModelError, match=said):
        load(tools, tmp_path)


def test_tied_weights_may_be_stored_twice_or_under_the_other_name(tools: Any, tmp_path: Path) -> None:
    made("qwen2").save_pretrained(tmp_path)
    expected = load(tools, tmp_path).model
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(load(tools, tmp_path).model, expected)
    change(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    assert_same(load(tools, tmp_path).model, expected)


def test_a_file_that_is_no_safetensors_is_an_error(tools: Any, tmp_path: Path) -> None:
    made("qwen2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"expected safetensors weights of a causal LM, got OSError: .*model\.safet"):
        load(tools, tmp_path)
