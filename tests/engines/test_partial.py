"""Partial rollout, held against every engine: what an abort gives back, and that any engine goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace as changed

import numpy as np
import pytest
from transformers import PreTrainedModel

from shared.engines.base import Begun, Engine, EngineError, Finished, Request
from shared.engines.transformers import TransformersEngine
from tests.engines.conftest import replace
from tests.engines.families import STOP, ask, drain, forward_logprobs, hugging_face_greedy, prompt, run, tiny
from tests.engines.test_contract import Engines, advance_until_tokens, assert_true_logprobs

Other = Callable[[PreTrainedModel], Engine]
BEFORE = 5
"""The version under which the other engine has begun."""


@pytest.fixture
def other() -> Iterator[Other]:
    """Makes a second engine, always of transformers, that holds a model's weights as version BEFORE."""
    made: list[Engine] = []

    def make(model: PreTrainedModel) -> Engine:
        engine = TransformersEngine(deepcopy(model), slots=16, stops=[STOP])
        made.append(engine)
        replace(engine, model, BEFORE)
        return engine

    yield make
    for engine in made:
        engine.close()


def interrupted(engine: Engine, request: Request, tokens: int) -> dict[int, Begun]:
    """What a request has when it is aborted after so many tokens."""
    engine.submit(request)
    finished = advance_until_tokens(engine, tokens)
    begun = engine.abort(request.key)
    assert (engine.stats().running, engine.stats().queued) == (0, 0)
    assert not begun.keys() & {sample for _, sample in finished}, "what was returned is the caller's"
    assert begun, "nothing was interrupted"
    return begun


def gone_on(request: Request, begun: dict[int, Begun]) -> Request:
    return changed(request, begun=[begun.get(sample) for sample in range(request.samples)])


def test_an_abort_gives_back_what_each_sample_has(engines: Engines, family: str) -> None:
    engine, model = engines(family)
    request = ask("a", prompt(9), samples=6, temperature=0.9, new=140, seed=5)
    begun = interrupted(engine, request, 60)
    for sample, so_far in begun.items():
        assert 0 < len(so_far.tokens) <= 140
        assert len(so_far.tokens) == len(so_far.logprobs) == len(so_far.versions)
        assert set(so_far.versions.tolist()) == {0}
        whole = Finished("a", sample, so_far.tokens, so_far.logprobs, so_far.versions, True)
        assert_true_logprobs(whole, model, prompt(9), temperature=0.9)
    assert engine.abort("a") == {}


def test_an_abort_gives_back_the_versions_that_sampled_each_token(engines: Engines) -> None:
    engine, old = engines("qwen3")
    new = tiny("qwen3", 1)
    engine.submit(ask("a", prompt(9), samples=8, temperature=0.9, new=140, seed=5))
    advance_until_tokens(engine, 40)
    replace(engine, new, 7)
    advance_until_tokens(engine, 40)
    crossing = [so_far for so_far in engine.abort("a").values() if set(so_far.versions.tolist()) == {0, 7}]
    assert crossing
    for so_far in crossing:
        before = so_far.versions == 0
        assert so_far.versions.tolist() == sorted(so_far.versions.tolist())
        part = Finished("a", 0, so_far.tokens[before], so_far.logprobs[before], so_far.versions[before], True)
        assert_true_logprobs(part, old, prompt(9), temperature=0.9)


def long_greedy(model: PreTrainedModel, new: int) -> tuple[list[int], list[int]]:
    """A prompt that greedy search answers without a stop, and the answer."""
    for seed in range(100):
        whole = hugging_face_greedy(model, prompt(17, seed), new)
        if len(whole) == new and STOP not in whole:
            return prompt(17, seed), whole
    raise AssertionError("each of 100 prompts ended early")


def test_it_goes_on_greedily_where_another_engine_was_aborted(engines: Engines, family: str, other: Other) -> None:
    engine, model = engines(family)
    tokens, whole = long_greedy(model, 40)
    request = ask("a", tokens, samples=2, new=40)
    begun = interrupted(other(model), request, 14)
    assert len(begun) == 2
    for sample in run(engine, gone_on(request, begun)).values():
        made = len(begun[sample.sample].tokens)
        assert sample.tokens.tolist() == whole
        assert sample.truncated
        assert sample.versions.tolist() == [BEFORE] * made + [0] * (40 - made)
        assert_true_logprobs(sample, model, tokens)


def test_another_engine_goes_on_where_it_was_aborted(engines: Engines, family: str, other: Other) -> None:
    engine, model = engines(family)
    tokens, whole = long_greedy(model, 100)
    request = ask("a", tokens, samples=4, new=100)
    begun = interrupted(engine, request, 20)
    finished = run(other(model), gone_on(request, begun))
    for sample in range(4):
        assert finished["a", sample].tokens.tolist() == whole
        assert_true_logprobs(finished["a", sample], model, tokens)
    assert any(set(sample.versions.tolist()) == {0, BEFORE} for sample in finished.values())


def test_sampled_tokens_that_go_on_have_true_logprobs_beside_samples_that_begin(engines: Engines, other: Other) -> None:
    engine, model = engines("qwen3_moe")
    request = ask("a", prompt(12), samples=6, temperature=1.1, top_p=0.9, new=60, seed=3)
    begun = interrupted(other(model), request, 40)
    some = {sample: so_far for sample, so_far in begun.items() if sample % 2}
    finished = run(engine, gone_on(request, some))
    assert sorted(sample for _, sample in finished) == list(range(6))
    for (_, sample), each in finished.items():
        assert_true_logprobs(each, model, request.prompt, temperature=1.1, top_p=0.9)
        if sample in some:
            made = len(some[sample].tokens)
            assert each.tokens[:made].tolist() == some[sample].tokens.tolist()
            np.testing.assert_array_equal(each.logprobs[:made], some[sample].logprobs)
            assert set(each.versions[:made].tolist()) == {BEFORE}
    assert len({each.tokens.tobytes() for each in finished.values()}) == 6


def test_draws_go_on_where_they_were(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    if not engine.seeded:
        pytest.skip("this engine draws without the seeds of requests on this machine")
    request = ask("a", prompt(12), samples=4, temperature=1.0, seed=2**63 + 9, new=50)
    alone = run(engine, request)
    begun = {
        sample: Begun(whole.tokens[:7], whole.logprobs[:7], whole.versions[:7])
        for (_, sample), whole in alone.items()
        if len(whole.tokens) > 12
    }
    assert begun
    once, again = (run(engine, gone_on(request, begun)) for _ in range(2))
    for key, whole in alone.items():
        assert once[key].tokens.tolist() == again[key].tokens.tolist(), "the seed decides"
        if engine.resumes_draws:
            assert once[key].tokens.tolist() == whole.tokens.tolist()
    if not engine.resumes_draws:
        # a stream that began again would make the same first draws after the same tokens
        short = changed(request, prompt=[*request.prompt, *begun[min(begun)].tokens.tolist()], samples=1)
        fresh = run(engine, short)["a", 0].tokens.tolist()
        assert once["a", min(begun)].tokens.tolist()[7:] != fresh[:43]


def test_a_sample_that_was_begun_to_its_end_is_finished_as_it_stands(engines: Engines) -> None:
    engine, _ = engines("qwen2")
    stopped, full = so_far(5, 6, STOP), so_far(*range(4, 12))
    request = changed(ask("a", prompt(8), samples=3, new=8), begun=[stopped, None, full])
    made = engine.stats().tokens
    finished = run(engine, request)
    assert finished["a", 0].tokens.tolist() == [5, 6, STOP] and not finished["a", 0].truncated
    assert finished["a", 2].tokens.tolist() == list(range(4, 12)) and finished["a", 2].truncated
    assert finished["a", 2].versions.tolist() == [BEFORE] * 8
    assert engine.stats().tokens - made == len(finished["a", 1].tokens)
    engine.submit(request)
    assert engine.stats().queued >= 2
    assert {0, 2} <= engine.abort("a").keys()
    assert drain(engine) == {}
    only = run(engine, changed(ask("b", prompt(8), new=8), begun=[full]))
    assert only["b", 0].tokens.tolist() == list(range(4, 12))


def test_an_update_that_begins_samples_again_forgets_what_they_were_begun_with(engines: Engines) -> None:
    engine, _ = engines("qwen2")
    new = tiny("qwen2", 1)
    request = changed(ask("a", prompt(8), new=20), begun=[so_far(5, 6, 7)])
    engine.pause()
    engine.submit(request)
    engine.resume()
    replace(engine, new, 7, in_flight="abort")
    sample = run(engine)["a", 0]
    assert sample.tokens.tolist() == hugging_face_greedy(new, prompt(8), 20)
    assert set(sample.versions.tolist()) == {7}


def test_an_update_in_flight_is_taken_up_by_a_sample_that_was_begun(engines: Engines, other: Other) -> None:
    engine, model = engines("qwen2")
    new = tiny("qwen2", 1)
    request = ask("a", prompt(9), samples=4, temperature=0.9, new=140, seed=5)
    begun = interrupted(other(model), request, 30)
    engine.submit(gone_on(request, begun))
    advance_until_tokens(engine, 8)
    replace(engine, new, 7, in_flight="recompute")
    crossing = [each for each in drain(engine).values() if set(each.versions.tolist()) == {BEFORE, 0, 7}]
    assert crossing
    for each in crossing:
        after = each.versions == 7
        true = forward_logprobs(new, prompt(9), each.tokens.tolist(), temperature=0.9).numpy()
        np.testing.assert_allclose(each.logprobs[after], true[after], atol=1e-4)


def test_what_cannot_be_gone_on_from_is_refused(engines: Engines) -> None:
    engine, _ = engines("qwen2")
    torn = Begun(np.array([5, 6], np.int32), np.zeros(1, np.float32), np.zeros(2, np.int32))
    for begun in ([so_far(5)], [so_far(5), torn], [None, so_far()]):
        with pytest.raises(EngineError, match="give an entry a sample"):
            engine.submit(changed(ask("a", prompt(4), samples=2), begun=begun))
    assert engine.abort("a") == {}


def so_far(*tokens: int) -> Begun:
    count = len(tokens)
    return Begun(np.array(tokens, np.int32), np.full(count, -1.0, np.float32), np.full(count, BEFORE, np.int32))
