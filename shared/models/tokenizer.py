"""The tokenizer of built models: made in code, so that it is the same in every process and needs no file.

Every ASCII character is a token, and so are the marks of the chat format, of worked answers, and the words of
`words.py`. Invariant: decoding what was encoded gives back any ASCII text; other characters become `<|unk|>`.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.models.words import BARE_WORDS, SPACED_WORDS

PAD, UNKNOWN, START_OF_TURN, END_OF_TURN = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<think>", "</think>", "<answer>", "</answer>")
"""Part of a completion's text: kept when special tokens are left out of a decoded text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer for models that take `context` tokens; ends turns with `<|im_end|>`."""
    words = [*BARE_WORDS, *(f" {word}" for word in SPACED_WORDS)]
    pieces = [PAD, UNKNOWN, START_OF_TURN, END_OF_TURN, *MARKS, *map(chr, range(128)), *words]
    backend = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    # a word counts only where no letter follows; whatever is no word falls apart into characters
    whole_word = "|".join(sorted(map(re.escape, words), key=lambda word: (-len(word), word)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"(?:{whole_word})(?![A-Za-z])|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(piece, special=True) for piece in (PAD, UNKNOWN, START_OF_TURN, END_OF_TURN)]
    )
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        additional_special_tokens=[START_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
