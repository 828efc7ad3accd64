"""Rows as token ids, through the tokenizer's own chat template.

Rollouts encode prompts; policies encode prompts and worked answers for SFT. Invariant: prompt and response join
without a seam - the response begins where the template hands the turn to the assistant, and ends with the token that
ends a turn.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shared.data.dataset import DataError, Messages, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# some templates open (or open and close) the thinking block at the end of the prompt
THINKING = re.compile(r"<think>\s*(</think>\s*)?\Z")


class PromptTooLong(DataError):
    """The prompt has more tokens than it may take."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row, context: int) -> list[int]:
    """Token ids of the row's messages, up to where the assistant speaks; `context` is the most tokens they may take.

    A thinking block that the template opens is left to the completion, which then holds the whole of
    `<think>..</think><answer>..</answer>` for every model.
    """
    text = THINKING.sub("", _render(tokenizer, row.messages, f"row {row.index}", generation=True))
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(tokens) > context:
        raise PromptTooLong(
            f"row {row.index}: expected a prompt of at most {context} tokens, got {len(tokens)}; "
            f"leave such rows out, or use a model with a longer context"
        )
    return tokens


def encode_response(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Token ids of the row's worked answer, with the token that ends a turn."""
    if row.response is None:
        raise DataError(
            f"row {row.index}: SFT wants a worked answer, the row has none; name its column with `response` "
            f"in the [data.NAME] table, or choose a task with worked answers (see shared/data/traces.py)"
        )
    tokens: list[int] = tokenizer(row.response, add_special_tokens=False)["input_ids"]
    return [*tokens, end_of_turn(tokenizer)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts behind an assistant's words; the tokenizer's end token if it puts none.

    Base models often call another token (`<|endoftext|>`) their end than their own template uses.
    """
    probe = "The words of the assistant."
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": probe}]
    behind = _render(tokenizer, messages, "a conversation of two turns", generation=False).rpartition(probe)[2]
    tokens: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in tokens if token in special), tokenizer.eos_token_id)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, place: str, *, generation: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "expected a tokenizer with a chat template, got one without; use the instruct version of the model, "
            "or put a chat_template.jinja beside its tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{place}: the chat template refuses messages with the roles {roles}: {error}; "
            f"change the row's messages, or leave out `system`"
        ) from error
    return str(text)
