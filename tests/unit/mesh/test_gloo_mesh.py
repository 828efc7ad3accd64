"""Gloo meshes, of threads over loopback."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import torch

from shared.mesh import Mesh, MeshError, form_mesh
from shared.messages import Message, StoreGet, StoreValue
from tests.unit.mesh.threads import Rendezvous, identity_of, join, on_each_rank

ANY_DTYPE = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.bool,
    torch.int64,
]


def refuse(question: Message, timeout_s: float) -> Message:
    raise AssertionError("nobody should be asked")


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
def test_a_broadcast_carries_the_bits_of_any_type(dtype: torch.dtype) -> None:
    sent = torch.arange(24, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False, True])

    def work(mesh: Mesh) -> torch.Tensor:
        tensor = sent.clone() if mesh.rank == 1 else torch.zeros_like(sent)
        mesh.broadcast(tensor, 1)
        return tensor.view(torch.uint8)

    assert all(torch.equal(received, sent.view(torch.uint8)) for received in on_each_rank(3, work))


def test_a_sum_is_the_same_on_every_rank() -> None:
    def work(mesh: Mesh) -> torch.Tensor:
        tensor = torch.full((2, 3), mesh.rank + 1.0)
        mesh.all_reduce(tensor)
        return tensor

    assert all(torch.equal(total, torch.full((2, 3), 6.0)) for total in on_each_rank(3, work))


def test_send_and_recv_keep_their_order() -> None:
    def work(mesh: Mesh) -> list[int]:
        if mesh.rank == 0:
            for number in range(5):
                mesh.send(torch.tensor(number), 1)
            return []
        received = [torch.tensor(-1) for _ in range(5)]
        for tensor in received:
            mesh.recv(tensor, 0)
        return [int(tensor) for tensor in received]

    assert on_each_rank(2, work)[1] == [0, 1, 2, 3, 4]


def test_empty_and_scalar_tensors_travel() -> None:
    def work(mesh: Mesh) -> float:
        mesh.broadcast(torch.empty(0, 3), 0)
        scalar = torch.tensor(2.5 if mesh.rank == 0 else 0.0)
        mesh.broadcast(scalar, 0)
        return scalar.item()

    assert on_each_rank(2, work) == [2.5, 2.5]


def test_a_mesh_of_one_needs_nobody() -> None:
    mesh = join(Rendezvous(), 1, 0)
    tensor = torch.ones(2)
    mesh.broadcast(tensor, 0)
    mesh.all_reduce(tensor)
    assert tensor.tolist() == [1, 1]
    mesh.abort("enough")
    with pytest.raises(MeshError, match="mesh 3 is spent: enough; a new one has to be formed"):
        mesh.broadcast(tensor, 0)


@pytest.mark.parametrize("operation", ["broadcast", "recv", "all_reduce", "send"])
def test_abort_ends_an_operation_in_flight_with_its_cause(operation: str) -> None:
    rendezvous = Rendezvous()
    meshes: list[Mesh | None] = [None, None]

    def form(rank: int) -> None:
        meshes[rank] = join(rendezvous, 2, rank)

    threads = [threading.Thread(target=form, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    mesh, idle = meshes
    assert mesh is not None and idle is not None
    # larger than what the sockets of an idle peer take in
    tensor = torch.zeros(64 << 20, dtype=torch.uint8) if operation == "send" else torch.zeros(4)
    calls = {
        "broadcast": lambda: mesh.broadcast(tensor, 1),
        "recv": lambda: mesh.recv(tensor, 1),
        "send": lambda: mesh.send(tensor, 1),
        "all_reduce": lambda: mesh.all_reduce(tensor.float()),
    }
    timer = threading.Timer(0.1, mesh.abort, ["revoked: replica-1 is lost"])
    timer.start()
    started = time.monotonic()
    with pytest.raises(MeshError, match=r"mesh 3 \(weights\): replica-0 \(mesh rank 0\) waited .*: revoked: replica-1"):
        calls[operation]()
    assert time.monotonic() - started < 1.1
    timer.join(5)
    with pytest.raises(MeshError, match="spent: revoked"):
        mesh.send(torch.zeros(1), 1)
    # the peer's connections are gone too: it need not wait for its own time-out
    with pytest.raises(MeshError, match=r"replica-1 \(mesh rank 1\) waited"):
        idle.broadcast(torch.zeros(4), 0)
    idle.abort("the test is over")


def test_tensors_that_cannot_travel_are_refused_before_anything_is_sent() -> None:
    mesh = join(Rendezvous(), 1, 0)
    with pytest.raises(MeshError, match="expected a contiguous tensor on the CPU, got strides"):
        mesh.broadcast(torch.zeros(3, 2).T, 0)
    with pytest.raises(MeshError, match=r"got torch\.float8_e4m3fn"):
        mesh.all_reduce(torch.zeros(2).to(torch.float8_e4m3fn))
    mesh.broadcast(torch.zeros(2), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu is for that")
def test_nccl_without_a_gpu_is_refused_and_says_what_to_do() -> None:
    identity = msgspec.structs.replace(identity_of(2), backend="nccl")
    with pytest.raises(MeshError, match="expected a GPU for backend nccl.*set weights.backend"):
        form_mesh(identity, 0, refuse, interface="lo", form_timeout_s=1, operation_timeout_s=1)


def test_a_rank_outside_the_members_is_refused() -> None:
    with pytest.raises(MeshError, match="expected a rank from 0 to 1, got 2"):
        form_mesh(identity_of(2), 2, refuse, interface="lo", form_timeout_s=1, operation_timeout_s=1)


def test_forming_ends_when_the_controller_refuses_the_epoch() -> None:
    class Refusal(Exception):
        pass

    def revoked(question: Message, timeout_s: float) -> Message:
        if isinstance(question, StoreGet):
            raise Refusal("epoch 3 was revoked: replica-1 is lost")
        return StoreValue(epoch=question.epoch, key=question.key, value=question.value)

    with pytest.raises(MeshError, match=r"replica-0 \(mesh rank 0\) could not join .*epoch 3 was revoked"):
        form_mesh(identity_of(2), 0, revoked, interface="lo", form_timeout_s=20, operation_timeout_s=1)


def test_forming_over_an_unknown_interface_names_it() -> None:
    with pytest.raises(MeshError, match="over interface 'nosuch0'"):
        form_mesh(identity_of(2), 0, refuse, interface="nosuch0", form_timeout_s=1, operation_timeout_s=1)


def test_forming_without_the_others_names_who_is_absent() -> None:
    with pytest.raises(MeshError, match=r"replica-0 \(mesh rank 0\) waited 0.1 s for replica-1 to join"):
        form_mesh(identity_of(2), 0, Rendezvous().request, interface="lo", form_timeout_s=0.1, operation_timeout_s=1)
