"""Makes the pictures of the documentation from a real run: the live view, the summary, the curves, the report.

    make pictures            (or: python docs/pictures/make.py [RECIPE] [--set a.b=c ...])

A run is started as a person would; while it goes on, its live view is looked at from here, as `orrery status --watch`
does, and what it showed in the middle of RL is kept. Writes live.svg, summary.svg and curves.png beside this file, and
report.png where a Chromium is installed (`apt-get install chromium`), which draws the page without a screen.
"""

from __future__ import annotations

import argparse
import copy
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from deploy.cli import console  # noqa: E402
from deploy.cli.live.display import UP_HINT  # noqa: E402
from deploy.cli.live.panels import view  # noqa: E402
from deploy.cli.live.sources import Picture, Sources  # noqa: E402
from deploy.cli.report import summarise  # noqa: E402

WIDTH = 104
LOOK_S = 0.5
PATIENCE_S = 900.0
BROWSER_S = 120.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGE = (1100, 1500)
"""Width and height of the picture of the report: its upper part, down to the first sample."""
WANTED = 0.7
"""The share of RL's batches after which the live view is pictured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "quickstart.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "quickstart"
        picture = watch(run, given.recipe, given.set)
        save(HERE / "live.svg", "orrery up recipes/quickstart.toml", lambda shown: shown.print(view(picture, UP_HINT)))
        save(HERE / "summary.svg", "the end of orrery up", lambda _: summarise(run, 0), cut=scratch)
        shutil.copy(run / "report" / "curves.png", HERE / "curves.png")
        photograph(run / "report" / "index.html", HERE / "report.png", cut=scratch)
    print(f"written: {', '.join(sorted(path.name for path in HERE.iterdir() if path.suffix in ('.svg', '.png')))}")


def watch(run: Path, recipe: str, sets: list[str]) -> Picture:
    """Run the recipe to its end; what its live view showed when WANTED of RL was done."""
    options = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-m", "deploy.cli", "up", recipe, "--run-folder", str(run), *options]
    sources, kept = Sources(run), None
    with (run.parent / "up.out").open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise SystemExit(f"the run did not end within {PATIENCE_S:g} s")
                time.sleep(LOOK_S)
                sources.look()
                asked = sources.ask()
                line = sources.picture.lines[-1] if sources.picture.lines else {}
                ripe = line.get("stage") == "train" and line["batch"] >= WANTED * line["batches"]
                if asked and ripe and kept is None:
                    kept = copy.deepcopy(sources.picture)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    if process.returncode != 0 or kept is None:
        raise SystemExit(f"the run ended with code {process.returncode}:\n{(run.parent / 'up.out').read_text()}")
    return kept


def save(path: Path, title: str, show: object, *, cut: str = "") -> None:
    """Record what `show` prints and write it as SVG; `cut` is a folder whose name is left out of paths."""
    console.out = Console(record=True, width=WIDTH, force_terminal=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    show(console.out)  # type: ignore[operator]
    text = console.out.export_svg(title=title, unique_id=path.stem)
    if cut:
        text = re.sub(re.escape(cut), "runs", text)
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)  # fonts from the network are not needed
    path.write_text(text, encoding="utf-8")


def photograph(page: Path, path: Path, *, cut: str) -> None:
    """Draw the upper part of an HTML page as PNG; `cut` is a folder whose name is left out of paths."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"{path.name} is as it was: no browser ({', '.join(BROWSERS)}) is installed")
        return
    with tempfile.TemporaryDirectory() as scratch:
        shown = Path(scratch) / "index.html"
        shown.write_text(page.read_text(encoding="utf-8").replace(cut, "runs"), encoding="utf-8")
        size = ",".join(map(str, PAGE))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
        # a profile of its own: nothing of the person's is read or written
        command = [browser, *options, f"--user-data-dir={scratch}/profile", f"--screenshot={path}", shown.as_uri()]
        subprocess.run(command, check=True, timeout=BROWSER_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
