"""The tokenizer of built models."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config.schema import ModelTable
from shared.models import load_tokenizer
from shared.models.tokenizer import MARKS, PAD, UNKNOWN, build_tokenizer
from shared.models.words import BARE_WORDS, SPACED_WORDS

TOKENIZER = build_tokenizer(512)
PIECES = [*MARKS, "<|im_start|>", "<|im_end|>", PAD, *BARE_WORDS, *(f" {word}" for word in SPACED_WORDS)]


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=20) | st.sampled_from(PIECES), max_size=12))
def test_any_ascii_text_comes_back_from_its_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    assert TOKENIZER.decode(encode(text)) == text


def test_every_character_of_ascii_is_a_token() -> None:
    text = "".join(map(chr, range(128)))
    assert len(encode(text)) == 128


def test_marks_and_words_are_single_tokens() -> None:
    assert [TOKENIZER.convert_ids_to_tokens(encode(piece)) for piece in PIECES] == [[piece] for piece in PIECES]


def test_words_are_whole_words() -> None:
    assert TOKENIZER.tokenize(" they  the.theme there1") == [" they", " ", " the", ".", *"theme", " there", "1"]


def test_the_vocabulary_has_512_different_tokens() -> None:
    assert len(TOKENIZER) == len(TOKENIZER.get_vocab()) == 512
    assert len(set(SPACED_WORDS)) == len(SPACED_WORDS)


def test_other_characters_become_the_unknown_token() -> None:
    assert TOKENIZER.decode(encode("caf\u00e9 \U0001f600")) == f"caf{UNKNOWN} {UNKNOWN}"


def test_marks_stay_in_a_text_without_special_tokens() -> None:
    text = "<|im_start|><think>1</think><answer>2</answer><|im_end|>"
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == "<think>1</think><answer>2</answer>"


def test_digits_are_tokens_of_their_own() -> None:
    assert TOKENIZER.tokenize("12+345") == list("12+345")


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = load_tokenizer(ModelTable(path=str(tmp_path)))
    text = "State the answer:\n\t<think>1+2=3</think> \u00e9"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(encode(text)) == TOKENIZER.decode(encode(text))
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
