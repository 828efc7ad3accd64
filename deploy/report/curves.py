"""The curves of a run: a PNG for the folder, an SVG for the page. matplotlib is imported when asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.readers.revisions import marks
from deploy.report.story import Story

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("reward", ("reward",)),
    ("loss", ("loss",)),
    ("KL", ("kl_reference", "kl_old", "mismatch_kl")),
    ("response length", ("response_length", "response_length_max")),
    ("staleness", ("staleness_mean", "staleness_max")),
)
_SMOOTH = 0.1


class NoMatplotlib(Exception):
    """The package that draws is not installed here."""


def draw(story: Story) -> Figure:
    """Reward, accuracy with its interval, loss, KL, lengths and staleness over optimizer steps. NoMatplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise NoMatplotlib("curves need matplotlib: pip install 'orrery[cli]'") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3).flat
    _reward(next(axes), story)
    _accuracy(next(axes), story)
    for title, keys in PANELS[1:]:
        _lines(next(axes), story, title, keys)
    _mark_revisions(figure.axes, story)
    figure.suptitle(story.folder.name, fontsize=11)
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a picture."""
    figure.savefig(path, format="png")


def as_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element without the XML prolog."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _reward(axis: Any, story: Story) -> None:
    stage = story.stage("train")
    axis.set_title("reward", fontsize=10)
    if stage is not None:
        steps, values = stage.series("reward")
        axis.plot(steps, values, linewidth=0.8, alpha=0.35, color="C0")
        axis.plot(steps, smoothed(values), linewidth=1.8, color="C0", label="reward")
        for index, name in enumerate(k for k in stage.lines[-1] if k.startswith("reward/")):
            steps, values = stage.series(name)
            axis.plot(steps, smoothed(values), linewidth=1.0, color=f"C{index + 1}", label=name.removeprefix("reward/"))
        axis.legend(fontsize=8)
    _finish(axis)


def _accuracy(axis: Any, story: Story) -> None:
    axis.set_title("held-out accuracy, 95 % interval", fontsize=10)
    for suite in story.before_after:
        judged = sorted((v for v in story.verdicts if v.evaluation.suite == suite), key=lambda v: v.step)
        shares = [v.evaluation.correct / v.evaluation.n for v in judged]
        below = [max(0.0, share - v.evaluation.low) for share, v in zip(shares, judged, strict=True)]
        above = [max(0.0, v.evaluation.high - share) for share, v in zip(shares, judged, strict=True)]
        steps = [v.step for v in judged]
        axis.errorbar(
            steps, shares, yerr=[below, above], marker="o", markersize=3, capsize=2, linewidth=1.2, label=suite
        )
    if story.before_after:
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
    for stage in story.stages[1:]:
        axis.axvline(stage.lines[0]["step"], color="0.6", linewidth=0.8, linestyle=":")
    _finish(axis)


def _lines(axis: Any, story: Story, title: str, keys: tuple[str, ...]) -> None:
    axis.set_title(title, fontsize=10)
    for index, key in enumerate(keys):
        for stage in story.stages:
            steps, values = stage.series(key)
            if not values or (stage.name == "sft" and title in ("staleness", "response length")):
                continue
            label = key if len(keys) > 1 else stage.name
            colour = f"C{index}" if len(keys) > 1 else ("C0" if stage.name == "train" else "C7")
            axis.plot(steps, values, linewidth=1.0, color=colour, label=label)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8)
    _finish(axis)


def _mark_revisions(axes: list[Any], story: Story) -> None:
    """A line in every panel where a person changed hyper-parameters; what it was stands in the first one."""
    for mark in marks([line for stage in story.stages for line in stage.lines]):
        for axis in axes:
            axis.axvline(mark.step, color="C3", linewidth=0.8, linestyle="--", alpha=0.7)
        where = {"xy": (mark.step, 0.02), "xycoords": ("data", "axes fraction")}
        axes[0].annotate(mark.text, **where, rotation=90, fontsize=6, color="C3", ha="right", va="bottom")


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, started at the first value."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else (1 - _SMOOTH) * found[-1] + _SMOOTH * value)
    return found


def _finish(axis: Any) -> None:
    axis.set_xlabel("optimizer step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
