"""The report of a run: one HTML file that needs nothing else, with curves, tables, samples and the recipe inside."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from deploy.readers.samples import Sample
from deploy.report.hints import hints
from deploy.report.story import Story, typical
from deploy.report.words import stage_lines

_SHOWN = 12
"""Samples on the page, beside the three that are typical."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --good: #1a7f37; --bad: #b42318; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } tr + tr td { border-top: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 13px; }
details { margin: .5rem 0; } summary { cursor: pointer; }
.picture { background: #fff; border-radius: 6px; padding: .5rem; } .picture svg { width: 100%; height: auto; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
"""


def page(story: Story, svg: str | None, recipe_text: str) -> str:
    """The whole page. `svg` are the curves, None where nothing can draw them."""
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{_text(story.folder.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>{_text(story.folder.name)}</h1>\n"
        f'<p class="soft">{_text(str(story.folder))}</p>\n'
        f"{_accuracy(story)}\n{_stages(story)}\n"
        f"<h2>What to try next</h2><ul>{''.join(f'<li>{_text(hint)}</li>' for hint in hints(story))}</ul>\n"
        f"{_curves(svg)}\n{_verdicts(story)}\n{_figures(story)}\n{_samples(story)}\n"
        f'<h2>Audit</h2><p class="{"good" if story.audit_clean else "bad"}">{_text(story.audit)}</p>\n'
        f"<h2>Recipe</h2><details><summary>config.toml</summary><pre>{_text(recipe_text)}</pre></details>\n"
        "</body></html>\n"
    )


def _accuracy(story: Story) -> str:
    rows = [
        (when, verdict.suite, verdict.text, f"version {verdict.version}")
        for pair in story.before_after.values()
        for when, verdict in zip(("before", "after"), pair, strict=False)
    ]
    return f"<h2>Held-out accuracy, 95 % interval</h2>{_table((), rows)}" if rows else ""


def _stages(story: Story) -> str:
    rows = [(stage.name, "; ".join(stage_lines(stage))) for stage in story.stages]
    return f"<h2>Stages</h2>{_table((), rows)}" if rows else "<p>No step was committed.</p>"


def _curves(svg: str | None) -> str:
    if svg is None:
        return "<h2>Curves</h2><p>They need matplotlib, which is not installed where this page was made.</p>"
    return f'<h2>Curves</h2><div class="picture">{svg}</div>'


def _verdicts(story: Story) -> str:
    rows = [
        (v.evaluation.suite, str(v.evaluation.lineage), str(v.evaluation.version), v.evaluation.why, v.evaluation.text)
        for v in story.verdicts
    ]
    table = _table(("suite", "lineage", "version", "why", "accuracy"), rows)
    return f"<h2>All verdicts</h2><details><summary>{len(rows)}</summary>{table}</details>" if rows else ""


def _figures(story: Story) -> str:
    parts = []
    for stage in story.stages:
        names = sorted({name for line in stage.lines for name, value in line.items() if isinstance(value, int | float)})
        rows = []
        for name in names:
            values = stage.series(name)[1]
            if name in ("time", "lineage", "step", "version", "batch", "batches", "revision"):
                continue
            figures = (values[0], sum(values) / len(values), values[-1], min(values), max(values))
            rows.append((name, *(f"{value:.4g}" for value in figures)))
        table = _table(("figure", "first", "mean", "last", "least", "most"), rows)
        parts.append(f"<details><summary>{_text(stage.name)}</summary>{table}</details>")
    return f"<h2>Figures</h2>{''.join(parts)}" if parts else ""


def _samples(story: Story) -> str:
    if not story.samples:
        return ""
    shown = [_sample(title, sample) for title, sample in typical(story.samples)]
    count = len(story.samples)
    spread = [story.samples[index * count // _SHOWN] for index in range(min(_SHOWN, count))]
    more = [_sample(f"versions {s.versions[0]}-{s.versions[1]}", s) for s in spread]
    return (
        f"<h2>Samples</h2>{''.join(shown)}"
        f"<details><summary>{len(more)} more, from the first to the last</summary>{''.join(more)}</details>"
    )


def _sample(title: str, sample: Sample) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in sample.parts.items())
    cut = ", cut off" if sample.truncated else ""
    expected = f"<tr><th>reference</th><td><pre>{_text(sample.answer)}</pre></td></tr>" if sample.answer else ""
    return (
        f"<table><tr><th>{_text(title)}</th><td>reward <b>{sample.reward:g}</b> ({_text(parts)}), "
        f"{sample.length} tokens{cut}, group {sample.group}, row {sample.row} of {_text(sample.dataset)}</td></tr>"
        f"<tr><th>question</th><td><pre>{_text(sample.question)}</pre></td></tr>"
        f"<tr><th>completion</th><td><pre>{_text(sample.completion)}</pre></td></tr>{expected}</table>"
        f"<details><summary>as the model read it</summary><pre>{_text(sample.prompt)}</pre></details><hr>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _text(value: str) -> str:
    return html.escape(value)
