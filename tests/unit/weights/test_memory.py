"""Memory that other processes map."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.weights.memory import open_shared, shared_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


def test_it_is_zeroed_and_as_long_as_asked() -> None:
    memory = shared_memory(100)
    assert memory.data.tolist() == [0] * 100
    assert shared_memory(0).data.numel() == 0


def test_another_process_reads_what_was_written_here() -> None:
    memory = shared_memory(5000)
    memory.data[4321] = 77
    program = (
        "import sys; from shared.weights.memory import open_shared; print(int(open_shared(sys.argv[1], 5000)[4321]))"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program, memory.path]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.strip() == "77"


def test_it_ends_with_the_last_tensor_that_holds_it() -> None:
    memory = shared_memory(5000)
    path, view = memory.path, memory.data[10:20]
    del memory
    assert os.path.exists(path)
    other = open_shared(path, 5000)
    other[12] = 5
    assert int(view[2]) == 5
    del view
    assert not os.path.exists(path)
    assert int(other[12]) == 5, "who has mapped it keeps it"


def test_gone_memory_is_an_error_of_the_system() -> None:
    memory = shared_memory(10)
    path = memory.path
    del memory
    with pytest.raises(OSError):
        open_shared(path, 10)
    assert torch.equal(shared_memory(10).data, torch.zeros(10, dtype=torch.uint8))
