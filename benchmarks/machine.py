"""What every benchmark says about where it ran, and where results go."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe_machine() -> str:
    """Cores, processor and Python, in one line."""
    return f"{os.cpu_count()} CPU cores ({_processor()}), Python {platform.python_version()}"


def load_average() -> float:
    """The machine's load over the last minute: above the number of cores, timings are of a busy machine."""
    return round(os.getloadavg()[0], 1)


def write_results(folder: Path, name: str, result: dict[str, Any], table: str) -> None:
    """Write `name`.json and `name`.md to `folder`, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    print("\n" + table)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {platform.machine()}" if names else platform.machine()
