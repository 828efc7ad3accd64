"""Which GPU is a process's own, as CUDA_VISIBLE_DEVICES and the driver have it. No GPU is wanted here."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shared import gpus
from shared.gpus import VISIBLE, GpuError

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends that the driver tells these identities, of which CUDA_VISIBLE_DEVICES leaves some."""

    def has(*identities: str, visible: str | None = None) -> None:
        def asked(told: str | None) -> tuple[str, ...]:
            return identities if told is None else tuple(identities[int(name)] for name in told.split(","))

        monkeypatch.setattr(gpus, "_asked", asked)
        monkeypatch.delenv(VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)

    return has


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ASK", gpus.ASK.replace("libcuda.so.1", "libcuda-that-nobody-has.so.1"))
    gpus._asked.cache_clear()
    try:
        assert gpus.identities() == ()
        assert gpus.first_gpu() is None
        assert gpus.names() == []
    finally:
        gpus._asked.cache_clear()


def test_a_driver_that_cannot_tell_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ASK", "import sys; sys.exit('no identity')")
    gpus._asked.cache_clear()
    with pytest.raises(GpuError, match="cannot be asked for this process's GPUs: no identity"):
        gpus.identities()
    gpus._asked.cache_clear()


def test_a_rank_takes_its_own_of_the_gpus_that_its_replica_was_given(machine: Machine) -> None:
    machine("a", "b", "c", "d", visible="2,3")
    assert gpus.first_gpu() == "c"
    gpus.take(1)
    assert os.environ[VISIBLE] == "3"
    assert gpus.identities() == ("d",)


def test_without_the_variable_gpus_are_called_by_their_number(machine: Machine) -> None:
    machine("a", "b")
    assert gpus.names() == ["0", "1"]
    gpus.take(1)
    assert (os.environ[VISIBLE], gpus.first_gpu()) == ("1", "b")


def test_a_rank_for_which_there_is_no_gpu_is_refused_with_what_is_there(machine: Machine) -> None:
    machine("a", "b", visible="0")
    with pytest.raises(GpuError, match=r"expected 2 GPUs here, .* got 1 \(CUDA_VISIBLE_DEVICES=0\)"):
        gpus.take(1)
