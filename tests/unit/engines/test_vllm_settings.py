"""What vLLM is told before its first import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.engines.vllm import without_compiler


def test_vllm_compiles_where_there_are_a_compiler_and_headers_and_does_without_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path) if name == "include" else name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert without_compiler() == {"TORCH_COMPILE_DISABLE": "1"}
    (tmp_path / "g++").touch(mode=0o755)
    assert without_compiler() == {"TORCH_COMPILE_DISABLE": "1"}
    (tmp_path / "Python.h").touch()
    assert without_compiler() == {}
    monkeypatch.setenv("CXX", "other++")
    assert without_compiler() == {"TORCH_COMPILE_DISABLE": "1"}


def test_what_a_gpu_needs_is_never_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert without_compiler() == {}
