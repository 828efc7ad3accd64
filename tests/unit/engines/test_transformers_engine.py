"""The transformers engine: what it promises beyond the contract of all engines (tests/engines)."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from shared.engines.base import EngineError
from shared.engines.transformers import TransformersEngine
from tests.engines.families import (
    CONTEXT,
    FAMILIES,
    IMAGE,
    ask,
    drain,
    forward_logprobs,
    hugging_face_greedy,
    image,
    image_prompt,
    prompt,
    reader,
    run,
    tiny,
)
from tests.staged import stage

LENGTHS = (3, 17, 9, 30, 1)


def test_equal_submissions_give_equal_bits() -> None:
    runs = []
    for _ in range(2):
        engine = TransformersEngine(tiny("qwen3"), slots=5, stops=[3])
        runs.append(run(engine, *(ask(i, prompt(4 + i, i), samples=4, temperature=1.0, seed=i) for i in range(5))))
    assert runs[0].keys() == runs[1].keys()
    for key, sample in runs[0].items():
        assert sample.tokens.tobytes() == runs[1][key].tokens.tobytes()
        assert sample.logprobs.tobytes() == runs[1][key].logprobs.tobytes()


def test_more_samples_than_slots_all_finish_with_the_draws_of_a_roomy_engine() -> None:
    model = tiny("qwen3")
    request = ask("a", prompt(10), samples=11, temperature=1.0, new=9)
    roomy, tight = (run(TransformersEngine(model, slots=slots, stops=[4]), request) for slots in (16, 3))
    assert {key: s.tokens.tolist() for key, s in tight.items()} == {key: s.tokens.tolist() for key, s in roomy.items()}
    assert len(tight) == 11


def test_a_stop_token_ends_the_sample_and_belongs_to_it() -> None:
    model = tiny("llama")
    tokens = prompt(8)
    free = run(TransformersEngine(model, slots=1, stops=[]), ask("a", tokens, new=20))["a", 0].tokens.tolist()
    stop = free[6]
    sample = run(TransformersEngine(model, slots=1, stops=[stop, 47]), ask("a", tokens, new=20))["a", 0]
    assert sample.tokens.tolist() == free[: free.index(stop) + 1]
    assert not sample.truncated


def test_a_sample_that_stops_with_its_first_token_is_returned_by_the_prefill() -> None:
    model = tiny("llama")
    first = hugging_face_greedy(model, prompt(8), 1, stop=None)[0]
    engine = TransformersEngine(model, slots=2, stops=[first])
    finished = run(engine, ask("a", prompt(8), new=20), ask("b", prompt(8, 1), new=1))
    assert finished["a", 0].tokens.tolist() == [first]
    assert len(finished["b", 0].tokens) == 1


def test_the_cache_grows_with_long_sequences_and_ends_at_the_context() -> None:
    model = tiny("qwen3")
    tokens = prompt(CONTEXT - 30)
    finished = run(TransformersEngine(model, slots=2, stops=[]), ask("a", tokens, new=500), ask("b", prompt(5), new=3))
    assert finished["a", 0].tokens.tolist() == hugging_face_greedy(model, tokens, 30, stop=None)
    assert finished["a", 0].truncated


def test_an_aborted_request_leaves_nothing_and_disturbs_nobody() -> None:
    model = tiny("qwen3")
    others = [ask("b", prompt(11, 1), new=15), ask("c", prompt(6, 2), new=15), ask("d", prompt(9, 3), new=15)]
    undisturbed = run(TransformersEngine(model, slots=8, stops=[]), *others)
    engine = TransformersEngine(model, slots=4, stops=[])
    engine.submit(ask("a", prompt(20), samples=5, temperature=1.0, new=30))
    for request in others:
        engine.submit(request)
    for _ in range(4):
        assert engine.advance() == []
    engine.abort("a")
    engine.abort("never heard of")
    finished = drain(engine)
    assert {key for key, _ in finished} == {"b", "c", "d"}
    for key, sample in finished.items():
        assert sample.tokens.tolist() == undisturbed[key].tokens.tolist()
    assert engine.stats().running == engine.stats().queued == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_in_flight_keeps_sequences_and_marks_each_token(family: str) -> None:
    old, new = tiny(family, 0), tiny(family, 1)
    tokens = prompt(9)
    before = hugging_face_greedy(old, tokens, 12, stop=None)
    engine = TransformersEngine(old, slots=2, stops=[], version=3)
    engine.submit(ask("a", tokens, new=12))
    for _ in range(4):
        assert engine.advance() == []
    engine.pause()
    assert engine.advance() == []
    engine.update(stage(new), 4)
    engine.resume()
    sample = drain(engine)["a", 0]
    # the prefill drew the first token and each of the four turns one more
    assert sample.versions.tolist() == [3] * 5 + [4] * 7
    assert sample.tokens.tolist()[:5] == before[:5]
    assert sample.tokens.tolist() != before
    fresh = run(engine, ask("b", tokens, new=12))["b", 0]
    assert fresh.tokens.tolist() == hugging_face_greedy(new, tokens, 12, stop=None)
    expected = forward_logprobs(new, tokens, fresh.tokens.tolist())
    np.testing.assert_allclose(fresh.logprobs, expected.numpy(), atol=1e-4)


def test_stats_count_what_runs_and_what_waits() -> None:
    engine = TransformersEngine(tiny("qwen3"), slots=2, stops=[])
    engine.submit(ask("a", prompt(4), samples=5, new=4))
    assert (engine.stats().running, engine.stats().queued) == (0, 5)
    engine.advance()
    assert (engine.stats().running, engine.stats().queued) == (2, 3)
    drain(engine)
    assert engine.stats().tokens == 20
    assert engine.stats().tokens_per_second > 0


def test_top_k_one_is_greedy_with_certainty() -> None:
    model = tiny("qwen3")
    sample = run(TransformersEngine(model, slots=1, stops=[]), ask("a", prompt(9), temperature=1.0, top_k=1))["a", 0]
    assert sample.tokens.tolist() == hugging_face_greedy(model, prompt(9), 12, stop=None)
    assert sample.logprobs.tolist() == [0.0] * 12


def test_rows_with_and_without_truncation_share_a_batch() -> None:
    model = tiny("qwen3")
    plain = ask("plain", prompt(9), temperature=0.9, seed=4)
    alone = run(TransformersEngine(model, slots=4, stops=[]), plain)["plain", 0]
    cut = ask("cut", prompt(9), samples=2, temperature=0.9, top_p=0.5, top_k=5, seed=4)
    both = run(TransformersEngine(model, slots=4, stops=[]), cut, plain, ask("greedy", prompt(9)))
    assert both["plain", 0].tokens.tolist() == alone.tokens.tolist()
    np.testing.assert_allclose(both["plain", 0].logprobs, alone.logprobs, atol=1e-5)
    assert both["greedy", 0].tokens.tolist() == hugging_face_greedy(model, prompt(9), 12, stop=None)


def test_an_image_is_read_once_a_request_and_once_more_after_new_weights() -> None:
    model = tiny("qwen2_5_vl")
    engine = TransformersEngine(model, slots=2, stops=[], images=reader(model))
    seen: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: seen.append(engine.version))
    images = [image(84, 112)]
    engine.submit(ask("a", image_prompt(model, images), samples=9, temperature=1.0, new=5, images=images))
    engine.submit(ask("b", prompt(9), samples=3, new=5))
    while engine.stats().queued > 5:
        engine.advance()
    assert seen == [-1]
    engine.pause()
    engine.update(stage(tiny("qwen2_5_vl", 1)), 1, "recompute")
    engine.resume()
    drain(engine)
    assert seen == [-1, 1]


def test_an_image_token_that_the_model_wrote_is_a_word_when_keys_and_values_are_made_again() -> None:
    model = tiny("qwen2_5_vl")
    engine = TransformersEngine(model, slots=1, stops=[], images=reader(model))
    images = [image(84, 112)]
    tokens = image_prompt(model, images)
    for seed in range(100):
        engine.submit(ask("a", tokens, temperature=1.5, new=12, seed=seed, images=images))
        for _ in range(7):
            engine.advance()
        engine.pause()
        engine.update(stage(model), 1, "recompute")
        engine.resume()
        sample = drain(engine)["a", 0]
        if IMAGE in sample.tokens[:7]:
            break
    else:
        pytest.fail("no sample of 100 had an image token early on")
    expected = forward_logprobs(model, tokens, sample.tokens.tolist(), temperature=1.5, images=images)
    np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=1e-4)


def test_rows_that_move_keep_the_positions_of_their_images() -> None:
    model = tiny("qwen2_5_vl")
    engine = TransformersEngine(model, slots=4, stops=[], images=reader(model))
    pictures = [[image(56, 56)], [], [image(168, 140)], [image(84, 56), image(112, 112)], []]
    prompts = [image_prompt(model, images, seed) for seed, images in enumerate(pictures)]
    # those that came first end first, so that the last rows move into theirs
    finished = run(engine, *(ask(i, prompts[i], new=4 + 3 * i, images=images) for i, images in enumerate(pictures)))
    for i, images in enumerate(pictures):
        expected = hugging_face_greedy(model, prompts[i], 4 + 3 * i, stop=None, images=images)
        assert finished[i, 0].tokens.tolist() == expected


def test_a_model_with_sliding_windows_is_refused() -> None:
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    with pytest.raises(EngineError, match="sliding_attention"):
        TransformersEngine(Qwen2ForCausalLM(config), slots=2, stops=[])
