"""A Llama with tied embeddings through model.path: engine, policy's export and Hugging Face say the same words.

Once with a tiny model made here, once with SmolLM2-135M-Instruct where `orrery model` has put it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from services.policy.export import export
from shared.config.schema import BuildTable, ModelTable
from shared.data.chat import encode_prompt, encode_response, end_of_turn
from shared.data.dataset import Row
from shared.engines.base import Request
from shared.engines.load import stop_tokens
from shared.engines.transformers import TransformersEngine
from shared.messages import Sampling
from shared.models import load_model, load_tokenizer
from shared.weights import load_into
from shared.weights.staging import named_weights

SMOLLM2 = Path(__file__).resolve().parents[3] / "models" / "smollm2-135m"
NEW = 16
QUESTIONS = ("What is the capital of France?", "Solve the following multiplication: 4 * 2.")


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "smollm2":
        if not (SMOLLM2 / "config.json").is_file():
            pytest.skip("models/smollm2-135m is not there: 'orrery model' fetches it")
        return SMOLLM2
    table = ModelTable(
        build=BuildTable(
            family="llama", hidden_size=32, intermediate_size=48, layers=2, heads=2, kv_heads=1, head_dim=16
        )
    )
    model = load_model(table, 3, weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # logits far apart: greedy choices are no matter of rounding
    return export(model, named_weights(model), load_tokenizer(table), tmp_path_factory.mktemp("tiny") / "model")


def row(question: str) -> Row:
    return Row([{"role": "user", "content": question}], "8", "<think>4*2=8</think><answer>8</answer>", 0)


def engine_words(folder: Path, model: PreTrainedModel) -> list[list[int]]:
    """Greedy tokens of an engine that began as a skeleton and got the weights as a rollout does: by their names."""
    table = ModelTable(path=str(folder))
    tokenizer = load_tokenizer(table)
    skeleton = load_model(table, 0, weights=False)
    load_into(skeleton, named_weights(model))
    engine = TransformersEngine(skeleton, slots=4, stops=stop_tokens(tokenizer, skeleton.generation_config), version=0)
    for index, question in enumerate(QUESTIONS):
        prompt = encode_prompt(tokenizer, row(question), engine.context - NEW)
        engine.submit(Request(index, prompt, 1, Sampling(0.0, 1.0, 0, NEW), 0))
    words: dict[int, list[int]] = {}
    while len(words) < len(QUESTIONS):
        words.update({sample.key: sample.tokens.tolist() for sample in engine.advance()})
    return [words[index] for index in range(len(QUESTIONS))]


def hugging_face_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The same by `generate`, through the chat template that transformers applies itself."""
    inputs = tokenizer.apply_chat_template(
        row(question).messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_engine_says_what_generate_says_before_and_after_an_export(folder: Path, tmp_path: Path) -> None:
    table = ModelTable(path=str(folder))
    model = load_model(table, 0, weights=True)
    said = engine_words(folder, model)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(table)
    assert said == [hugging_face_words(plain, tokenizer, question) for question in QUESTIONS]

    with torch.no_grad():  # as after a step: no longer the weights that were loaded
        for parameter in model.parameters():
            parameter.mul_(1.01)
    trained = engine_words(folder, model)
    exported = export(model, named_weights(model), tokenizer, tmp_path / "export")
    reloaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(exported)
    assert trained == [hugging_face_words(reloaded, own, question) for question in QUESTIONS]
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


def test_a_worked_answer_ends_with_a_token_at_which_the_engine_stops(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelTable(path=str(folder)))
    config = load_model(ModelTable(path=str(folder)), 0, weights=False).generation_config
    last = encode_response(tokenizer, row(QUESTIONS[0]))[-1]
    assert last == end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert last in stop_tokens(tokenizer, config)


def test_prompt_and_answer_are_the_template_s_own_conversation(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelTable(path=str(folder)))
    asked = row(QUESTIONS[1])
    assert asked.response is not None
    tokens = encode_prompt(tokenizer, asked, 512) + encode_response(tokenizer, asked)
    conversation = [*asked.messages, {"role": "assistant", "content": asked.response}]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(tokens) == whole.removesuffix("\n")


def test_tied_embeddings_travel_once(folder: Path) -> None:
    model = load_model(ModelTable(path=str(folder)), 0, weights=True)
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in named_weights(model)
