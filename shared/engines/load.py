"""Makes the engine that a recipe names, without its weights: those come by sync. Backends are imported here, lazily."""

from __future__ import annotations

import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from shared.bus import BusClient
from shared.config import Recipe
from shared.data.chat import end_of_turn
from shared.engines.base import Engine

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_engine(
    recipe: Recipe,
    replica: str,
    client: BusClient | None = None,
    *,
    role: Literal["rollout", "evaluator"] = "rollout",
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """The engine of a replica for [model], with the slots of `role`, and its tokenizer.

    `client` is that of the replica's rank 0: the engine's workers join it on the bus as the other ranks.
    ModelError, DataError, or EngineError; EngineDied if a process that it started did not come up.
    """
    from shared.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    if recipe.rollout.engine_of(replica) == "transformers":
        return _transformers(recipe, role, tokenizer), tokenizer
    return _hosted(recipe, replica, client, role, tokenizer), tokenizer


def _transformers(recipe: Recipe, role: Literal["rollout", "evaluator"], tokenizer: PreTrainedTokenizerBase) -> Engine:
    from shared.engines.transformers import TransformersEngine
    from shared.models import load_images, load_model

    model = load_model(recipe.model, recipe.run.seed, weights=False)
    return TransformersEngine(
        model,
        slots=_slots(recipe, role),
        stops=stop_tokens(tokenizer, model.generation_config),
        quantization=_quantization(recipe, role),
        images=load_images(recipe.model),
    )


def _hosted(
    recipe: Recipe,
    replica: str,
    client: BusClient | None,
    role: Literal["rollout", "evaluator"],
    tokenizer: PreTrainedTokenizerBase,
) -> Engine:
    """An engine of its own environment, which reads the model's configuration from a folder while it starts."""
    from shared.engines.folder import write_folder
    from shared.models import load_images, load_skeleton
    from shared.weights import manifest_of

    skeleton = load_skeleton(recipe.model)
    config, slots = skeleton.config.get_text_config(), _slots(recipe, role)
    quantization, images = _quantization(recipe, role), load_images(recipe.model)
    threads = (recipe.evaluator if role == "evaluator" else recipe.rollout).threads
    common: dict[str, Any] = {
        # their kernels for narrow weights want narrow activations, whatever the policy trains in
        "dtype": recipe.model.dtype if quantization is None else "bfloat16",
        "seed": recipe.run.seed,
        "quantization": quantization,
        "memory": recipe.rollout.memory,
        "parallel": recipe.rollout.parallel,
        "manifest": manifest_of(skeleton),
        "context": int(config.max_position_embeddings),
        "slots": slots,
        "stops": stop_tokens(tokenizer, skeleton.generation_config),
        "start_s": recipe.timeouts.load_s,
        "call_s": recipe.timeouts.transfer_s,
        "images": images,
        "client": client,
        "serve": recipe.rollout.port_of(replica) if role == "rollout" else None,
    }
    folder = TemporaryDirectory(prefix="orrery-model-")
    write_folder(skeleton, tokenizer, Path(folder.name), images)
    if recipe.rollout.engine_of(replica) == "vllm":
        from shared.engines import vllm

        vllm.prepare_process(threads, slots * common["context"] * _cache_bytes(config, skeleton.dtype.itemsize))
        engine: Engine = vllm.VllmEngine(Path(folder.name), **common)
    else:
        from shared.engines import sglang

        sglang.prepare_process(threads, recipe.rollout.parallel.ranks)
        engine = sglang.SglangEngine(Path(folder.name), vocabulary=int(config.vocab_size), **common)
    weakref.finalize(engine, folder.cleanup)  # its endpoint reads the tokenizer as long as it lives
    return engine


def _cache_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * itemsize)


def _slots(recipe: Recipe, role: Literal["rollout", "evaluator"]) -> int:
    return (recipe.evaluator if role == "evaluator" else recipe.rollout).slots


def _quantization(recipe: Recipe, role: Literal["rollout", "evaluator"]) -> Any:
    """Evaluators of their own judge the model that is trained, in full precision."""
    return recipe.rollout.quantization if role == "rollout" else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Ids that end a response: the tokenizer's end token, the chat template's end of turn, the model's own list."""
    configured = getattr(generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    stops.update(configured if isinstance(configured, list) else [configured])
    marked = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if marked != tokenizer.unk_token_id:
        stops.add(marked)
    return {stop for stop in stops if isinstance(stop, int)}
