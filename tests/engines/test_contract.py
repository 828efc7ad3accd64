"""What every engine promises, held against the real one with Hugging Face's own model as the judge."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from shared.engines.base import Engine, EngineError, Finished, PromptTooLong
from shared.weights import WeightsError
from tests.engines.conftest import MakeEngine, replace
from tests.engines.families import (
    SLOTS,
    STOP,
    ask,
    drain,
    forward_logprobs,
    hugging_face_greedy,
    image,
    image_prompt,
    prompt,
    run,
    tiny,
)
from tests.staged import stage

Engines = Callable[[str], tuple[Engine, PreTrainedModel]]
LENGTHS = (3, 17, 9, 30, 1, 40)


def test_greedy_text_equals_generate_with_logprobs_of_a_full_forward(engines: Engines, family: str) -> None:
    engine, model = engines(family)
    prompts = {index: prompt(length, index) for index, length in enumerate(LENGTHS)}
    finished = run(engine, *(ask(index, tokens, new=20) for index, tokens in prompts.items()))
    for index, tokens in prompts.items():
        assert finished[index, 0].tokens.tolist() == hugging_face_greedy(model, tokens, 20)
        assert_true_logprobs(finished[index, 0], model, tokens)


def test_sampled_logprobs_are_those_of_the_distribution_that_was_drawn_from(engines: Engines, family: str) -> None:
    engine, model = engines(family)
    plain = ask("plain", prompt(14), samples=4, temperature=0.7, new=16)
    nucleus = ask("nucleus", prompt(15), samples=4, temperature=1.2, top_p=0.8, new=16)
    few = ask("few", prompt(16), samples=4, temperature=1.5, top_k=5, new=16)
    finished = run(engine, plain, nucleus, few)
    for request in (plain, nucleus, few):
        samples = [finished[request.key, index] for index in range(4)]
        assert len({sample.tokens.tobytes() for sample in samples}) == 4
        for sample in samples:
            assert_true_logprobs(
                sample,
                model,
                request.prompt,
                temperature=request.sampling.temperature,
                top_k=request.sampling.top_k,
                top_p=request.sampling.top_p,
            )


def test_requests_that_arrive_in_mid_flight_get_the_text_they_get_alone(engines: Engines, family: str) -> None:
    engine, model = engines(family)
    requests = [ask(index, prompt(length, index), new=8 + 3 * index) for index, length in enumerate(LENGTHS)]
    together: dict[tuple[object, int], Finished] = {}
    for request in requests:
        engine.submit(request)
        for _ in range(2):
            together.update({(sample.key, sample.sample): sample for sample in engine.advance()})
    together.update(drain(engine))
    for index, request in enumerate(requests):
        limit = request.sampling.max_new_tokens
        assert together[index, 0].tokens.tolist() == hugging_face_greedy(model, request.prompt, limit)


def test_a_seed_gives_the_same_samples_whatever_runs_beside_them(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    if not engine.seeded:
        pytest.skip("this engine draws without the seeds of requests on this machine")
    wanted = ask("wanted", prompt(12), samples=3, temperature=1.0, seed=2**63 + 9, new=10)
    alone = run(engine, wanted)
    noise = [ask(index, prompt(5 + index, index), samples=2, temperature=1.3, seed=index, new=6) for index in range(4)]
    crowded = run(engine, *noise[:2], wanted, *noise[2:])
    other = run(engine, changed(wanted, seed=10))
    for sample in range(3):
        assert crowded["wanted", sample].tokens.tolist() == alone["wanted", sample].tokens.tolist()
        assert other["wanted", sample].tokens.tolist() != alone["wanted", sample].tokens.tolist()


def test_draws_follow_the_distribution(engines: Engines) -> None:
    engine, model = engines("qwen2")
    draws = 600
    finished = run(engine, ask("a", prompt(7), samples=draws, temperature=1.0, new=1))
    seen = np.bincount([int(sample.tokens[0]) for sample in finished.values()], minlength=48) / draws
    with torch.no_grad():
        wanted = model(torch.tensor([prompt(7)])).logits[0, -1].softmax(-1).numpy()
    # the expected total variation distance of 600 draws from a distribution over 48 tokens is below 0.1
    assert 0.5 * np.abs(seen - wanted).sum() < 0.15


def test_more_samples_than_slots_all_finish(engines: Engines) -> None:
    engine, model = engines("qwen3")
    samples = 3 * SLOTS + 1
    finished = run(engine, ask("a", prompt(10), samples=samples, temperature=1.0, new=9))
    assert sorted(sample for _, sample in finished) == list(range(samples))
    for sample in finished.values():
        assert_true_logprobs(sample, model, prompt(10))


def test_prompts_that_do_not_fit_into_one_step_together_are_all_answered(engines: Engines) -> None:
    engine, model = engines("qwen3")
    requests = [ask(index, prompt(150, index), temperature=1.0, new=4, seed=index) for index in range(SLOTS + 10)]
    finished = run(engine, *requests)
    for index, request in enumerate(requests):
        assert_true_logprobs(finished[index, 0], model, request.prompt)


def test_a_stop_token_ends_the_sample_and_belongs_to_it(engines: Engines) -> None:
    engine, _ = engines("qwen2")
    finished = run(engine, ask("a", prompt(8), samples=64, temperature=2.0, new=40))
    stopped = [sample for sample in finished.values() if STOP in sample.tokens]
    assert stopped
    for sample in finished.values():
        assert STOP not in sample.tokens[:-1]
        assert sample.truncated == (sample.tokens[-1] != STOP)
        assert sample.truncated == (sample not in stopped)
        assert len(sample.tokens) == 40 or not sample.truncated


def test_a_sample_ends_where_the_context_does(engines: Engines) -> None:
    engine, model = engines("llama")
    tokens = prompt(engine.context - 30)
    sample = run(engine, ask("a", tokens, new=500))["a", 0]
    assert sample.tokens.tolist() == hugging_face_greedy(model, tokens, 30)
    assert sample.truncated == (sample.tokens[-1] != STOP)


def test_requests_that_cannot_be_answered_are_refused_with_the_reason(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    length = engine.context
    with pytest.raises(PromptTooLong, match=f"has {length} tokens, but the model's context of {length}"):
        engine.submit(ask("a", prompt(length)))
    with pytest.raises(EngineError, match="at least one token"):
        engine.submit(ask("a", []))
    engine.submit(ask("a", prompt(4)))
    with pytest.raises(EngineError, match="in flight already"):
        engine.submit(ask("a", prompt(4)))
    drain(engine)
    assert run(engine, ask("a", prompt(4)))


def test_an_aborted_request_leaves_nothing_and_disturbs_nobody(engines: Engines) -> None:
    engine, model = engines("qwen3")
    others = [ask("b", prompt(11, 1), new=15), ask("c", prompt(6, 2), new=15), ask("d", prompt(9, 3), new=15)]
    engine.submit(ask("a", prompt(20), samples=12, temperature=1.0, new=100))
    for request in others:
        engine.submit(request)
    early = advance_until_tokens(engine, 10)
    engine.abort("a")
    engine.abort("never heard of")
    finished = early | drain(engine)
    assert {key for key, _ in finished} - {"a"} == {"b", "c", "d"}
    for request in others:
        assert finished[request.key, 0].tokens.tolist() == hugging_face_greedy(model, request.prompt, 15)
    assert run(engine, ask("a", prompt(4)))["a", 0].tokens.tolist() == hugging_face_greedy(model, prompt(4), 12)


def test_an_update_in_flight_keeps_what_runs_and_marks_each_token(engines: Engines, family: str) -> None:
    engine, old = engines(family)
    new = tiny(family, 1)
    for sample in updated_in_flight(engine, new, "keep"):
        expected = forward_logprobs(old, prompt(9), sample.tokens.tolist(), temperature=0.9).numpy()
        before = sample.versions == 0
        np.testing.assert_allclose(sample.logprobs[before], expected[before], atol=1e-4)
        assert sample.versions.tolist() == sorted(sample.versions.tolist())
    # what comes after the update meets nothing of the old weights, not even the prefix of an equal prompt
    fresh = run(engine, ask("b", prompt(9), new=12), ask("c", prompt(9), samples=3, temperature=1.0))
    assert fresh["b", 0].tokens.tolist() == hugging_face_greedy(new, prompt(9), 12)
    for sample in fresh.values():
        assert_true_logprobs(sample, new, prompt(9))
        assert set(sample.versions.tolist()) == {7}


def test_an_update_in_flight_may_compute_keys_and_values_again(engines: Engines, family: str) -> None:
    engine, _ = engines(family)
    new = tiny(family, 1)
    for sample in updated_in_flight(engine, new, "recompute"):
        expected = forward_logprobs(new, prompt(9), sample.tokens.tolist(), temperature=0.9).numpy()
        after = sample.versions == 7
        np.testing.assert_allclose(sample.logprobs[after], expected[after], atol=1e-4)


def test_an_update_in_flight_may_begin_samples_again(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    new = tiny("qwen3", 1)
    engine.submit(ask("a", prompt(9), samples=8, temperature=0.9, new=140, seed=5))
    early = advance_until_tokens(engine, 5)
    replace(engine, new, 7, in_flight="abort")
    later = drain(engine)
    assert len(early | later) == 8
    assert later
    for sample in later.values():
        assert set(sample.versions.tolist()) == {7}
        assert_true_logprobs(sample, new, prompt(9), temperature=0.9)


def test_an_update_without_a_pause_or_of_other_weights_is_refused_and_changes_nothing(engines: Engines) -> None:
    engine, model = engines("qwen3")
    with pytest.raises(EngineError, match=r"call pause\(\) before update"):
        engine.update(stage(tiny("qwen3", 1)), 1)
    engine.pause()
    assert engine.advance() == []
    with pytest.raises(WeightsError, match="expected"):
        engine.update(stage(tiny("qwen2", 1)), 1)
    engine.resume()
    sample = run(engine, ask("a", prompt(9), new=12))["a", 0]
    assert sample.tokens.tolist() == hugging_face_greedy(model, prompt(9), 12)
    assert sample.versions.tolist() == [0] * len(sample.tokens)


@pytest.mark.parametrize(("name", "tied"), [("qwen2", True), ("qwen2", False), ("qwen2_5_vl", True)])
def test_fifty_updates_leave_neither_drift_nor_growth(
    engines: Engines, make_engine: MakeEngine, name: str, tied: bool
) -> None:
    first, second = (tiny(name, seed, tied=tied) for seed in (0, 1))
    engine = engines(name)[0] if tied else make_engine(first)
    size = 0
    for update in range(1, 51):
        model = (first, second)[update % 2]
        replace(engine, model, update)
        images = [image(84, 112, update % 3)] if name == "qwen2_5_vl" else []
        tokens = image_prompt(model, images, update) if images else prompt(9, update)
        sample = run(engine, ask("a", tokens, temperature=1.0, new=6, seed=update, images=images))["a", 0]
        assert_true_logprobs(sample, model, tokens, images=images)
        assert set(sample.versions.tolist()) == {update}
        if update == 10:
            size = memory_of_workers()
    assert memory_of_workers() - size < 20 << 20


def test_weights_that_are_no_numbers_are_named_and_not_sampled_from(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    broken = tiny("qwen3")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    replace(engine, broken, 8)
    with pytest.raises(EngineError, match="version 8 are no finite numbers"):
        run(engine, ask("a", prompt(4), temperature=1.0))
    engine.abort("a")


def test_stats_count_what_runs_and_what_waits(engines: Engines) -> None:
    engine, _ = engines("qwen3")
    before = engine.stats().tokens
    engine.pause()
    engine.submit(ask("a", prompt(4), samples=SLOTS + 20, new=4))
    stats = engine.stats()
    assert (stats.running, stats.queued) == (0, SLOTS + 20)
    engine.resume()
    finished: dict[tuple[object, int], Finished] = {}
    while engine.stats().running or engine.stats().queued:
        assert engine.stats().running <= SLOTS
        finished.update({(sample.key, sample.sample): sample for sample in engine.advance()})
    assert engine.stats().tokens - before == sum(len(sample.tokens) for sample in finished.values())
    assert engine.stats().tokens_per_second > 0


def test_an_engine_does_not_outlive_the_process_that_started_it(engine_name: str, tmp_path: Path) -> None:
    if engine_name == "transformers":
        pytest.skip("it has no processes of its own")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.engines.owner", engine_name, str(tmp_path)]
    owner = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert any(line.strip() == "started" for line in owner.stdout)
    children = psutil.Process(owner.pid).children(recursive=True)
    workers = [child for child in children if has_model(child)]
    assert workers
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for process in alive:
        process.kill()
    assert not alive, f"still there 30 s after their owner was killed: {alive}"


def updated_in_flight(engine: Engine, new: PreTrainedModel, in_flight: str) -> list[Finished]:
    """Long samples over `prompt(9)` that got the weights `new` as version 7 after their first tokens."""
    engine.submit(ask("a", prompt(9), samples=8, temperature=0.9, new=140, seed=5))
    advance_until_tokens(engine, 5)
    replace(engine, new, 7, in_flight=in_flight)
    crossing = [sample for sample in drain(engine).values() if set(sample.versions.tolist()) == {0, 7}]
    assert crossing
    return crossing


def advance_until_tokens(engine: Engine, tokens: int) -> dict[tuple[object, int], Finished]:
    """Advance until that many more tokens have been generated; what finished on the way."""
    finished: dict[tuple[object, int], Finished] = {}
    wanted = engine.stats().tokens + tokens
    limit = time.monotonic() + 30
    while engine.stats().tokens < wanted:
        assert time.monotonic() < limit, f"waited 30 s for {wanted} tokens, the engine says {engine.stats()}"
        finished.update({(sample.key, sample.sample): sample for sample in engine.advance()})
    return finished


def assert_true_logprobs(
    sample: Finished,
    model: PreTrainedModel,
    tokens: object,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    images: Sequence[np.ndarray] = (),
) -> None:
    expected = forward_logprobs(
        model, list(tokens), sample.tokens.tolist(), temperature=temperature, top_k=top_k, top_p=top_p, images=images
    )
    np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=1e-4)


def memory_of_workers() -> int:
    processes = [*psutil.Process().children(recursive=True)] or [psutil.Process()]
    return sum(process.memory_full_info().uss for process in processes if process.is_running())


def has_model(process: psutil.Process) -> bool:
    """Whether it is one that holds a model, and no helper."""
    title = " ".join(process.cmdline())
    return "orker" in title or "scheduler" in title
