"""What vLLM is told before its first import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.engines.vllm import without_compiler


def test_vllm_compiles_where_there_is_a_compiler_and_does_without_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert without_compiler() == {"TORCH_COMPILE_DISABLE": "1"}
    for name in ("g++", "other++"):
        (tmp_path / name).touch(mode=0o755)
        assert without_compiler() == {}
        (tmp_path / name).unlink()
        monkeypatch.setenv("CXX", "other++")


def test_what_a_gpu_needs_is_never_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert without_compiler() == {}
