"""`orrery eval`: how good a model is on held-out problems, without a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.cli import console

if TYPE_CHECKING:
    from deploy.cli.evaluated import Asked
    from services.evaluator.offline import Judgement
    from shared.config import Recipe

VERIFIER_S = 10.0
"""Longest time for the verifier on one problem, where no recipe says it."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="a Hugging Face folder or name, an export, a run, or a checkpoint of one")
    ],
    suite: Annotated[
        str | None,
        typer.Option("--suite", "-s", help="a suite of the recipe, task:NAME of reasoning-gym, or a .jsonl file"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="where suites come from (default: the run's)")
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="rows to judge")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="answers to each problem; accuracy is their mean")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 answers greedily")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer")] = None,
    seed: Annotated[int, typer.Option(help="seed of sampled answers, and of generated tasks")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded side by side")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    out: Annotated[Path | None, typer.Option(help="write the verdict and all answers as JSON here")] = None,
) -> None:
    """Judge a model on held-out problems."""
    from deploy.cli.evaluated import EvalError, ask, find_model
    from shared.config import load_recipe

    try:
        if out is not None:
            _make_room(out)
        source = find_model(model)
        known = load_recipe(recipe) if recipe is not None else source.recipe
        changes = {
            "problems": problems, "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        asked = ask(suite, known, changes, seed)
        judgement = _judge(source.label, source.load(threads), asked, known, slots, seed)
        _show(source.label, asked, judgement)
        if out is not None:
            _write(out, source.label, asked, judgement)
            console.note(f"written to {out}")
    except EvalError as error:
        console.error(str(error))
        raise typer.Exit(2) from None


def _judge(label: str, loaded: Any, asked: Asked, recipe: Recipe | None, slots: int, seed: int) -> Judgement:
    from deploy.cli.evaluated import EvalError
    from services.evaluator.offline import judge_model
    from shared.data.dataset import DataError
    from shared.engines.base import EngineError

    model, tokenizer = loaded
    timeout_s = recipe.rewards.timeout_s if recipe is not None else VERIFIER_S
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[so_far]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console.err, transient=True) as bar:
        task = bar.add_task(f"{label} on {asked.name}", total=None, so_far="")

        def progress(judgement: Judgement, total: int) -> None:
            done = len(judgement.problems)
            share = sum(problem.correct for problem in judgement.problems) / done if done else 0.0
            bar.update(task, completed=done, total=total, so_far=f"{share:.1%} correct" if done else "")

        try:
            return judge_model(
                model,
                tokenizer,
                asked.name,
                asked.suite,
                asked.dataset,
                slots=slots,
                seed=seed,
                timeout_s=timeout_s,
                progress=progress,
            )
        except (DataError, EngineError) as error:
            raise EvalError(str(error)) from error


def _show(label: str, asked: Asked, judgement: Judgement) -> None:
    suite = asked.suite
    how = (
        "greedy" if suite.temperature == 0 else f"temperature {suite.temperature:g}, {suite.samples} samples a problem"
    )
    table = Table(title=f"{label} on {asked.name} ({how})", title_justify="left")
    for heading in ("category", "problems", "correct", "accuracy", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "category" else "right")
    for name in [*judgement.categories, None]:
        figures: dict[str, Any] = judgement.figures(name)
        low, high = figures["interval"]
        table.add_row(
            name or "all",
            f"{figures['n']}",
            f"{figures['correct']:g}",
            f"{figures['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            style="bold" if name is None else None,
        )
    console.out.print(table)
    answers = sum(len(problem.completions) for problem in judgement.problems)
    console.out.print(
        f"{judgement.tokens} tokens in {judgement.seconds:.1f} s, {judgement.truncated} of {answers} answers cut off "
        f"at {suite.max_new_tokens} tokens"
    )
    if judgement.errors:
        console.error(f"{len(judgement.errors)} problems count as wrong, unjudged; the first: {judgement.errors[0]}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the file system in words for whoever gave --out."""
    from deploy.cli.evaluated import EvalError

    try:
        yield
    except OSError as error:
        raise EvalError(f"--out {path}: the verdict cannot be written: {error.strerror}; give another path") from error


def _make_room(path: Path) -> None:
    """Make the folder and try the file, so that a wrong --out costs no judging; nothing is left of the trial."""
    with _writing(path):
        there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not there:
            path.unlink()


def _write(path: Path, label: str, asked: Asked, judgement: Judgement) -> None:
    document = {
        "model": label,
        **judgement.record(),
        "settings": asked.suite.model_dump(exclude_none=True),
        "answers": [
            {
                "row": problem.row,
                "completions": problem.completions,
                "scores": problem.scores,
                "correct": problem.correct,
                "category": problem.category,
                "error": problem.error,
            }
            for problem in judgement.problems
        ],
    }
    with _writing(path):
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
