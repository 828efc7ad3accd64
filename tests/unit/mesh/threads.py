"""Meshes of threads in one process, with the controller's rendezvous in a dictionary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from shared.mesh import Mesh, form_mesh
from shared.messages import MeshIdentity, MeshMember, Message, StoreGet, StoreSet, StoreValue

Result = TypeVar("Result")


class Rendezvous:
    """What the controller does with StoreSet and StoreGet."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def request(self, question: Message, timeout_s: float) -> Message:
        assert isinstance(question, StoreSet | StoreGet)
        with self._changed:
            if isinstance(question, StoreSet):
                self.values[question.key] = question.value
                self._changed.notify_all()
            else:
                self._changed.wait_for(lambda: question.key in self.values, min(question.timeout_s, timeout_s))
            return StoreValue(epoch=question.epoch, key=question.key, value=self.values.get(question.key))


def identity_of(size: int) -> MeshIdentity:
    members = [MeshMember(replica=f"replica-{rank}", incarnation=1, rank=0) for rank in range(size)]
    return MeshIdentity(purpose="weights", epoch=3, backend="gloo", unique_id=b"id", members=members)


def join(rendezvous: Rendezvous, size: int, rank: int) -> Mesh:
    return form_mesh(
        identity_of(size), rank, rendezvous.request, interface="lo", form_timeout_s=20.0, operation_timeout_s=20.0
    )


def on_each_rank(size: int, work: Callable[[Mesh], Result]) -> list[Result]:
    """Run `work` on every rank of a mesh of threads; the results in the order of the ranks."""
    rendezvous = Rendezvous()

    def member(rank: int) -> Result:
        mesh = join(rendezvous, size, rank)
        try:
            return work(mesh)
        finally:
            # a member that leaves early would take the connections of the others with it
            last.wait(20)
            mesh.abort("the test is over")

    last = threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        futures: list[Future[Result]] = [pool.submit(member, rank) for rank in range(size)]
        return [future.result(60) for future in futures]
