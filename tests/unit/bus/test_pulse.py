"""The file that is as young as the controller's last word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.bus.pulse import VARIABLE, Pulse


def test_it_is_touched_when_the_controller_was_heard_and_not_more_often_than_every_heartbeat(tmp_path: Path) -> None:
    file = tmp_path / "pulse"
    pulse = Pulse(file, every_s=1.0)
    pulse.heard(10.0)
    os.utime(file, (0, 0))
    pulse.heard(10.0)  # nothing was heard since
    pulse.heard(10.9)
    assert file.stat().st_mtime == 0
    pulse.heard(11.0)
    assert file.stat().st_mtime > 0


def test_without_the_variable_there_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    Pulse.of_environment(1.0).heard(10.0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "pulse"))
    Pulse.of_environment(1.0).heard(10.0)
    assert [path.name for path in tmp_path.iterdir()] == ["pulse"]


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "nowhere" / "pulse", every_s=1.0)
    pulse.heard(10.0)
    pulse.heard(20.0)
