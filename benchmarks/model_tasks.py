"""Which tasks does a model half-know? `python -m benchmarks.model_tasks MODEL` measures before a recipe is written.

GRPO learns from groups whose samples differ in reward: a task that the model gets right between 20 and 60 % of the
time teaches at once, one that it never gets right teaches nothing. For each candidate this prints accuracy of greedy
answers, of samples at temperature 1, the share of prompts whose samples disagree (those that GRPO learns from), and
lengths. Uses the engine, the chat template and the verifier of a run. Writes `results/model_tasks.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, describe_machine, write_results
from shared.config.schema import DataTable, ModelTable
from shared.data import open_dataset
from shared.data.answers import extract_answer
from shared.data.chat import encode_prompt
from shared.data.dataset import Dataset
from shared.engines.base import Engine, Request
from shared.messages import Sampling

SYSTEM = "Reply with the final answer only, inside <answer></answer>. Example: <answer>12</answer>"

CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
    ("products", {"min_digits": 1, "max_digits": 1}),
    ("simple_equations", {"min_value": 1, "max_value": 9, "operators_weights": [0.5, 0.5, 0.0]}),
    ("gcd", {"min_value": 2, "max_value": 20}),
    ("letter_counting", {"min_words": 1, "max_words": 2}),
    ("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
    ("number_format", {"max_num_candidates": 3, "min_n": 10.0, "max_n": 1000.0, "max_delta": 100.0}),
    ("needle_haystack", {"min_num_statements": 3, "max_num_statements": 6}),
    ("leg_counting", {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 3}),
    ("word_sequence_reversal", {"min_words": 3, "max_words": 4}),
    ("family_relationships", {"min_family_size": 4, "max_family_size": 4}),
)


@dataclass(frozen=True)
class TaskResult:
    """What the model made of one task. Shares are from 0 to 1, lengths in tokens."""

    task: str
    options: dict[str, Any]
    rows: int
    samples: int
    greedy: float
    sampled: float
    answered: float
    mixed: float
    prompt_tokens: float
    response_tokens: float
    seconds: float
    example: str


def measure(
    engine: Engine, tokenizer: Any, dataset: Dataset, rows: int, samples: int, new_tokens: int
) -> dict[str, Any]:
    """Accuracy of greedy answers and of `samples` drawn answers to the first `rows` rows."""
    started = time.perf_counter()
    for row in range(rows):
        prompt = encode_prompt(tokenizer, dataset.row(row), engine.context - new_tokens)
        engine.submit(Request((row, "greedy"), prompt, 1, Sampling(0.0, 1.0, 0, new_tokens), row))
        engine.submit(Request((row, "sampled"), prompt, samples, Sampling(1.0, 1.0, 0, new_tokens), row))
    scores: dict[str, list[list[float]]] = {kind: [[] for _ in range(rows)] for kind in ("greedy", "sampled")}
    lengths, answered, example = [], 0, ""
    while engine.stats().running or engine.stats().queued:
        for sample in engine.advance():
            row, kind = sample.key
            words = sample.tokens if sample.truncated else sample.tokens[:-1]
            text = str(tokenizer.decode(words.tolist()))
            answer = extract_answer(text)
            scores[kind][row].append(dataset.score(row, answer))
            lengths.append(len(sample.tokens))
            answered += answer is not None
            if (row, kind) == (0, "greedy"):
                example = text
    drawn = [score for row_scores in scores["sampled"] for score in row_scores]
    return {
        "greedy": sum(row_scores[0] >= 1 for row_scores in scores["greedy"]) / rows,
        "sampled": sum(score >= 1 for score in drawn) / len(drawn),
        "answered": answered / (rows * (samples + 1)),
        "mixed": sum(len(set(row_scores)) > 1 for row_scores in scores["sampled"]) / rows,
        "prompt_tokens": sum(
            len(encode_prompt(tokenizer, dataset.row(row), engine.context)) for row in range(rows)
        ) / rows,
        "response_tokens": sum(lengths) / len(lengths),
        "seconds": time.perf_counter() - started,
        "example": example,
    }  # fmt: skip


def as_markdown(result: dict[str, Any]) -> str:
    """The table, with how it was made."""
    lines = [
        f"Machine: {result['machine']}. Command: `{result['command']}`.",
        "",
        f"System message: `{result['system']}`",
        "",
        "| task | options | greedy | sampled | answered in tags | mixed rewards | prompt / response tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in result["tasks"]:
        options = ", ".join(f"{key} = {value}" for key, value in task["options"].items())
        shares = " | ".join(f"{100 * task[key]:.0f} %" for key in ("greedy", "sampled", "answered", "mixed"))
        tokens = f"{task['prompt_tokens']:.0f} / {task['response_tokens']:.0f}"
        lines.append(f"| {task['task']} | {options} | {shares} | {tokens} |")
    return "\n".join(lines) + "\n"


def survey(given: argparse.Namespace) -> list[TaskResult]:
    """Measure every candidate that `--tasks` keeps, printing each as it is done."""
    from shared.engines.load import stop_tokens
    from shared.engines.transformers import TransformersEngine
    from shared.models import load_model, load_tokenizer

    table = ModelTable(path=given.model, dtype=given.dtype)
    tokenizer = load_tokenizer(table)
    model = load_model(table, 0, weights=True)
    stops = stop_tokens(tokenizer, model.generation_config)
    found = []
    for task, options in CANDIDATES:
        if given.tasks and task not in given.tasks:
            continue
        data = DataTable(
            kind="reasoning_gym", task=task, size=given.rows, seed=given.seed, options=options, system=given.system
        )
        engine = TransformersEngine(model, slots=given.slots, stops=stops, version=0)
        numbers = measure(engine, tokenizer, open_dataset(task, data), given.rows, given.samples, given.new_tokens)
        engine.close()
        found.append(TaskResult(task, options, given.rows, given.samples, **numbers))
        print(json.dumps(asdict(found[-1])), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Accuracy of a model on small reasoning-gym tasks, before training.")
    parser.add_argument("model", help="Hugging Face folder or hub name")
    parser.add_argument("--tasks", nargs="*", default=[], help="only these of the candidates")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--system", default=SYSTEM, help="system message put before each question")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table is written")
    given = parser.parse_args(arguments)
    tasks = survey(given)
    result = {
        "machine": describe_machine(),
        "command": f"python -m benchmarks.model_tasks {given.model} --rows {given.rows} --samples {given.samples} "
        f"--new-tokens {given.new_tokens} --dtype {given.dtype}",
        "system": given.system,
        "tasks": [asdict(task) for task in tasks],
    }
    write_results(given.results, "model_tasks", result, as_markdown(result))


if __name__ == "__main__":
    main()
