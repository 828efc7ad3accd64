"""The NCCL backend on real GPUs: what it carries, and that a mesh with a hanging or dead member ends and is rebuilt."""

from __future__ import annotations

import time

import pytest

from tests.gpu.conftest import Pair, Process, new_id

gpu = pytest.mark.gpu
BIG = (150 << 20) + 3
"""Bytes: more than two pieces, and no whole number of them."""


@gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "uint8"])
def test_a_broadcast_brings_any_dtype_to_everyone(pair: Pair, device: str, dtype: str) -> None:
    pair.form(1)
    for source in (0, 1):
        answers = pair.both("broadcast", device=device, dtype=dtype, count=1001, source=source)
        assert [answer.get("right") for answer in answers] == [True, True], answers


@gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_large_tensors_travel_whole_and_sums_are_exact(pair: Pair, device: str) -> None:
    pair.form(1)
    for answers in (
        pair.both("broadcast", device=device, dtype="uint8", count=BIG, source=0),
        pair.both("add_up", device=device, dtype="float32", count=BIG // 4),
        *(pair.both("add_up", device=device, dtype=dtype, count=77) for dtype in ("bfloat16", "float64", "int64")),
    ):
        assert [answer.get("right") for answer in answers] == [True, True], answers


@gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_tensor_on_a_gpu_meets_one_on_a_cpu(pair: Pair, device: str) -> None:
    pair.form(1)
    answers = pair.both("pass_on", device=device, count=BIG // 4)
    assert [answer.get("right") for answer in answers] == [True, True], answers


@gpu
def test_torch_and_the_mesh_have_one_libnccl_and_the_ranks_one_version(pair: Pair) -> None:
    assert len(set(pair.versions)) == 1
    for answer in pair.both("libraries"):
        assert len(answer["mapped"]) == 1, answer
        assert ".".join(map(str, answer["torch"])) == pair.versions[0]


@gpu
def test_a_revoke_ends_an_operation_on_a_member_that_hangs_and_a_new_id_rebuilds_the_mesh(pair: Pair) -> None:
    pair.form(1)
    waiting, hanging = pair.members
    waiting.tell("broadcast", device="cuda", dtype="float32", count=1 << 24, source=1)
    time.sleep(2.0)  # what hangs shows nothing that could be waited for
    began = time.monotonic()
    waiting.tell("abort", cause="member-1 was lost")
    answer = waiting.answer()
    assert "member-1 was lost" in answer["error"]
    assert time.monotonic() - began < 10.0
    hanging.tell("abort", cause="member-1 was lost")
    spent = pair.both("add_up", device="cuda", dtype="float32", count=8)
    assert all("is spent: member-1 was lost" in answer["error"] for answer in spent)
    pair.form(2)
    assert [a.get("right") for a in pair.both("add_up", device="cuda", dtype="float32", count=8)] == [True, True]


@gpu
def test_a_killed_member_costs_its_mesh_alone_and_another_process_takes_its_place(pair: Pair) -> None:
    pair.form(1)
    survivor = pair.members[0]
    survivor.tell("add_up", device="cpu", dtype="float32", count=1 << 24)
    time.sleep(2.0)
    pair.replace(1)
    survivor.tell("abort", cause="member-1 was killed")
    assert "error" in survivor.answer()
    pair.form(2)
    assert [a.get("right") for a in pair.both("add_up", device="cpu", dtype="float32", count=8)] == [True, True]


@gpu
def test_an_operation_that_nobody_answers_ends_at_its_timeout_by_name(pair: Pair) -> None:
    pair.form(1, operation_s=3.0)
    pair.members[0].tell("add_up", device="cuda", dtype="float32", count=8)
    answer = pair.members[0].answer()
    assert "member-0 (mesh rank 0) waited for a sum over 2 ranks (up to 3 s)" in answer["error"]
    assert 3.0 <= answer["seconds"] < 15.0


@gpu
def test_a_mesh_that_not_all_come_to_ends_at_its_timeout(pair: Pair) -> None:
    pair.members[0].tell("form", epoch=1, unique_id=new_id(pair.minter, 1), timeout_s=3.0, operation_s=60.0)
    answer = pair.members[0].answer()
    assert "waited 3 s for all 2 ranks to come" in answer["error"]
    pair.minter.forget(1)
    pair.form(2)


@gpu
def test_the_speed_of_sums_is_told(pair: Pair, version: str) -> None:
    pair.form(1)
    for answer in pair.both("speed", megabytes=256, times=5):
        print(f"NCCL {version}: all_reduce of 256 MB at {answer['gigabytes_per_second']:.1f} GB/s")
        assert answer["gigabytes_per_second"] > 0


def test_without_a_gpu_a_member_says_what_it_wants(version: str) -> None:
    """What of the members can be run anywhere: the order, the library, the refusal."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    member = Process(0, {})
    try:
        assert member.answer() == {"version": version}
        member.tell("form", epoch=1, unique_id="00" * 128, timeout_s=1.0, operation_s=1.0)
        assert "expected a GPU for backend nccl" in member.answer()["error"]
    finally:
        member.end()
