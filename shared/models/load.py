"""Loads what [model] names: a Hugging Face folder or hub name, or a model built from the seed.

Policies load weights; engines ask for a skeleton, whose weights come by sync. Only safetensors are read: a pickle of
weights is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar

from shared.config.schema import ModelTable
from shared.models.build import build_config, build_model
from shared.models.errors import ModelError
from shared.models.images import FAMILIES, ImageReader
from shared.models.tokenizer import build_tokenizer

ATTENTION = "sdpa"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; what the safetensors library reads at most


def load_tokenizer(model: ModelTable) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model; it has an end token, and a pad token (the end token, if it had none)."""
    if model.build is not None:
        return build_tokenizer(model.build.context)
    path = _checked_path(model, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        # without its files, some families' tokenizers come up empty instead of failing
        if tokenizer.vocab_size <= len(tokenizer.added_tokens_decoder):
            raise ValueError(f"a vocabulary of {tokenizer.vocab_size} tokens")
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected a tokenizer beside the model, got {_first_line(error)}; "
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
    path = _checked_path(model, weights=False)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        if not Path(path).is_dir():
            raise ModelError(
                f"model.path {path!r}: expected a folder here, or a model on the hub or in its cache, got "
                f"{_first_line(error)}; check the name and the network, or give a folder ('orrery model' makes one)"
            ) from error
        raise ModelError(
            f"model.path {path!r}: expected the configuration of a causal LM, got {_first_line(error)}; "
            f"check config.json; a model with code of its own wants model.trust_remote_code = true"
        ) from error


def load_images(model: ModelTable) -> ImageReader | None:
    """What reads images for the model, None for one of text alone."""
    config = load_config(model)
    if config.model_type not in FAMILIES:
        return None
    path = _checked_path(model, weights=False)
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected preprocessor_config.json beside a vision-language model, got "
            f"{_first_line(error)}; copy it from where the model came (reading it wants the package pillow)"
        ) from error
    return ImageReader(processor, int(config.image_token_id))


def check_weights(model: ModelTable) -> None:
    """ModelError if the weights in the model's folder are not whole; what is not a folder is not looked at."""
    if model.path is not None and Path(model.path).expanduser().is_dir():
        _checked_path(model, weights=True)


def load_model(model: ModelTable, seed: int, *, weights: bool) -> PreTrainedModel:
    """The model on the CPU in `model.dtype`, in evaluation mode, tied weights tied.

    `weights` false gives a skeleton: right names, types and shapes, arbitrary values.
    """
    dtype = getattr(torch, model.dtype)
    config = load_config(model)
    if model.build is not None:
        loaded = build_model(config, seed, dtype, ATTENTION)
    elif weights:
        loaded = _load_weights(_checked_path(model, weights=True), config, dtype, model.trust_remote_code)
    else:
        with no_init_weights():
            loaded = _class_of(config).from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=model.trust_remote_code
            )
        loaded.tie_weights()
    return loaded.eval()


def load_skeleton(model: ModelTable) -> PreTrainedModel:
    """The model without any memory for its weights: names, types, shapes and configuration."""
    return skeleton_of(load_config(model), model)


def skeleton_of(config: PretrainedConfig, model: ModelTable) -> PreTrainedModel:
    """The same of a configuration that is at hand."""
    with torch.device("meta"):
        skeleton = _class_of(config).from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
    skeleton.tie_weights()
    return skeleton


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
            f"model.path {path!r}: expected safetensors weights of a causal LM, got {_first_line(error)}; "
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


def _checked_path(model: ModelTable, *, weights: bool) -> str:
    """The folder or hub name, after looking for what an interrupted download or a typing error leaves behind."""
    assert model.path is not None
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1:
            raise ModelError(
                f"model.path: expected a folder at {folder.absolute()}, found none; mend the path, "
                f"or give a hub name like Qwen/Qwen3-0.6B, or a [model.build] table"
            )
        return model.path
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path {model.path!r}: expected config.json in the folder, found {_listing(folder)}; "
            f"give the folder that holds the model's files"
        )
    if weights:
        _check_shards(folder, model.path)
    return str(folder)


def _check_shards(folder: Path, path: str) -> None:
    if (folder / INDEX).is_file():
        expected = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        missing = [name for name in expected if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"model.path {path!r}: expected {len(expected)} weight files, {len(missing)} are missing "
                f"(first: {missing[0]}); the download did not finish: run it again"
            )
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.path {path!r}: expected weights in *.safetensors, found {_listing(folder)}; "
            f"finish the download, or convert the weights to safetensors (pickled .bin files are not read)"
        )
    for file in sorted(folder.glob("*.safetensors")):
        size, wanted = file.stat().st_size, _whole_size(file)
        if size != wanted:
            raise ModelError(
                f"model.path {path!r}: expected {file.name} of {wanted} bytes, found {size}; "
                f"the download did not finish: run it again"
            )


def _whole_size(file: Path) -> int:
    """The bytes that a safetensors file has, by its own header (8 bytes of length, JSON, tensors); 8 without one."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, MAX_HEADER)))
        except ValueError:
            return 8 + length
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0]}"
