"""From a GGUF file to a Hugging Face folder that [model] path can name. Called by `orrery model`, once a model.

GGUF keeps weights in blocks of few bits; they are read back to numbers and written as bfloat16 safetensors, beside
configuration, generation configuration and tokenizer with its chat template.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from shared.models.errors import ModelError


def convert_gguf(file: Path, folder: Path, parameters: int) -> None:
    """Write the model of `file` to `folder`; ModelError unless it is a causal LM of `parameters` numbers.

    Tied weights count once. Wants the packages gguf and accelerate.
    """
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise ModelError(
            f"{file.name}: expected a GGUF file of a causal LM, got {type(error).__name__}: {error}; "
            f"take the file that the package carries"
        ) from error
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != parameters:
        raise ModelError(f"{file.name}: expected {parameters:,} parameters, got {found:,}; is it another model's file?")
    if tokenizer.chat_template is None:
        raise ModelError(f"{file.name}: expected a chat template in the file, got none; is it another model's file?")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
