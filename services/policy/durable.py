"""Folders that are whole or not there: fsync, then one rename. Used by checkpoints and exports."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source`, synced already, to `target` and make the rename durable; a folder at `target` is removed."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)  # a folder can only be renamed onto an empty one
    os.rename(source, target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
