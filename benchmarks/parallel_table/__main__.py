"""The table of layouts: each family in each layout, beside one process, in float32 with gradients accumulated.

    python -m benchmarks.parallel_table [--only FAMILY LAYOUT ...]      or: make parallel-table

Starts one process a rank, up to eight, that go through all cells together, over Gloo on loopback. Writes
`results/parallel_table.{json,md}`, and exits with 1 if a cell is further than LIMIT from one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, describe_machine, write_results
from benchmarks.parallel_table.cells import Cell, all_cells

LIMIT = 1e-5
"""Largest relative difference of a loss, or of a gradient's element from its tensor's largest."""
CELL_S = 60.0
"""What a cell may take, with the start of its processes."""


def measure(cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """Every cell's verdict: what `rank.compare` found, or `error`."""
    world = max(cell.parallel.world for cell in cells)
    names = [word for cell in cells for word in (cell.family, cell.layout)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="orrery-layouts-") as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.parallel_table.rank", folder, str(rank), *names],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=CELL_S * (1 + len(cells)))[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return {cell: _verdict(Path(folder), cell, outputs) for cell in cells}


def _verdict(folder: Path, cell: Cell, outputs: Sequence[str]) -> dict[str, Any]:
    here = folder / f"{cell.family}-{cell.layout}.parts"
    found = here / f"{cell.family}-{cell.layout}.json"
    if found.is_file():
        return dict(json.loads(found.read_text()))
    errors = [path.read_text() for path in sorted(here.glob("error-*"))] or ["\n".join(outputs)[-2000:]]
    return {"error": errors[0]}


def fits(verdict: dict[str, Any]) -> bool:
    """Whether a cell equals one process."""
    return (
        "error" not in verdict
        and not verdict["missing"]
        and max(verdict["loss"], verdict["norm"], verdict["gradient"]) <= LIMIT
    )


def as_markdown(found: dict[Cell, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"Machine: {describe_machine()}. Differences from one process, float32, Gloo: of the loss and the gradient's "
        f"norm, relative; of gradients, the worst element relative to the largest of its tensor. Limit: {LIMIT:g}.",
        "",
        "| family | layout | ranks | micro-batches | loss | norm | gradients | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, verdict in found.items():
        begin = f"| {cell.family} | {cell.layout} | {cell.parallel.world} |"
        if "error" in verdict:
            lines.append(f"{begin} | | | | {verdict['error'].splitlines()[0]} |")
            continue
        numbers = " | ".join(f"{verdict[name]:.1e}" for name in ("loss", "norm", "gradient"))
        lines.append(f"{begin} {verdict['micro_batches']} | {numbers} | {'' if fits(verdict) else 'DIFFERS'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FAMILY LAYOUT", help="these cells alone; writes nothing")
    given = parser.parse_args()
    only = given.only or []
    cells = [Cell(*pair) for pair in zip(only[::2], only[1::2], strict=True)] or all_cells()
    found = measure(cells)
    if only:
        print(as_markdown(found))
    else:
        rows = [{"family": cell.family, "layout": cell.layout, **verdict} for cell, verdict in found.items()]
        write_results(RESULTS, "parallel_table", {"machine": describe_machine(), "cells": rows}, as_markdown(found))
    return 0 if all(fits(verdict) for verdict in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
