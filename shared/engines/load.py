"""Makes the engine that a recipe names, without its weights: those come by sync. Backends are imported here, lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from shared.config import Recipe
from shared.data.chat import end_of_turn
from shared.engines.base import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_engine(
    recipe: Recipe, role: Literal["rollout", "evaluator"] = "rollout"
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """The engine for [model], with the slots of `role`, and its tokenizer. ModelError, DataError or EngineError."""
    from shared.engines.transformers import TransformersEngine
    from shared.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model, recipe.run.seed, weights=False)
    slots = (recipe.evaluator if role == "evaluator" else recipe.rollout).slots
    stops = stop_tokens(tokenizer, model.generation_config)
    return TransformersEngine(model, slots=slots, stops=stops), tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Ids that end a response: the tokenizer's end token, the chat template's end of turn, the model's own list."""
    configured = getattr(generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    stops.update(configured if isinstance(configured, list) else [configured])
    marked = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if marked != tokenizer.unk_token_id:
        stops.add(marked)
    return {stop for stop in stops if isinstance(stop, int)}
