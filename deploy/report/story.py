"""A finished (or stopped) run in figures: what the summary, the hints, the curves and the page are made from.

Read from the run folder alone: config.toml, metrics.jsonl, eval/*.json, samples/*.jsonl and the journal's audit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.readers.evaluations import Evaluation, before_and_after, read_evaluations
from deploy.readers.figures import StepOfVersion, Verdict, seconds_by_role
from deploy.readers.samples import Sample, newest, read_samples
from shared.config import Recipe, load_recipe

Line = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What one stage did, over the lines that stand (of the newest lineage, where a step was trained again)."""

    name: str
    lines: list[Line]
    batches: int

    @property
    def seconds(self) -> float:
        """From the first step's beginning to the last one's commit."""
        return float(self.lines[-1]["time"]) - float(self.lines[0]["time"]) + float(self.lines[0]["step_seconds"])

    @property
    def done(self) -> int:
        """Batches trained."""
        return int(self.lines[-1]["batch"])

    @property
    def sequences(self) -> float:
        """Samples trained on, each time they were."""
        return sum(line["samples_per_s"] * _elapsed(line) for line in self.lines if "tokens_per_s" in line)

    @property
    def samples_per_s(self) -> float | None:
        """Samples trained on in a second, over the whole stage."""
        return self.sequences / self.seconds if self.seconds > 0 and self.sequences else None

    @property
    def times(self) -> dict[str, dict[str, float]]:
        """Role -> kind of work -> share of its time."""
        shares = {}
        for role, spent in seconds_by_role(self.lines).items():
            total = sum(spent.values())
            if total > 0:
                shares[role] = {kind: seconds / total for kind, seconds in spent.items()}
        return shares

    def mean(self, key: str, last: int = 0) -> float | None:
        """Mean of a figure over the stage's lines (the last ones, if a number is given); None where it is missing."""
        values = [float(line[key]) for line in self.lines[-last:] if isinstance(line.get(key), int | float)]
        return sum(values) / len(values) if values else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure."""
        pairs = [(line["step"], float(line[key])) for line in self.lines if isinstance(line.get(key), int | float)]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Story:
    """Everything that is told about a run. `before_after` are the two verdicts to compare, by suite."""

    folder: Path
    recipe: Recipe
    stages: list[Stage]
    verdicts: list[Verdict]
    before_after: dict[str, list[Evaluation]]
    samples: list[Sample]
    audit: str
    audit_clean: bool

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, if it trained anything."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_story(run_folder: Path) -> Story:
    """The story of the run in `run_folder`; RecipeError without a recipe, all else may be missing."""
    recipe = load_recipe(run_folder / "config.toml")
    lines = _standing(_lines(run_folder / "metrics.jsonl"))
    steps = StepOfVersion()
    steps.take(lines)
    evaluations = read_evaluations(run_folder / "eval")
    stages = []
    for name in dict.fromkeys(line["stage"] for line in lines):
        of_stage = [line for line in lines if line["stage"] == name]
        stages.append(Stage(name, of_stage, int(of_stage[-1]["batches"])))
    suites = dict.fromkeys(e.suite for e in evaluations)
    rl = recipe.train is not None
    audit, clean = _audit(run_folder)
    return Story(
        folder=run_folder,
        recipe=recipe,
        stages=stages,
        verdicts=[steps.of(e) for e in evaluations],
        before_after={s: before_and_after([e for e in evaluations if e.suite == s], rl=rl) for s in suites},
        samples=newest(read_samples(run_folder), "train"),
        audit=audit,
        audit_clean=clean,
    )


def typical(samples: Sequence[Sample]) -> list[tuple[str, Sample]]:
    """Three completions of the newest groups, each with its title: the best, one in the middle, the worst."""
    recent = samples[-200:]
    if not recent:
        return []
    ranked = sorted(recent, key=lambda sample: sample.reward)
    picks = {"best": ranked[-1], "middle": ranked[len(ranked) // 2], "worst": ranked[0]}
    return list(picks.items())


def _lines(path: Path) -> list[Line]:
    found = []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
            if {"lineage", "step", "stage", "time", "batch", "batches", "version"} <= line.keys():
                found.append(line)
        except (ValueError, AttributeError):
            continue
    return found


def _standing(lines: Sequence[Line]) -> list[Line]:
    """One line a step: a later lineage replaces what it trained again."""
    by_step: dict[int, Line] = {}
    for line in sorted(lines, key=lambda it: (it["lineage"], it["step"])):
        if line["lineage"] != by_step.get(line["step"], line)["lineage"]:
            for step in [s for s in by_step if s >= line["step"]]:
                del by_step[step]
        by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def _elapsed(line: Line) -> float:
    return float(line["tokens"]) / float(line["tokens_per_s"]) if line["tokens_per_s"] else 0.0


def _audit(run_folder: Path) -> tuple[str, bool]:
    from services.controller.audit import audit_run

    try:
        found = audit_run(run_folder)
    except Exception as error:  # the report must come to its end whatever state a killed run left
        return f"cannot be read: {error}", False
    return found.lines()[-1].removeprefix("audit: "), found.clean
