"""An engine whose model lies on several processes."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

from shared.config.schema import EngineParallelTable
from shared.engines.base import EngineDied, EngineError
from tests.engines.conftest import MakeEngine, replace
from tests.engines.families import ask, hugging_face_greedy, prompt, run, tiny
from tests.engines.test_contract import advance_until_tokens, assert_true_logprobs, has_model

LAYOUTS = {"tp2": EngineParallelTable(tp=2), "pp2": EngineParallelTable(pp=2), "ep2": EngineParallelTable(tp=2, ep=2)}
ON_CPU = {"transformers": (), "vllm": ("tp2",), "sglang": ("tp2", "pp2")}
"""What each engine can do without a GPU."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_takes_its_own_slices_and_the_death_of_one_is_that_of_all(
    make_engine: MakeEngine, engine_name: str, layout: str
) -> None:
    if not torch.cuda.is_available() and layout not in ON_CPU[engine_name]:
        pytest.skip(f"{engine_name} cannot do {layout} on this machine")
    before = set(psutil.Process().children(recursive=True))
    engine = make_engine(tiny("qwen3_moe", wide=True), parallel=LAYOUTS[layout])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, engines take every layout")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_would_die_on_this_machine_is_refused(
    make_engine: MakeEngine, engine_name: str, layout: str
) -> None:
    if engine_name == "transformers" or layout in ON_CPU[engine_name]:
        pytest.skip(f"{engine_name} has one rank, or can do {layout}")
    with pytest.raises(EngineError, match=r"rollout\.parallel\.(pp|ep) = 2.*leave (pp|ep) at 1"):
        make_engine(tiny("qwen3_moe", wide=True), parallel=LAYOUTS[layout])
