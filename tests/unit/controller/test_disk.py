"""The real folder that journal and spool write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.controller.disk import FolderDisk


def test_files_are_appended_read_cut_replaced_and_deleted(tmp_path: Path) -> None:
    disk = FolderDisk(tmp_path / "new" / "folder")
    disk.append("b", b"hello ")
    disk.append("b", b"world")
    disk.sync("b")
    disk.replace("a", b"whole")
    assert disk.names() == ["a", "b"]
    assert (disk.read("b"), disk.read("b", 6), disk.read("b", 6, 3), disk.read("b", 9, 99)) == (
        b"hello world",
        b"world",
        b"wor",
        b"ld",
    )
    disk.truncate("b", 5)
    disk.append("b", b"!")
    assert disk.read("b") == b"hello!"
    disk.replace("b", b"other")
    assert disk.read("b") == b"other"
    disk.delete("b")
    disk.delete("b")
    assert disk.names() == ["a"]
    disk.close()


def test_a_file_is_as_new_after_it_was_deleted(tmp_path: Path) -> None:
    disk = FolderDisk(tmp_path)
    disk.append("a", b"old")
    disk.delete("a")
    disk.append("a", b"new")
    disk.sync("a")
    assert disk.read("a") == b"new"
    disk.close()


def test_a_new_name_is_synced_with_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    disk = FolderDisk(tmp_path)
    disk.append("a", b"1")
    disk.sync("a")
    assert synced == [False, True]
    disk.append("a", b"2")
    disk.sync("a")
    assert synced == [False, True, False]
    disk.replace("b", b"3")
    assert synced == [False, True, False, False, True], "the content before the rename, the folder after it"
    disk.close()


def test_a_file_that_another_process_wrote_can_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FolderDisk(tmp_path).append("a", b"left behind")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    FolderDisk(tmp_path).sync("a")
    assert len(synced) == 2, "the file, and the folder that names it"
