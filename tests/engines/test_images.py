"""Prompts with images: what every engine promises of them, with Hugging Face's own model as the judge."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from shared.config import load_recipe
from shared.config.schema import ModelTable
from shared.engines.base import Engine, EngineError, Finished, PromptTooLong
from shared.engines.folder import write_folder
from shared.engines.load import load_engine
from shared.models import load_images, load_model
from tests.engines.conftest import replace
from tests.engines.families import (
    CONTEXT,
    IMAGE,
    SLOTS,
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
    tokenizer,
)
from tests.engines.test_contract import Engines, advance_until_tokens, assert_true_logprobs

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "qwen2_5_vl"
SIZES = ((56, 84), (112, 140), (60, 200), (300, 90), (20, 30))
"""Height and width in pixels; all but the first are resized, up or down, to whole tokens."""


def test_greedy_text_equals_generate_whatever_the_image_and_whatever_runs_beside_it(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    pictures = [[image(*size, seed)] for seed, size in enumerate(SIZES)]
    pictures += [[], [image(56, 84, 7), image(90, 60, 8)], [image(84, 84, 9), image(84, 84, 9)]]
    prompts = [image_prompt(model, images, seed) for seed, images in enumerate(pictures)]
    requests = [ask(i, prompts[i], new=6 + 2 * i, images=images) for i, images in enumerate(pictures)]
    finished: dict[tuple[object, int], Finished] = {}
    for request in requests:
        engine.submit(request)
        finished.update({(sample.key, sample.sample): sample for sample in engine.advance()})
    finished.update(drain(engine))
    for i, images in enumerate(pictures):
        sample = finished[i, 0]
        assert sample.tokens.tolist() == hugging_face_greedy(model, prompts[i], 6 + 2 * i, images=images)
        assert_true_logprobs(sample, model, prompts[i], images=images)


def test_many_samples_of_a_prompt_with_an_image_have_true_logprobs(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    images = [image(84, 112)]
    tokens = image_prompt(model, images)
    request = ask("a", tokens, samples=SLOTS + 6, temperature=1.0, new=10, images=images)
    text = ask("b", prompt(20), samples=6, temperature=1.0, new=10)
    finished = run(engine, request, text)
    assert len({finished["a", sample].tokens.tobytes() for sample in range(SLOTS + 6)}) > SLOTS // 2
    for (key, _), sample in finished.items():
        if key == "a":
            assert_true_logprobs(sample, model, tokens, images=images)
        else:
            assert_true_logprobs(sample, model, prompt(20))


def test_different_images_in_the_same_tokens_are_never_mixed(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    # the last two have the same pixels in the same number of patches, and differ in their grid alone
    plain = np.full((84, 112, 3), 90, dtype=np.uint8)
    pictures = [image(84, 112, 1), image(84, 112, 2), plain, plain.transpose(1, 0, 2).copy()]
    tokens = [*prompt(36), *image_prompt(model, pictures[:1]), *prompt(20)]  # the image inside of a block of 32
    seen: list[float] = []
    for picture in [*pictures, *pictures]:  # the second time round the engine has met all of them
        sample = run(engine, ask("a", tokens, new=10, images=[picture]))["a", 0]
        assert sample.tokens.tolist() == hugging_face_greedy(model, tokens, 10, images=[picture])
        assert_true_logprobs(sample, model, tokens, images=[picture])
        seen.append(float(sample.logprobs[0]))
    assert np.diff(sorted(seen[:4])).min() > 2e-4  # each is another answer
    together = run(engine, *(ask(i, tokens, new=10, images=[picture]) for i, picture in enumerate(pictures)))
    for i, picture in enumerate(pictures):
        assert_true_logprobs(together[i, 0], model, tokens, images=[picture])


def test_images_in_one_prompt_are_told_apart_by_their_grid_too(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    plain = np.full((56, 112, 3), 30, dtype=np.uint8)
    for images in ([plain, plain.transpose(1, 0, 2).copy()], [plain.transpose(1, 0, 2).copy(), plain]):
        tokens = [*image_prompt(model, images), *prompt(40)]
        sample = run(engine, ask("a", tokens, temperature=1.0, new=10, images=images))["a", 0]
        assert_true_logprobs(sample, model, tokens, images=images)


def test_an_update_in_flight_keeps_what_has_seen_the_image_and_marks_each_token(engines: Engines) -> None:
    engine, old = engines(FAMILY)
    images, new = [image(84, 112)], tiny(FAMILY, 1)
    tokens = image_prompt(old, images)
    for sample in updated_in_flight(engine, tokens, images, new, "keep"):
        expected = forward_logprobs(old, tokens, sample.tokens.tolist(), temperature=0.9, images=images).numpy()
        before = sample.versions == 0
        np.testing.assert_allclose(sample.logprobs[before], expected[before], atol=1e-4)
        assert sample.versions.tolist() == sorted(sample.versions.tolist())
    fresh = run(engine, ask("b", tokens, new=12, images=images))["b", 0]
    assert fresh.tokens.tolist() == hugging_face_greedy(new, tokens, 12, images=images)
    assert set(fresh.versions.tolist()) == {7}


def test_an_update_in_flight_may_look_at_the_image_again(engines: Engines) -> None:
    engine, _ = engines(FAMILY)
    images, new = [image(84, 112), image(56, 56, 3)], tiny(FAMILY, 1)
    tokens = image_prompt(new, images)
    for sample in updated_in_flight(engine, tokens, images, new, "recompute"):
        expected = forward_logprobs(new, tokens, sample.tokens.tolist(), temperature=0.9, images=images).numpy()
        after = sample.versions == 7
        np.testing.assert_allclose(sample.logprobs[after], expected[after], atol=1e-4)


def test_an_update_in_flight_may_begin_again_with_the_image(engines: Engines) -> None:
    engine, _ = engines(FAMILY)
    images, new = [image(84, 112)], tiny(FAMILY, 1)
    tokens = image_prompt(new, images)
    engine.submit(ask("a", tokens, samples=8, temperature=0.9, new=100, images=images))
    early = advance_until_tokens(engine, 5)
    replace(engine, new, 7, in_flight="abort")
    later = drain(engine)
    assert len(early | later) == 8
    assert later
    for sample in later.values():
        assert set(sample.versions.tolist()) == {7}
        assert_true_logprobs(sample, new, tokens, temperature=0.9, images=images)


def test_an_image_after_an_update_is_seen_by_the_new_vision_tower(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    images = [image(84, 112)]
    tokens = image_prompt(model, images)
    first = run(engine, ask("a", tokens, new=12, images=images))["a", 0]
    other = deepcopy(model)
    other.model.visual.load_state_dict(tiny(FAMILY, 1).model.visual.state_dict())
    replace(engine, other, 1)
    second = run(engine, ask("a", tokens, new=12, images=images))["a", 0]
    assert second.tokens.tolist() == hugging_face_greedy(other, tokens, 12, images=images)
    assert_true_logprobs(second, other, tokens, images=images)
    assert not np.allclose(first.logprobs[:1], second.logprobs[:1], atol=1e-3)


def test_samples_with_an_image_go_on_from_what_was_handed_over(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    images = [image(84, 112)]
    tokens = image_prompt(model, images)
    asked = ask("a", tokens, samples=4, temperature=1.0, new=60, images=images)
    engine.submit(asked)
    early = advance_until_tokens(engine, 20)
    begun = engine.abort("a")
    assert begun
    again = changed(asked, key="b", begun=[begun.get(sample) for sample in range(4)])
    finished = run(engine, again)
    for sample in range(4):
        assert_true_logprobs(finished["b", sample], model, tokens, images=images)
        if sample in begun:
            assert ("a", sample) not in early
            made = begun[sample].tokens.tolist()
            assert finished["b", sample].tokens.tolist()[: len(made)] == made


def test_images_that_cannot_be_read_are_refused_with_the_reason_and_disturb_nobody(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    picture = image(84, 112)
    tokens = image_prompt(model, [picture])
    running = ask("running", image_prompt(model, [picture], 5), new=20, images=[picture])
    engine.submit(running)
    engine.submit(ask("waiting", prompt(12), samples=4, temperature=1.0, new=20))
    with pytest.raises(EngineError, match=r"'a'.* of \[12\] tokens, got runs of no tokens"):
        engine.submit(ask("a", prompt(9), images=[picture]))
    with pytest.raises(EngineError, match=r"of no tokens, got runs of \[12\] tokens"):
        engine.submit(ask("a", tokens))
    with pytest.raises(EngineError, match=r"of \[12, 12\] tokens, got runs of \[12\] tokens"):
        engine.submit(ask("a", tokens, images=[picture, picture]))
    with pytest.raises(EngineError, match=r"of \[15\] tokens, got runs of \[12\] tokens"):
        engine.submit(ask("a", tokens, images=[image(84, 140)]))
    with pytest.raises(EngineError, match=r"of \[12, 12\] tokens, got runs of \[24\] tokens"):
        engine.submit(ask("a", [1, *[IMAGE] * 24, 2], images=[picture, picture]))
    with pytest.raises(EngineError, match=r"uint8 \[height, width, 3\], got float32 \[84, 112, 3\]"):
        engine.submit(ask("a", tokens, images=[picture.astype(np.float32)]))
    with pytest.raises(EngineError, match=r"7 x 1600 pixels cannot be resized"):
        engine.submit(ask("a", tokens, images=[image(1600, 7)]))
    many = [image(168, 140, seed) for seed in range(8)]
    with pytest.raises(PromptTooLong, match=f"context of {engine.context} tokens"):
        engine.submit(ask("a", image_prompt(model, many), images=many))
    finished = drain(engine)
    assert {key for key, _ in finished} == {"running", "waiting"}
    assert finished["running", 0].tokens.tolist() == hugging_face_greedy(model, running.prompt, 20, images=[picture])
    assert run(engine, ask("a", tokens, images=[picture]))


def test_a_model_of_text_alone_refuses_images(engines: Engines) -> None:
    engine, model = engines("qwen2")
    with pytest.raises(EngineError, match=r"has 1 images, but the model reads text alone"):
        engine.submit(ask("a", prompt(9), images=[image(56, 56)]))
    assert run(engine, ask("a", prompt(9)))["a", 0].tokens.tolist() == hugging_face_greedy(model, prompt(9), 12)


def test_a_prompt_with_an_image_may_fill_the_context(engines: Engines) -> None:
    engine, model = engines(FAMILY)
    picture = image(168, 140)
    for room in (3, 1):
        missing = engine.context - room - len(image_prompt(model, [picture]))
        tokens = [*prompt(missing, 2), *image_prompt(model, [picture])]
        sample = run(engine, ask("a", tokens, new=50, images=[picture]))["a", 0]
        assert sample.tokens.tolist() == hugging_face_greedy(model, tokens, room, images=[picture])
    assert CONTEXT - engine.context < 7


def test_a_recipe_that_names_a_vision_language_folder_gets_an_engine_that_reads_images(
    engine_name: str, tmp_path: Path
) -> None:
    model = tiny(FAMILY)
    write_folder(model, tokenizer(), tmp_path, reader(model))
    model.save_pretrained(tmp_path)
    options = [f"rollout.engine={engine_name}", "rollout.slots=8"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", options)
    recipe = recipe.model_copy(update={"model": ModelTable(path=str(tmp_path))})
    engine, found = load_engine(recipe, "rollout-0")
    try:
        replace(engine, load_model(recipe.model, 0, weights=True), 0)
        images = [image(90, 120)]
        taken = load_images(recipe.model)
        assert taken is not None
        text = found.convert_tokens_to_ids(["w4", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "w5", "w6"])
        tokens = taken.expand(text, images)
        sample = run(engine, ask("a", tokens, new=12, images=images))["a", 0]
        assert sample.tokens.tolist() == hugging_face_greedy(model, tokens, 12, images=images)
    finally:
        engine.close()


def updated_in_flight(
    engine: Engine, tokens: list[int], images: list[np.ndarray], new: PreTrainedModel, in_flight: str
) -> list[Finished]:
    """Long samples over a prompt with images that got the weights `new` as version 7 after their first tokens."""
    engine.submit(ask("a", tokens, samples=8, temperature=0.9, new=100, images=images))
    advance_until_tokens(engine, 5)
    replace(engine, new, 7, in_flight=in_flight)
    crossing = [sample for sample in drain(engine).values() if set(sample.versions.tolist()) == {0, 7}]
    assert crossing
    return crossing
