"""From what a person types behind `orrery eval` to a model and the problems it is asked.

Imports torch only to load a model. Whatever a person can get wrong is an `EvalError`: expected, got, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from deploy.cli.runs import RUNS
from shared.config import Recipe, load_recipe
from shared.config.load import explain
from shared.config.schema import DataTable, ModelTable, SuiteTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shared.data.dataset import Dataset

TASK = "task:"
TASK_SEED = 424_242
"""Seed of a task that is named alone: far from those that recipes use."""
FILES = {".jsonl": "jsonl", ".parquet": "parquet"}


class EvalError(Exception):
    """A model or suite that cannot be judged; the text says what was expected, what came, what to do."""


@dataclass(frozen=True)
class ModelSource:
    """A model to judge: `table` says how it is made, `checkpoint` what is loaded into it; `recipe` is its run's."""

    label: str
    table: ModelTable
    checkpoint: Path | None = None
    recipe: Recipe | None = None

    def load(self, threads: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model with its weights, and its tokenizer. EvalError if there is no such thing."""
        import torch

        from shared.models import ModelError, load_model, load_tokenizer

        torch.set_num_threads(threads)
        try:
            tokenizer = load_tokenizer(self.table)
            model = load_model(self.table, 0, weights=self.checkpoint is None)
        except ModelError as error:
            raise EvalError(f"{self.label}: {error}") from error
        if tokenizer.chat_template is None:
            raise EvalError(
                f"{self.label}: expected a tokenizer with a chat template, got one without; use the instruct version "
                "of the model, or put a chat_template.jinja beside its tokenizer"
            )
        if self.checkpoint is not None:
            _load_checkpoint(self.checkpoint, model)
        return model, tokenizer


@dataclass(frozen=True)
class Asked:
    """A suite and its rows."""

    name: str
    suite: SuiteTable
    dataset: Dataset


def find_model(text: str) -> ModelSource:
    """The model that `text` names: a run (its export, else its newest checkpoint), a checkpoint, a folder, a name."""
    path = Path(text).expanduser()
    run = next((folder for folder in (path, RUNS / text) if (folder / "config.toml").is_file()), None)
    if run is not None:
        recipe = load_recipe(run / "config.toml")
        if (run / "export" / "config.json").is_file():
            return ModelSource(f"{run.resolve().name}", ModelTable(path=str(run / "export")), recipe=recipe)
        numbered = [folder for folder in (run / "checkpoints").glob("*") if folder.name.isdigit()]
        if not numbered:
            raise EvalError(
                f"{text}: expected a run with an export or a checkpoint, found neither yet; wait for the first "
                f"checkpoint, or go on with 'orrery resume {text}'"
            )
        newest = max(numbered, key=lambda folder: int(folder.name))
        return ModelSource(f"{run.resolve().name} at step {newest.name}", recipe.model, newest, recipe)
    if (path / "manifest.json").is_file() and (path / "state.json").is_file():
        config = path.resolve().parent.parent / "config.toml"
        if not config.is_file():
            raise EvalError(
                f"{text}: expected the checkpoint inside its run folder, found no {config}; the run's recipe says how "
                "its model is made"
            )
        recipe = load_recipe(config)
        return ModelSource(f"{config.parent.name} at step {path.resolve().name}", recipe.model, path, recipe)
    looks_like_a_path = path.exists() or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if looks_like_a_path and not (path / "config.json").is_file():
        found = "nothing there" if not path.exists() else "neither config.json nor config.toml in it"
        raise EvalError(
            f"{text}: expected a model's folder, a run or a checkpoint, found {found}; give a folder with config.json "
            "and *.safetensors, a run's folder or id, or a hub name like Qwen/Qwen3-0.6B"
        )
    inside = path.resolve().parent / "config.toml"
    recipe_of_run = load_recipe(inside) if path.is_dir() and inside.is_file() else None  # an export
    return ModelSource(path.name if path.is_dir() else text, ModelTable(path=text), recipe=recipe_of_run)


def ask(text: str | None, recipe: Recipe | None, changes: Mapping[str, object], seed: int) -> Asked:
    """The suite that `text` names, with `changes` to its settings (None: none); without `text` the recipe's first."""
    evaluation = recipe.evaluation if recipe is not None else None
    suites = list(evaluation.suites) if evaluation is not None else []
    if text is None and not suites:
        raise EvalError(
            "expected a suite, got none: give --suite task:chain_sum, --suite FILE.jsonl, or --recipe with "
            "[evaluation.suites.NAME] tables"
        )
    name = text if text is not None else suites[0]
    if evaluation is not None and recipe is not None and name in evaluation.suites:
        return _asked(name, evaluation.suites[name], recipe.data[evaluation.dataset(name)], changes)
    file = Path(name).expanduser()
    if name.startswith(TASK):
        size = changes.get("problems") or SuiteTable().problems
        table = {"kind": "reasoning_gym", "task": name.removeprefix(TASK), "size": size, "seed": TASK_SEED + seed}
        return _asked(name, SuiteTable(), DataTable.model_validate(table), changes)
    if file.suffix in FILES:
        table = {"kind": FILES[file.suffix], "path": str(file)}
        return _asked(file.stem, SuiteTable(), DataTable.model_validate(table), changes)
    known = ", ".join(suites) or "none (give --recipe)"
    raise EvalError(
        f"--suite {name!r}: expected a suite of the recipe ({known}), task:NAME of reasoning-gym, or a file ending in "
        f"{' or '.join(FILES)}; got none of these"
    )


def _asked(name: str, suite: SuiteTable, table: DataTable, changes: Mapping[str, object]) -> Asked:
    from shared.data import open_dataset
    from shared.data.dataset import DataError

    try:
        changed = {key: value for key, value in changes.items() if value is not None}
        settled = SuiteTable.model_validate({**suite.model_dump(), **changed})
        dataset = open_dataset(name, table)
        if settled.category is not None:
            dataset.category(0, settled.category)
    except ValidationError as error:
        raise EvalError(f"suite {name}:\n{explain(error)}") from error
    except DataError as error:
        raise EvalError(str(error)) from error
    return Asked(name, settled, dataset)


def _load_checkpoint(path: Path, model: PreTrainedModel) -> None:
    """Put a checkpoint's weights into the model, after its files were compared with its manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from services.policy.checkpoint import CheckpointError, verify
    from shared.weights import WeightsError, load_into

    try:
        verify(path)
        load_into(model, load_file(path / "model.safetensors"))
    except (CheckpointError, WeightsError, SafetensorError, OSError) as error:
        raise EvalError(f"checkpoint {path}: {error}; give another checkpoint, or the run's export") from error
