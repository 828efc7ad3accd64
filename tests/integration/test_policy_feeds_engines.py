"""A policy of four ranks and real engines: the text that they answer with is that of the model which is exported."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import NewRun
from tests.integration.run import Run
from tests.integration.test_engines import ENGINE_S, wants

pytestmark = [pytest.mark.integration, pytest.mark.engines]

NEW_TOKENS = 24
FOUR_RANKS = ("policy.parallel.fsdp=2", "policy.parallel.tp=2", "model.build.kv_heads=2")
LARGE_STEPS = ("sft.batches=60", "train.batches=3", "train.lr=5e-3")
"""After these a model answers otherwise than before."""


def judged(run: Run) -> dict[int, dict[str, dict[str, Any]]]:
    """What the rollout answered to the held-out problems, greedily, by version and prompt."""
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in (run.folder / "samples" / "rollout-0.jsonl").read_text().splitlines():
        answer = json.loads(line)
        if answer["purpose"] == "eval":
            version, newest = answer["versions"]
            assert version == newest, "a verdict is on one version"
            found[version][answer["prompt"]] = answer
    return found


def greedy(model: Any, tokenizer: Any, prompt: str, most: int) -> tuple[str, int]:
    """What transformers' own generate answers: its text without the token that ended it, and its tokens in all."""
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    made = model.generate(tokens, do_sample=False, max_new_tokens=most)[0, tokens.shape[1] :].tolist()
    words = made[:-1] if made[-1] == tokenizer.eos_token_id else made
    return tokenizer.decode(words, clean_up_tokenization_spaces=False), len(made)


@pytest.mark.parametrize(
    ("engine", "tp"),
    [
        ("sglang", 1),
        ("vllm", 2),
        pytest.param("vllm", 1, marks=pytest.mark.slow),
        pytest.param("sglang", 2, marks=pytest.mark.slow),
    ],
)
def test_an_engine_fed_by_four_ranks_says_what_the_exported_model_says(
    new_run: NewRun, recipe: Path, engine: str, tp: int
) -> None:
    wants(engine)
    run = new_run().up(recipe, *FOUR_RANKS, *LARGE_STEPS, f"rollout.engine={engine}", f"rollout.parallel.tp={tp}")
    assert run.wait(ENGINE_S) == 0, run.story()
    run.assert_complete()
    answers = judged(run)
    first, last = answers[60], answers[63]
    exported = run.folder / "export"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    said = {prompt: (answer["completions"][0], answer["lengths"][0]) for prompt, answer in last.items()}
    assert said == {prompt: greedy(model, tokenizer, prompt, NEW_TOKENS) for prompt in said}
    assert len(said) == 10 and said.keys() == first.keys()
    changed = [prompt for prompt in last if first[prompt]["completions"] != last[prompt]["completions"]]
    assert changed, "an engine that was left with older weights would not be noticed"
