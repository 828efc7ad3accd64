"""Loads what [model] names: a Hugging Face folder or hub name, or a model built from the seed.

Policies load weights; engines ask for a skeleton, whose weights come by sync. Only safetensors are read: a pickle of
weights is refused.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from shared.config.schema import ModelTable
from shared.models.build import build_config, build_model
from shared.models.errors import ModelError
from shared.models.folder import checked_path, first_line
from shared.models.images import FAMILIES, ImageReader
from shared.models.tokenizer import build_tokenizer

ATTENTION = "sdpa"


def load_tokenizer(model: ModelTable) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; it has an end token, and a pad token (the end token, if it had none)."""
    if model.build is not None:
        return build_tokenizer(model.build.context)
    path = checked_path(model, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        # without its files, some families' tokenizers come up empty instead of failing
        if tokenizer.vocab_size <= len(tokenizer.added_tokens_decoder):
            raise ValueError(f"a vocabulary of {tokenizer.vocab_size} tokens")
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected a tokenizer beside the model, got {first_line(error)}; "
            f"copy tokenizer.json and tokenizer_config.json from where the model came"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path {path!r}: expected a tokenizer with an end token, got one without; "
            f"set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: ModelTable) -> PretrainedConfig:
    """The model's configuration, without its weights."""
    if model.build is not None:
        return build_config(model.build, build_tokenizer(model.build.context))
    path = checked_path(model, weights=False)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        if not Path(path).is_dir():
            raise ModelError(
                f"model.path {path!r}: expected a folder here, or a model on the hub or in its cache, got "
                f"{first_line(error)}; check the name and the network, or give a folder ('orrery model' makes one)"
            ) from error
        raise ModelError(
            f"model.path {path!r}: expected the configuration of a causal LM, got {first_line(error)}; "
            f"check config.json; a model with code of its own wants model.trust_remote_code = true"
        ) from error


def load_images(model: ModelTable) -> ImageReader | None:
    """What reads images for the model, None for one of text alone."""
    config = load_config(model)
    if config.model_type not in FAMILIES:
        return None
    path = checked_path(model, weights=False)
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected preprocessor_config.json beside a vision-language model, got "
            f"{first_line(error)}; copy it from where the model came (reading it wants the package pillow)"
        ) from error
    return ImageReader(processor, int(config.image_token_id))


def load_model(model: ModelTable, seed: int, *, weights: bool) -> PreTrainedModel:
    """The model on the CPU in `model.dtype`, in evaluation mode, tied weights tied.

    `weights` false gives a skeleton: right names, types and shapes, arbitrary values.
    """
    dtype = getattr(torch, model.dtype)
    config = load_config(model)
    if model.build is not None:
        loaded = build_model(config, seed, dtype, ATTENTION)
    elif weights:
        loaded = _load_weights(checked_path(model, weights=True), config, dtype, model.trust_remote_code)
    else:
        with no_init_weights():
            loaded = _class_of(config).from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=model.trust_remote_code
            )
        loaded.tie_weights()
    return loaded.eval()


def load_skeleton(model: ModelTable) -> PreTrainedModel:
    """The model without any memory for its weights: names, types, shapes and configuration, in evaluation mode.

    What no file has, since it follows from the configuration (rotary frequencies), is there and on the CPU.
    """
    skeleton = skeleton_of(load_config(model), model)
    if model.path is not None:
        with suppress(OSError):  # a model need not have one
            skeleton.generation_config = GenerationConfig.from_pretrained(checked_path(model, weights=False))
    return skeleton


def skeleton_of(config: PretrainedConfig, model: ModelTable) -> PreTrainedModel:
    """The same of a configuration that is at hand."""
    with torch.device("meta"):
        skeleton = _class_of(config).from_config(
            config,
            dtype=getattr(torch, model.dtype),
            attn_implementation=ATTENTION,
            trust_remote_code=model.trust_remote_code,
        )
    skeleton.tie_weights()
    for name, buffer in list(skeleton.named_non_persistent_buffers()):
        module, _, leaf = name.rpartition(".")
        setattr(skeleton.get_submodule(module), leaf, torch.empty_like(buffer, device="cpu"))
    for parameter in skeleton.parameters():
        parameter._is_hf_initialized = True  # transformers' own mark of what is not to be drawn
    skeleton.initialize_weights()
    return skeleton.eval()


def _load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    # services write log lines, which a progress bar would tear apart
    disable_progress_bar()
    try:
        loaded, report = _class_of(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected safetensors weights of a causal LM, got {first_line(error)}; "
            f"download the model again, or convert its weights to safetensors"
        ) from error
    # transformers fills weights that the files lack with random numbers and only warns
    for key, problem in (("missing_keys", "without"), ("mismatched_keys", "with another shape of")):
        if names := sorted(map(str, report[key])):
            raise ModelError(
                f"model.path {path!r}: expected a weight for each parameter of {type(loaded).__name__}, got files "
                f"{problem} {names[0]} (and {len(names) - 1} more); do config.json and the weights belong together?"
            )
    return loaded


def _class_of(config: PretrainedConfig) -> Any:
    """Which of transformers' classes makes models of that configuration."""
    return AutoModelForImageTextToText if config.model_type in FAMILIES else AutoModelForCausalLM
