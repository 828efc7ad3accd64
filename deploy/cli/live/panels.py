"""How a run looks: pure functions from a `Picture` to what rich renders. No clock, no files, no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.cli.live.sources import Picture
from deploy.cli.live.sparklines import sparkline
from deploy.readers.figures import seconds_by_role
from deploy.readers.revisions import marks
from deploy.report.words import duration, training

KINDS = (
    ("generate", "cyan"),
    ("reward", "magenta"),
    ("train", "green"),
    ("sync", "yellow"),
    ("load", "bright_blue"),
    ("other", "blue"),
    ("wait", "bright_black"),
)
_STATES = {
    "ready": "green",
    "busy": "green",
    "stale": "yellow",
    "lost": "bold red",
    "left": "dim",
    "draining": "yellow",
}
_SPARK = 32
_BAR = 30
_SILENT_S = 3.0


def view(picture: Picture, hint: str) -> RenderableType:
    """The whole live view."""
    parts: list[RenderableType] = [_progress(picture)]
    if picture.lines:
        parts += ["", _figures(picture)]
    if times := _times(picture):
        parts += ["", times]
    if picture.status.get("replicas"):
        parts += ["", _replicas(picture)]
    title = Text.assemble(("orrery ", "bold"), picture.run)
    return Panel(Group(*parts), title=title, title_align="left", subtitle=hint, subtitle_align="right", expand=True)


def _progress(picture: Picture) -> RenderableType:
    status = picture.status
    last = picture.lines[-1] if picture.lines else {}
    stage = str(status.get("stage") or last.get("stage") or "starting")
    same = last.get("stage") == stage
    done = status["batch"] if status.get("batch") is not None else last.get("batch") if same else None
    batches = status["batches"] if status.get("batches") is not None else last.get("batches") if same else None
    row = Table.grid(padding=(0, 2))
    name = Text(stage, style="bold cyan")
    if done is None or not batches:
        row.add_row(name, Text(_doing(status) or "the processes are starting", style="dim"))
        return row
    text = Text.assemble((f"{done}/{batches}", "bold"), " batches")
    if done == 0:
        text.append(f"  {_doing(status) or 'waiting for the first step'}", style="dim")
    left = picture.seconds_left() if same else None
    if left is not None and done < batches:
        text.append(f"  {duration(left)} left", style="dim")
    if status.get("paused"):
        text.append("  paused; 'orrery resume' goes on", style="bold yellow")
    if status.get("stopping"):
        text.append("  stopping after the batch in hand", style="bold yellow")
    row.add_row(name, ProgressBar(total=batches, completed=done, width=_BAR), text)
    return row


def _doing(status: dict[str, Any]) -> str:
    if status and not status.get("replicas"):
        return "the processes are starting"
    loading = [r["name"] for r in status.get("replicas", ()) if r["state"] in ("joining", "loading")]
    if loading:
        return f"{', '.join(loading)} loading the model"
    if status.get("stage") == "closing":
        return "judging the last version, writing the last checkpoint"
    return str(status.get("outcome") or "")


def _figures(picture: Picture) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    last = picture.lines[-1]
    if last.get("stage") == "train":
        _add(table, "reward", picture.series("reward"), "{:.3f}", "green")
    _add(table, "loss", picture.series("loss"), "{:.4f}", "blue")
    for suite in dict.fromkeys(e.suite for e in picture.evaluations):
        judged = [e for e in picture.evaluations if e.suite == suite]
        shares, newest = [e.correct / e.n for e in judged], judged[-1]
        table.add_row(
            f"accuracy {suite}",
            Text(f"{100 * shares[-1]:.1f} %", style="bold green"),
            Text.assemble(
                (sparkline(shares, _SPARK, low=0.0), "green"),
                (f"  [{100 * newest.low:.1f}, {100 * newest.high:.1f}] at version {newest.version}", "dim"),
            ),
        )
    words = [f"{last['samples_per_s']:.0f} samples/s"] if "samples_per_s" in last else []
    if "tokens_per_s" in last:
        words.append(f"{last['tokens_per_s']:.0f} tokens/s")
    if "staleness_max" in last:
        words.append(f"staleness {last['staleness_mean']:.1f} (most {last['staleness_max']})")
    if last.get("sync_seconds"):
        words.append(f"sync {last['sync_seconds']:.2f} s")
    if last.get("truncated"):
        words.append(f"truncated {100 * last['truncated']:.0f} %")
    if machine := training(last):
        words.append(f"policy {machine}")
    changed = Text("   ".join(f"step {mark.step}: {mark.text}" for mark in marks(picture.lines)[-3:]), style="yellow")
    return Group(table, Text("   ".join(words), style="dim"), *([changed] if changed.plain else []))


def _add(table: Table, name: str, values: list[float], shape: str, colour: str) -> None:
    if values:
        table.add_row(name, Text(shape.format(values[-1]), style="bold"), Text(sparkline(values, _SPARK), style=colour))


def _times(picture: Picture) -> RenderableType | None:
    """Where time goes, over the last minutes of the stage in force."""
    spent = seconds_by_role(picture.stage_lines()[-200:])
    if not spent:
        return None
    table = Table.grid(padding=(0, 2))
    for role in sorted(spent):
        total = sum(spent[role].values())
        if total <= 0:
            continue
        bar, words = Text(), Text()
        summed = 0.0
        for kind, colour in KINDS:
            share = spent[role].get(kind, 0.0) / total
            cells = round(_BAR * (summed + share)) - round(_BAR * summed)
            summed += share
            bar.append("█" * cells, style=colour)
            if share >= 0.01:
                words.append(f"{kind} {100 * share:.0f} %  ", style=colour)
        table.add_row(Text(role, style="dim"), bar, words)
    return table


def _replicas(picture: Picture) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("replica", "state", "does", "version", "leases", "heard", "restarts"):
        table.add_column(column, justify="right" if column in ("version", "leases", "heard", "restarts") else "left")
    term = int(picture.status.get("term", 1))
    silent = picture.silent_s > _SILENT_S
    heard = Text(f"{picture.silent_s:.1f} s", style="bold red" if silent else "")
    state = Text("silent", style="bold red") if silent else Text("ready", style="green")
    table.add_row("controller", state, f"term {term}", "", "", heard, str(term - 1))
    for replica in picture.status["replicas"]:
        age = replica["heard_s"]
        table.add_row(
            _named(replica),
            Text(replica["state"], style=_STATES.get(replica["state"], "cyan")),
            replica["doing"],
            "" if replica["version"] is None else str(replica["version"]),
            str(replica["leases"] or ""),
            Text(
                "" if age is None else f"{age:.1f} s", style="bold red" if age is not None and age > _SILENT_S else ""
            ),
            str(replica["incarnation"] - 1),
        )
    return table


def _named(replica: dict[str, Any]) -> str:
    """Its name, and how many ranks it has, if it has several; those of them that are there while others are not."""
    ranks, missing = replica["ranks"], len(replica["missing"])
    if ranks == 1:
        return str(replica["name"])
    return (
        f"{replica['name']} ({ranks - missing} of {ranks} ranks)" if missing else f"{replica['name']} ({ranks} ranks)"
    )
