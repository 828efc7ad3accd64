"""Bad input that is found before a run begins: each is told in one text that says what to do, and nothing is made."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.checks.apart import look_apart
from deploy.checks.recipe import look
from deploy.cli import app
from deploy.local.folder import RunFolderError, RunLock, create_run
from deploy.local.plan import ReplicaPlan
from deploy.local.process import last_words
from shared.config import Recipe, RecipeError, load_recipe
from shared.config.schema import BuildTable, ModelTable

SMALL = BuildTable(
    hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, context=64, tie_embeddings=True
)
ROWS = [{"prompt": f"{n}+1", "answer": n + 1, "response": f"<answer>{n + 1}</answer>"} for n in range(10)]
RECIPE = """
[model]
path = "{model}"

[data.sums]
kind = "jsonl"
path = "{rows}"

[sft]
dataset = "sums"
batches = 1
batch_size = 2
lr = 1e-3

[train]
dataset = "sums"
batches = 1
batch_size = 2
samples = 2
lr = 1e-3

[rollout]
max_new_tokens = 24

[[rewards.parts]]
kind = "exact"
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, whole."""
    from shared.models import load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("saved")
    table = ModelTable(build=SMALL)
    load_model(table, 0, weights=True).save_pretrained(folder)
    load_tokenizer(table).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "model"))


def write_recipe(folder: Path, model: Path | str, rows: list[dict[str, object]]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, rows=folder / "rows.jsonl"))
    return recipe


def recipe_of(folder: Path, model: Path | str, rows: list[dict[str, object]] = ROWS) -> Recipe:
    return load_recipe(write_recipe(folder, model, rows))


def the_fault(recipe: Recipe) -> str:
    """The only thing that is wrong."""
    faults = look(recipe, starting=True).faults
    assert len(faults) == 1, faults
    return faults[0]


def test_a_good_recipe_has_no_faults(model: Path, tmp_path: Path) -> None:
    assert look(recipe_of(tmp_path, model), starting=True).faults == []


def cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def cut_header(model: Path) -> None:
    os.truncate(model / "model.safetensors", 40)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


def missing_shard(model: Path) -> None:
    no_weights(model)
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_weights, ("model.safetensors of", "bytes, found", "the download did not finish: run it again")),
        (cut_header, ("model.safetensors of", "bytes, found 40", "the download did not finish")),
        (no_weights, ("expected weights in *.safetensors", "finish the download")),
        (missing_shard, ("expected 2 weight files, 2 are missing", "the download did not finish: run it again")),
        (no_config, ("expected config.json in the folder", "give the folder that holds the model's files")),
        (no_tokenizer, ("expected a tokenizer beside the model", "copy tokenizer.json")),
        (no_template, ("expected a tokenizer with a chat template", "use the instruct version of the model")),
    ],
)
def test_a_models_folder_that_is_not_whole(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    spoil(model)
    fault = the_fault(recipe_of(tmp_path, model))
    for word in words:
        assert word in fault


def test_an_unknown_model(tmp_path: Path) -> None:
    fault = the_fault(recipe_of(tmp_path, tmp_path / "nowhere"))
    assert f"expected a folder at {tmp_path / 'nowhere'}, found none; mend the path" in fault


def test_an_unknown_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fault = the_fault(recipe_of(tmp_path, "nobody/no-such-model"))
    assert "a model on the hub or in its cache" in fault
    assert "check the name and the network, or give a folder" in fault


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("data set 'sums'", "expected at least one row, found none")),
        ([*ROWS, {"question": "1+1", "answer": 2}], ("1 of 11 rows", "line 11", "columns found: question, answer")),
        ([*ROWS, {"prompt": "1+1"}], ("1 of 11 rows", "line 11", "expected column 'answer'")),
        ([{**row, "prompt": "1+" * 40} for row in ROWS], ("expected a prompt of at most 40 tokens", "longer context")),
        ([{"prompt": "1", "answer": 1}], ("[sft] learns worked answers, but row 0 has none", "`response = ...`")),
    ],
    ids=["empty", "no-prompt", "no-answer", "too-long", "nothing-worked"],
)
def test_rows_that_cannot_be_used(
    model: Path, tmp_path: Path, rows: list[dict[str, object]], words: tuple[str, ...]
) -> None:
    fault = the_fault(recipe_of(tmp_path, model, rows))
    for word in words:
        assert word in fault


def test_a_look_from_another_process_finds_the_same_and_everything_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tmp_path / "nowhere", [])
    faults = look_apart(recipe)
    assert faults == look(recipe, starting=True).faults
    assert len(faults) == 2


def test_a_step_that_fits_into_no_message_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "a/b", ROWS)
    with pytest.raises(RecipeError, match=r"larger than bus.max_message_mb = 1: raise that.*lower train.batch_size"):
        load_recipe(recipe, ["bus.max_message_mb=1", "train.batch_size=2000"])
    load_recipe(recipe, ["bus.max_message_mb=1", "train.batch_size=2000", "train.minibatches=2"])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (("lr = 1e-3", "lr = "), ("is not valid TOML", "line")),
        (("samples = 2", "smaples = 2"), ("line 19", "unknown key; did you mean train.samples?")),
        (("batches = 1", "batches = 0"), ("sft.batches", "greater than or equal to 1 (got 0)")),
        (('dataset = "sums"', 'dataset = "sum"'), ("sft.dataset is 'sum'", "the [data.NAME] tables are: sums")),
    ],
)
def test_a_malformed_recipe_ends_up_with_code_2_and_makes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: tuple[str, str],
    words: tuple[str, ...],
) -> None:
    recipe = write_recipe(tmp_path, "a/b", ROWS)
    recipe.write_text(recipe.read_text().replace(*spoil, 1))
    monkeypatch.setattr(sys, "argv", ["orrery", "up", str(recipe), "--run-folder", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error ") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "a/b", ROWS))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"expected a folder that can be made and written, got Not a directory"):
        create_run(recipe, tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="No such file or directory"):
        RunLock(tmp_path / "nowhere").__enter__()


# --- last words -------------------------------------------------------------------------------------------------------

PLAN = ReplicaPlan("policy-0", "policy", ())


def write_log(folder: Path, *lines: dict[str, str]) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    text = "".join(json.dumps({"level": "info", **line}) + "\n" for line in lines)
    (folder / "logs" / "policy-0.jsonl").write_text(text + '{"level": "err')


def test_last_words_are_the_reason_without_the_traceback(tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n  File ...\nValueError: three, not two"
    starts = {"event": "policy starts"}
    write_log(tmp_path, starts, {"event": "failed", "level": "error", "exception": trace}, {"event": "policy ends"})
    assert last_words(tmp_path, PLAN) == "failed: ValueError: three, not two"
    write_log(tmp_path, starts, {"event": "no", "level": "error", "why": "the reason"}, {"event": "policy ends"})
    assert last_words(tmp_path, PLAN) == "the reason"


def test_last_words_are_never_those_of_an_earlier_process(tmp_path: Path) -> None:
    write_log(tmp_path, {"event": "old", "level": "error", "why": "old"}, {"event": "policy starts"})
    assert last_words(tmp_path, PLAN) == ""
    (tmp_path / "logs" / "policy-0.out").write_text("a: line\n\nanother\n")
    assert last_words(tmp_path, PLAN) == "a: line\nanother"
    (tmp_path / "logs" / "policy-0.out").write_text("Traceback (most recent call last):\n  x\nImportError: no torch\n")
    assert last_words(tmp_path, PLAN) == "ImportError: no torch"
