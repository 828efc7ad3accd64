"""Talking to the model in training through the engine's own OpenAI-compatible server."""

from __future__ import annotations

import json
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.config import Recipe, load_recipe
from shared.engines.base import Engine, EngineError, Request
from shared.engines.load import load_engine
from shared.messages import Sampling
from shared.models import load_model
from tests.engines.conftest import replace
from tests.engines.families import run

ROOT = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "3 + 4 - 5 = ?"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def recipe_of(engine: str, port: int) -> Recipe:
    options = [f"rollout.engine={engine}", f"rollout.serve={port}", "rollout.slots=8"]
    return load_recipe(ROOT / "recipes" / "quickstart.toml", options)


def answer(port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else None
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as told:
        return dict(json.loads(told.read()))


def test_people_talk_to_the_model_as_it_is_now(engine_name: str) -> None:
    if engine_name == "transformers":
        with pytest.raises(Exception, match="rollout.serve wants rollout.engine"):
            recipe_of(engine_name, free_port())
        return
    port = free_port()
    recipe = recipe_of(engine_name, port)
    engine, tokenizer = load_engine(recipe, "rollout-0")
    try:
        assert answer(port, "/v1/models")["data"][0]["id"] == "policy"
        texts = [said(engine, tokenizer, recipe, port, seed) for seed in (1, 2)]
        assert texts[0] != texts[1]
        with pytest.raises(EngineError, match=f"cannot listen on 127.0.0.1:{port}"):
            load_engine(recipe, "rollout-0")
    finally:
        engine.close()


def said(engine: Engine, tokenizer: Any, recipe: Recipe, port: int, seed: int) -> str:
    """What the endpoint answers once the engine has new weights; it is what the run itself would get."""
    replace(engine, load_model(recipe.model, seed, weights=True), seed)
    body = {"model": "policy", "messages": CHAT, "temperature": 0, "max_tokens": 16}
    with ThreadPoolExecutor(1) as other:
        told = other.submit(answer, port, "/v1/chat/completions", body)
        prompt = list(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"])
        own = run(engine, Request("own", prompt, 1, Sampling(0.0, 1.0, 0, 16), 0))["own", 0]
        found = told.result(60)
    text = str(found["choices"][0]["message"]["content"])
    assert text == tokenizer.decode(own.tokens, skip_special_tokens=True)
    assert found["usage"]["prompt_tokens"] == len(prompt)
    return text
