"""Prompts and worked answers as token ids, and answers found in completions."""

from __future__ import annotations

import pytest

from shared.data.answers import extract_answer
from shared.data.chat import PromptTooLong, encode_prompt, encode_response, end_of_turn
from shared.data.dataset import DataError, Row
from shared.models.tokenizer import CHAT_TEMPLATE, END_OF_TURN, build_tokenizer

ROW = Row([{"role": "user", "content": "1 + 2 ="}], "3", "<think>1+2=3</think><answer>3</answer>", 4)


def tokenizer_with(template: str | None):
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = template
    return tokenizer


def test_prompt_and_response_join_to_the_templates_conversation() -> None:
    tokenizer = build_tokenizer(512)
    prompt, response = encode_prompt(tokenizer, ROW, 512), encode_response(tokenizer, ROW)
    assert tokenizer.decode(prompt + response) == (
        "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n<think>1+2=3</think><answer>3</answer><|im_end|>"
    )
    assert response[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("opened", ["<think>\\n", "<think>", "<think>\\n\\n</think>\\n\\n"])
def test_a_thinking_block_that_the_template_opens_is_left_to_the_completion(opened: str) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{{{{ '{opened}' }}}}{{% endif %}}")
    thinking = tokenizer_with(template)
    rendered = thinking.apply_chat_template(ROW.messages, add_generation_prompt=True, tokenize=False)
    assert "<think>" in rendered
    assert encode_prompt(thinking, ROW, 512) == encode_prompt(build_tokenizer(512), ROW, 512)


def test_a_thinking_block_inside_the_conversation_stays() -> None:
    messages = [
        *ROW.messages,
        {"role": "assistant", "content": "<think>"},
        {"role": "user", "content": "Again <think>"},
    ]
    tokenizer = build_tokenizer(512)
    assert tokenizer.decode(encode_prompt(tokenizer, Row(messages, "", None, 0), 512)).count("<think>") == 2


def test_a_prompt_longer_than_allowed_is_refused_by_its_length() -> None:
    tokenizer = build_tokenizer(512)
    length = len(encode_prompt(tokenizer, ROW, 512))
    assert len(encode_prompt(tokenizer, ROW, length)) == length
    with pytest.raises(PromptTooLong, match=f"row 4: expected a prompt of at most {length - 1} tokens, got {length}"):
        encode_prompt(tokenizer, ROW, length - 1)


def test_a_row_without_a_worked_answer_cannot_be_learned() -> None:
    with pytest.raises(DataError, match="row 4: SFT wants a worked answer"):
        encode_response(build_tokenizer(512), Row(ROW.messages, "3", None, 4))


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        encode_prompt(tokenizer_with(None), ROW, 512)


def test_a_template_that_refuses_the_roles_says_which() -> None:
    strict = tokenizer_with("{{ raise_exception('no system messages') }}")
    row = Row([{"role": "system", "content": "x"}, *ROW.messages], "", None, 9)
    with pytest.raises(DataError, match=r"row 9: .* roles system, user: no system messages"):
        encode_prompt(strict, row, 512)


def test_the_end_of_a_turn_is_the_templates_even_if_the_end_token_is_another() -> None:
    base = build_tokenizer(512)
    base.eos_token = "<|pad|>"
    assert end_of_turn(base) == base.convert_tokens_to_ids(END_OF_TURN)
    assert encode_response(base, ROW)[-1] == base.convert_tokens_to_ids(END_OF_TURN)


def test_a_template_that_ends_turns_with_plain_text_falls_back_to_the_end_token() -> None:
    plain = tokenizer_with("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert end_of_turn(plain) == plain.eos_token_id


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>x</think><answer>4</answer>", "4"),
        ("<answer>1</answer> no: <answer>\n 2 \n</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_counts(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer
