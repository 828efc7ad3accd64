"""Models built from a seed, and models loaded from folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from shared.config.schema import BuildTable, ModelTable
from shared.models import ModelError, load_config, load_model, load_tokenizer

FAMILIES = ["qwen2", "qwen3", "qwen3_moe", "llama"]
TOKENS = torch.tensor([[2, 40, 50, 60], [2, 70, 80, 90]])


def small(family: str = "qwen3", dtype: str = "float32", **sizes: object) -> ModelTable:
    settings = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
    return ModelTable(build=BuildTable(family=family, **(settings | sizes)), dtype=dtype)


def same_bits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds_and_runs(family: str) -> None:
    table = small(family)
    model = load_model(table, 0, weights=True)
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.shape == (2, 4, len(load_tokenizer(table)))
    assert logits.isfinite().all()
    assert not model.training
    assert model.config.model_type == family
    assert (model.config.num_hidden_layers, model.config.head_dim) == (2, 8)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (4 * 8, 32)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_alone_decides_the_weights(family: str) -> None:
    torch.manual_seed(1)
    first = load_model(small(family), 5, weights=True)
    torch.manual_seed(2)
    second = load_model(small(family), 5, weights=True)
    assert same_bits(first, second)
    assert not same_bits(first, load_model(small(family), 6, weights=True))


def test_building_leaves_the_processes_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(small(), 5, weights=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_are_one_parameter_and_untied_ones_are_two(family: str) -> None:
    tied = load_model(small(family, tie_embeddings=True), 0, weights=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = load_model(small(family, tie_embeddings=False), 0, weights=True)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_bfloat16_models_keep_rotary_frequencies_in_float32() -> None:
    half, full = (load_model(small(dtype=dtype), 0, weights=True) for dtype in ("bfloat16", "float32"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert torch.equal(half.model.rotary_emb.inv_freq, full.model.rotary_emb.inv_freq)
    assert half(TOKENS).logits.dtype == torch.bfloat16


def test_the_model_ends_turns_as_the_tokenizer_does() -> None:
    tokenizer, config = load_tokenizer(small()), load_config(small())
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.max_position_embeddings == tokenizer.model_max_length == 512


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads, got 4 and 3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"family": "qwen3_moe", "experts": 2, "experts_per_token": 3}, "at most experts = 2, got 3"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        load_model(small(**sizes), 0, weights=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    load_model(small(), 3, weights=True).save_pretrained(folder)
    load_tokenizer(small()).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_saved_model_loads_with_its_weights_and_ties(saved: Path) -> None:
    loaded = load_model(ModelTable(path=str(saved)), 0, weights=True)
    assert same_bits(loaded, load_model(small(), 3, weights=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.training


def test_a_skeleton_has_everything_but_the_values(copy: Path) -> None:
    loaded = load_model(ModelTable(path=str(copy)), 0, weights=True)
    (copy / "model.safetensors").unlink()
    skeleton = load_model(ModelTable(path=str(copy)), 0, weights=False)
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert not skeleton.training
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (loaded, skeleton)]
    assert shapes[0] == shapes[1]
    skeleton.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(skeleton(TOKENS).logits, loaded(TOKENS).logits)


def test_a_missing_folder_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    table = ModelTable(path=str(tmp_path / "absent"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match="expected a folder at .*absent, found none"):
            load(table)


def test_a_folder_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"expected config\.json in the folder, found notes\.txt"):
        load_model(ModelTable(path=str(tmp_path)), 0, weights=True)


def test_a_half_finished_download_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected weights in \*\.safetensors, found .*finish the download"):
        load_model(ModelTable(path=str(copy)), 0, weights=True)
    index = {"weight_map": {"a": "model-1-of-3.safetensors", "b": "model-2-of-3.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model-1-of-3.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected 2 weight files, 1 are missing \(first: model-2-of-3"):
        load_model(ModelTable(path=str(copy)), 0, weights=True)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not read"):
        load_model(ModelTable(path=str(copy)), 0, weights=True)


def test_a_cut_off_file_is_an_error(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="bytes, found .* the download did not finish"):
        load_model(ModelTable(path=str(copy)), 0, weights=True)


def test_weights_that_do_not_cover_the_model_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"a weight for each parameter of Qwen3ForCausalLM, got files without model\."):
        load_model(ModelTable(path=str(copy)), 0, weights=True)


def test_a_model_without_tokenizer_is_an_error(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="expected a tokenizer beside the model"):
        load_tokenizer(ModelTable(path=str(copy)))
