"""Rules that hold for the source as a whole: what works without torch, and that nothing loads a pickle or runs text."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("services", "shared", "deploy") for path in (ROOT / top).rglob("*.py"))
LIGHT = ["shared.messages", "shared.bus", "shared.config", "shared.data.order", "shared.service", "shared.telemetry"]

BLOCKED_IMPORTS = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "transformers"}:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


@pytest.mark.parametrize("name", [*LIGHT, "services.controller", "deploy"])
def test_works_where_torch_and_numpy_are_not_installed(name: str) -> None:
    command = [sys.executable, "-c", BLOCKED_IMPORTS, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_hook_that_hides_torch_hides_it() -> None:
    command = [sys.executable, "-c", BLOCKED_IMPORTS, "torch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "torch is not installed here" in done.stderr


FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "multiprocessing"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.save", "yaml.load", "pandas.read_pickle", "torch.multiprocessing",
    "joblib.load", "mp.Queue", "mp.Pool", "mp.Pipe", "dist.all_gather_object", "dist.broadcast_object_list",
    "torch.distributed.all_gather_object", "torch.distributed.broadcast_object_list",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def violations(source: str) -> list[str]:
    """Imports and calls in `source` that could load a pickle or run text as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {dotted(node.func)}()")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"line {node.value.lineno}: allow_pickle")
        for name in names:
            if name.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
                found.append(f"import of {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_a_pickle_or_runs_text(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing import Queue",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "def f(): exec('1')",
        "import yaml\nyaml.load('x')",
        "x.load(allow_pickle=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert violations(source) != []
