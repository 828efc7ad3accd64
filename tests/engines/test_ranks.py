"""An engine whose model lies on several processes."""

from __future__ import annotations

import time

import psutil
import pytest

from shared.config.schema import EngineParallelTable
from shared.engines.base import EngineDied
from tests.engines.conftest import MakeEngine, replace
from tests.engines.families import ask, hugging_face_greedy, prompt, run, tiny
from tests.engines.test_contract import advance_until_tokens, assert_true_logprobs, has_model


def test_each_rank_takes_its_own_slices_and_the_death_of_one_is_that_of_all(
    make_engine: MakeEngine, engine_name: str
) -> None:
    if engine_name == "transformers":
        pytest.skip("it has one rank")
    before = set(psutil.Process().children(recursive=True))
    engine = make_engine(tiny("qwen3_moe", wide=True), parallel=EngineParallelTable(tp=2))
    for version in (1, 2):
        model = tiny("qwen3_moe", version, wide=True)
        replace(engine, model, version)
        sample = run(engine, ask(version, prompt(9), new=20))[version, 0]
        assert sample.tokens.tolist() == hugging_face_greedy(model, prompt(9), 20)
        assert_true_logprobs(sample, model, prompt(9))
    ranks = [child for child in psutil.Process().children(recursive=True) if child not in before and has_model(child)]
    assert len(ranks) == 2
    engine.submit(ask("a", prompt(4), samples=8, temperature=1.0, new=150))
    ranks[1].kill()
    killed = time.monotonic()
    with pytest.raises(EngineDied):
        advance_until_tokens(engine, 10_000)
    assert time.monotonic() - killed < 2
    engine.close()
