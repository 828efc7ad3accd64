"""`orrery report`, and what `orrery up` says at its end: accuracy, time, samples, curves, and what to try next."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run

_SHOWN = 300


def report(run: RunArgument = None) -> None:
    """Make a run's report again: report/index.html and report/curves.png in its folder."""
    folder = find_run(run)
    if not _tell_report(folder):
        raise typer.Exit(1)


def summarise(run_folder: Path, code: int, why: str = "") -> None:
    """What the run has come to, or why it failed; the report of one that began is made on the way."""
    from deploy.local import EXIT_INTERRUPTED
    from shared.service import EXIT_RECIPE

    try:
        if code != EXIT_RECIPE:
            _tell_report(run_folder)
    except KeyboardInterrupt:
        console.note(f"the report was left out; 'orrery report {run_folder.name}' makes it")
    console.out.print(f"run     {run_folder}", markup=False)
    if (run_folder / "export").exists():
        console.out.print(f"export  {run_folder / 'export'}", markup=False)
    if code == EXIT_INTERRUPTED:
        console.note(f"interrupted; 'orrery resume {run_folder.name}' goes on")
    elif code:
        console.error(why)
        name = run_folder.name
        console.note(
            f"exit code {code}; what was done is kept: once mended, 'orrery resume {name}' goes on "
            f"('orrery logs {name}' has the whole story)"
        )


def _tell_report(run_folder: Path) -> bool:
    from deploy.report.make import make_report

    try:
        made = make_report(run_folder)
    except Exception as error:  # the summary must come to its end whatever state a killed run left
        console.error(f"no report could be made of {run_folder}: {type(error).__name__}: {error}")
        return False
    _tell_story(made.story)
    if made.missing:
        console.note(made.missing)
    if made.curves is not None:
        console.out.print(f"curves  {made.curves}", markup=False)
    console.out.print(f"report  {made.page}", markup=False)
    return True


def _tell_story(story: object) -> None:
    from deploy.report.hints import hints
    from deploy.report.story import Story, typical
    from deploy.report.words import stage_lines

    assert isinstance(story, Story)
    several = len(story.before_after) > 1
    for suite, pair in story.before_after.items():
        for when, verdict in zip(("before", "after"), pair, strict=False):
            name = f" ({suite})" if several else ""
            accuracy = f"held-out accuracy{escape(name)} [bold]{escape(verdict.text)}[/]"
            console.out.print(f"{when:<7} {accuracy} at version {verdict.version}")
    for stage in story.stages:
        for number, line in enumerate(stage_lines(stage)):
            console.out.print(f"{'' if number else stage.name:<7} {line}", markup=False)
    for title, sample in typical(story.samples):
        asked, answered = escape(_one_line(sample.question)), escape(_one_line(sample.completion))
        reference = f" [dim](reference: {escape(_one_line(sample.answer))})[/]" if sample.answer else ""
        console.out.print(f"{title:<7} reward {sample.reward:g}: [dim]{asked}[/] [cyan]{answered}[/]{reference}")
    if story.stages:
        for hint in hints(story):
            console.out.print(f"[yellow]next[/]    {escape(hint)}")
    shown = story.audit if story.audit_clean else f"{story.audit}: see 'orrery audit {story.folder.name}'"
    console.out.print(f"audit   [bold {'green' if story.audit_clean else 'red'}]{escape(shown)}[/]")


def _one_line(text: str) -> str:
    """Text for one line of a terminal: escapes instead of line ends, the middle of a long one left out."""
    flat = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return flat if len(flat) <= _SHOWN else f"{flat[: _SHOWN // 2]} ... {flat[-_SHOWN // 2 :]}"
