"""Makes a run's report: `report/index.html` and `report/curves.png` in its folder, replaced as a whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from deploy.report.curves import NoMatplotlib, as_svg, draw, write_png
from deploy.report.page import page
from deploy.report.story import Story, read_story


@dataclass(frozen=True)
class Report:
    """Where it lies. `curves` is None, and `missing` tells why, where nothing can draw."""

    story: Story
    page: Path
    curves: Path | None
    missing: str


def make_report(run_folder: Path) -> Report:
    """Read the run and write its report anew. RecipeError for a folder without a recipe, OSError for a full disk."""
    story = read_story(run_folder)
    folder = run_folder / "report"
    folder.mkdir(exist_ok=True)
    svg, curves, missing = None, None, ""
    try:
        figure = draw(story)
    except NoMatplotlib as error:
        missing = str(error)
    else:
        curves = folder / "curves.png"
        beside = folder / ".curves.png.new"
        write_png(figure, beside)
        os.replace(beside, curves)
        svg = as_svg(figure)
    recipe_text = (run_folder / "config.toml").read_text(encoding="utf-8")
    beside = folder / ".index.html.new"
    beside.write_text(page(story, svg, recipe_text), encoding="utf-8")
    os.replace(beside, folder / "index.html")
    return Report(story, folder / "index.html", curves, missing)
