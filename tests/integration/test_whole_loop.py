"""One command, one whole run: the quickstart recipe, shrunk, from nothing to an exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.run import ROOT, Run

pytestmark = pytest.mark.integration

STOPPED_AT = 40
SETS = (
    "model.build.hidden_size=64",
    "model.build.intermediate_size=128",
    "model.build.layers=2",
    "model.build.heads=2",
    "model.build.kv_heads=1",
    "sft.batch_size=16",
    "sft.lr=5e-3",
    "sft.stop.accuracy=0.0",  # the rule holds at the first look
    f"sft.stop.every={STOPPED_AT}",
    "train.batches=6",
    "train.batch_size=4",
    "train.samples=4",
    "train.mu=2",
    "train.filter_equal_rewards=false",
    "rollout.slots=16",
    "evaluation.suites.heldout.problems=20",
    "evaluation.every=3",
    "checkpoint.every=4",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Run(tmp_path_factory.mktemp("whole") / "run") as whole:
        whole.up(ROOT / "recipes" / "quickstart.toml", *SETS)
        assert whole.wait() == 0, whole.story()
        yield whole


def test_every_step_is_recorded_and_the_books_are_clean(run: Run) -> None:
    audit = run.audit()
    assert (audit.clean, audit.outcome) == (True, "complete"), "\n".join(audit.lines())
    steps = [(line["stage"], line["step"], line["version"]) for line in run.metrics()]
    sft = [("sft", step, step) for step in range(STOPPED_AT)]
    train = [("train", STOPPED_AT + step, STOPPED_AT + step // 2) for step in range(12)]
    assert steps == sft + train
    assert all(line["loss"] == line["loss"] and line["grad_norm"] > 0 for line in run.metrics()[:STOPPED_AT])


def test_a_stop_rule_that_holds_ends_its_stage(run: Run) -> None:
    began = [(fact["stage"], fact["version"]) for fact in run.facts("stage_began")]
    assert began == [("sft", 0), ("train", STOPPED_AT), ("closing", STOPPED_AT + 6)]


def test_nobody_is_left_behind(run: Run) -> None:
    assert run.all_gone(), run.story()


def test_held_out_accuracy_is_judged_first_in_between_and_last(run: Run) -> None:
    judged = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in run.folder.glob("eval/*.json")}
    assert {STOPPED_AT, STOPPED_AT + 6} < judged.keys()
    for verdict in judged.values():
        low, high = verdict["interval"]
        assert verdict["n"] == 20
        assert low <= verdict["correct"] / 20 <= high
    text = run.outputs.read_text()
    assert "before  held-out accuracy" in text and "after   held-out accuracy" in text and "clean" in text


def test_samples_can_be_read_beside_their_rewards(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "samples" / "rollout-0.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["purpose"] == "train"]
    assert trained
    for line in trained:
        assert len(line["completions"]) == len(line["rewards"]) == len(line["lengths"]) == 4
        assert "<|im_start|>user" in line["prompt"]


def test_the_last_checkpoint_holds_the_last_step(run: Run) -> None:
    settled = run.facts("settled")[-1]
    assert (settled["version"], settled["step"]) == (STOPPED_AT + 6, STOPPED_AT + 12)
    folder = run.folder / settled["path"]
    names = {path.name for path in folder.iterdir()}
    assert {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "random.safetensors"} <= names
    assert not list((run.folder / "checkpoints").glob(".*")), "a leftover of an unfinished checkpoint"


def test_every_log_line_says_which_run_and_replica(run: Run) -> None:
    for replica in ("controller", "policy-0", "rollout-0"):
        lines = [json.loads(line) for line in (run.folder / "logs" / f"{replica}.jsonl").read_text().splitlines()]
        assert lines
        assert {(line["run"], line["replica"]) for line in lines} == {("run", replica)}
        assert not [line for line in lines if line["level"] == "error"]


def test_the_export_is_a_model_that_transformers_loads_and_runs(run: Run) -> None:
    export: Path = run.folder / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 2 + 3 ="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        answer = model.generate(**ids, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
    # forty batches teach the form, if not yet the sums
    assert text.startswith("<think>")
