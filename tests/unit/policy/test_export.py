"""The Hugging Face export, reloaded by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from services.policy.export import export
from shared.models import load_tokenizer
from shared.weights.staging import named_weights


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_an_export_reloads_with_equal_logits_and_tokens(tools: Any, tmp_path: Path, family: str) -> None:
    recipe = tools.recipe(family)
    model, tokenizer = tools.trainer(recipe).model, load_tokenizer(recipe.model)
    folder = export(model, named_weights(model), tokenizer, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer("What is 3 + 4?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # for model type qwen2 transformers 5 ignores which tokenizer class the files name, and splits words its own way
    kind = PreTrainedTokenizerFast if family == "qwen2" else AutoTokenizer
    assert kind.from_pretrained(folder)("What is 3 + 4?")["input_ids"] == ids[0].tolist()
    assert not list(folder.glob("*.bin"))


def test_a_second_export_replaces_the_first_and_leaves_nothing_else(tools: Any, tmp_path: Path) -> None:
    recipe = tools.recipe()
    model, tokenizer = tools.trainer(recipe).model, load_tokenizer(recipe.model)
    export(model, named_weights(model), tokenizer, tmp_path / "export")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    export(model, named_weights(model), tokenizer, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert (again.lm_head.weight == 0).all()
