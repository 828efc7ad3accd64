"""What can be known of a recipe before it runs: do its data sets open, is its model whole, what would it do.

Everything is looked at, whatever was wrong before. Weights are not loaded, and nothing is downloaded, but for a hub
model's small files when a run is about to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared.config import Recipe
from shared.data.dataset import DataError, Dataset


@dataclass(frozen=True)
class Findings:
    """What is good, and what is wrong, in words."""

    facts: list[str]
    faults: list[str]


ROWS = 5000
"""Most rows of a file that are looked at before a run; others are met, and given up one by one, while it runs."""


def look(recipe: Recipe, *, starting: bool = False) -> Findings:
    """Open every data set and the model's configuration and tokenizer.

    `starting`, just before a run: a hub model is looked for too, and a built one, which cannot be missing, is left out.
    """
    found = Findings([], [])
    for name in recipe.data:
        _try(found, f"data.{name}", partial(_dataset, recipe, name))
    if not starting or recipe.model.build is None:
        _try(found, "model", lambda: _model(recipe, hub=starting))
    if recipe.policy.parallel.ranks > 1:
        _try(found, "policy.parallel", lambda: _layout(recipe, hub=starting))
    if recipe.policy.compile:
        _try(found, "policy.compile", _compiler)
    _try(found, "rewards", lambda: _rewards(recipe))
    _try(found, "bus", lambda: _bus(recipe, starting))
    return found


def plan_lines(recipe: Recipe) -> Iterator[str]:
    """What the recipe would run, in a few lines."""
    for name, table in (("sft", recipe.sft), ("train", recipe.train)):
        if table is None:
            continue
        rows = table.batches * table.batch_size
        words = [f"{name}: {table.batches} batches of {table.batch_size} prompts from {table.dataset} ({rows} in all)"]
        if table is recipe.train and recipe.train is not None:
            words.append(f"{recipe.train.samples} samples each, at most {recipe.rollout.max_new_tokens} tokens")
            words.append(f"staleness at most {recipe.train.max_staleness}")
        if recipe.sft is not None and table is recipe.sft and recipe.sft.stop is not None:
            words.append(f"ends earlier at held-out accuracy {recipe.sft.stop.accuracy:g}")
        yield ", ".join(words)
    ranks = f" of {recipe.policy.parallel.ranks} ranks" if recipe.policy.parallel.ranks > 1 else ""
    yield f"processes: 1 controller, {recipe.policy.replicas} policy{ranks}, {recipe.rollout.replicas} rollout"
    if recipe.evaluation is not None:
        suites = ", ".join(f"{name} ({suite.problems} problems)" for name, suite in recipe.evaluation.suites.items())
        yield f"held-out accuracy every {recipe.evaluation.every} batches: {suites}"
    yield f"a checkpoint every {recipe.checkpoint.every} batches, the last {recipe.checkpoint.keep} are kept"


def _try(found: Findings, what: str, check: Callable[[], str]) -> None:
    try:
        found.facts.append(check())
    except ModuleNotFoundError as error:
        found.facts.append(f"{what} not looked at: {error.name} is not installed here")
    except Exception as error:  # files, generators and packages that are not ours
        text = str(error) or type(error).__name__
        fault = text if what.partition(".")[2] in text or what in text else f"{what}: {text}"
        if fault not in found.faults:  # the model's look reads a row too
            found.faults.append(fault)


def _bus(recipe: Recipe, starting: bool) -> str:
    """Whether the controller may listen there; where it is about to, the keys of all that will run here too."""
    from shared.bus import keys_place
    from shared.bus.keys import PERSON, client_keys, controller_keys
    from shared.bus.sockets import check_bind

    place = keys_place(recipe.bus.keys)
    check_bind(recipe.bus.bind, keys=place is not None)
    if place is None:
        return f"bus: {recipe.bus.bind}, without keys"
    if starting:
        controller_keys(place)
        roles = ["policy", "rollout", *(["evaluator"] if recipe.judge == "evaluator" else [])]
        for sender in (*(f"{role}-0" for role in roles), PERSON):
            client_keys(place, sender)
    return f"bus: {recipe.bus.bind}, with the keys of {place}"


def _dataset(recipe: Recipe, name: str) -> str:
    from shared.data import open_dataset

    table = recipe.data[name]
    if table.kind == "huggingface" and not Path(table.path or "").expanduser().exists():
        return f"data.{name}: {table.path} is a hub name, not looked for"
    dataset = open_dataset(name, table)
    row = dataset.row(0)
    if recipe.sft is not None and recipe.sft.dataset == name and row.response is None:
        raise ValueError(
            f"data.{name}: [sft] learns worked answers, but row 0 has none; name their column with `response = ...`, "
            "or leave [sft] out"
        )
    if table.kind in ("jsonl", "parquet"):
        _rows(dataset)
    return f"data.{name}: {len(dataset)} rows"


def _rows(dataset: Dataset) -> None:
    """ValueError with the first of the rows that cannot be used."""
    looked, bad, first = min(len(dataset), ROWS), 0, ""
    for index in range(looked):
        try:
            dataset.row(index)
        except DataError as error:
            bad, first = bad + 1, first or str(error)
    if bad:
        name = f"data.{dataset.identity.name}"
        raise ValueError(f"{name}: {bad} of {looked} rows cannot be used; the first: {first}")


def _rewards(recipe: Recipe) -> str:
    from shared.rewards.check import check_rewards

    check_rewards(recipe)
    return f"rewards: {', '.join(f'{part.name} ({part.kind}) x {part.weight:g}' for part in recipe.rewards.parts)}"


def _layout(recipe: Recipe, *, hub: bool) -> str:
    from services.policy.layouts.fit import check_fit
    from shared.models.load import load_config
    from shared.weights.slices import Parallel

    if not hub and _on_hub(recipe):
        return "policy.parallel: not looked at without the model's configuration"
    check_fit(load_config(recipe.model), Parallel.of(recipe.policy.parallel))
    return f"policy.parallel: {recipe.policy.parallel.ranks} ranks"


def _compiler() -> str:
    from services.policy.layouts.compiled import check_compiler

    check_compiler()
    return "policy.compile: a C++ compiler is here"


def _on_hub(recipe: Recipe) -> bool:
    """Whether the model is to be downloaded."""
    path = recipe.model.path
    return path is not None and not Path(path).expanduser().exists() and not path.startswith((".", "/", "~"))


def _model(recipe: Recipe, *, hub: bool) -> str:
    from transformers.utils.logging import set_verbosity_error

    from shared.data import open_dataset
    from shared.data.chat import encode_prompt
    from shared.models.folder import check_weights
    from shared.models.load import load_config, load_tokenizer

    set_verbosity_error()
    model = recipe.model
    if not hub and _on_hub(recipe):
        return f"model {model.path}: a hub name, not looked for"
    config = load_config(model)
    check_weights(model)
    tokenizer = load_tokenizer(model)
    context = int(config.get_text_config().max_position_embeddings)
    name = (recipe.train or recipe.sft).dataset  # type: ignore[union-attr]
    room = context - (recipe.rollout.max_new_tokens if recipe.train is not None else 0)
    length = 0
    if recipe.data[name].kind != "huggingface":
        length = len(encode_prompt(tokenizer, open_dataset(name, recipe.data[name]).row(0), max(1, room)))
    prompt = f", first prompt of {name} {length} tokens" if length else ""
    return f"model {model.path or config.model_type}: context {context}, vocabulary {len(tokenizer)}{prompt}"
