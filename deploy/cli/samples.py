"""`orrery samples`: what the model answered, with the reward and its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from deploy.cli import console
from deploy.cli.runs import RunArgument, find_run

if TYPE_CHECKING:
    from deploy.readers.samples import Sample


def samples(
    run: RunArgument = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="only what this optimizer step trained on")] = None,
    best: Annotated[bool, typer.Option("--best", help="highest reward first")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="lowest reward first")] = False,
    count: Annotated[int, typer.Option("-n", min=1, help="how many")] = 5,
    raw: Annotated[bool, typer.Option("--raw", help="prompts as the model read them, chat template and all")] = False,
    held_out: Annotated[bool, typer.Option("--held-out", help="answers to held-out problems")] = False,
) -> None:
    """Show sampled answers with their rewards: the newest ones, or the best, or the worst."""
    from deploy.readers.samples import newest, read_samples, trained_on

    if best and worst:
        raise typer.BadParameter("give --best or --worst, not both")
    if step is not None and held_out:
        raise typer.BadParameter("a step trains on no held-out problem: give --step or --held-out")
    folder = find_run(run)
    groups = read_samples(folder)
    if step is not None:
        wanted = trained_on(folder, step)
        if not wanted:
            console.error(f"step {step} was not committed in {folder.name}: metrics.jsonl has a line for each that was")
            raise typer.Exit(1)
        chosen = [sample for key in wanted for sample in groups.get(key, [])]
    else:
        chosen = newest(groups, "eval" if held_out else "train")
    if not chosen:
        hint = "stage sft samples nothing" if groups or step is not None else "it has none until RL or an evaluation"
        console.error(f"no such samples in {folder / 'samples'}: {hint}")
        raise typer.Exit(1)
    if best or worst:
        chosen = sorted(chosen, key=lambda sample: sample.reward, reverse=best)
        chosen = chosen[:count]
    else:
        chosen = chosen[-count:] if step is None else chosen[:count]
    for sample in chosen:
        show(sample, raw=raw)


def show(sample: Sample, *, raw: bool) -> None:
    """One sample: where it is from, its reward, the question, the completion, the reference answer."""
    parts = "  ".join(f"{name} {value:g}" for name, value in sample.parts.items())
    first, last = sample.versions
    versions = f"version {first}" if first == last else f"versions {first}-{last}"
    cut = "  [yellow]cut off[/]" if sample.truncated else ""
    origin = f"group {sample.group}, row {sample.row} of {sample.dataset}, {versions}, {sample.length} tokens"
    figures = f"{parts}  group mean {sample.mean:.3g}  {origin}"
    console.out.print(f"[bold]reward {sample.reward:g}[/]  [dim]{escape(figures)}[/]{cut}")
    console.out.print(f"[dim]{escape(sample.prompt.rstrip() if raw else sample.question)}[/]")
    console.out.print(f"[cyan]{escape(sample.completion)}[/]")
    console.out.print(f"[dim]reference: {escape(sample.answer)}[/]\n" if sample.answer else "")
