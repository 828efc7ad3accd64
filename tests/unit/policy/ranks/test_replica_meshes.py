"""Meshes of replicas with two ranks: one word to the controller for all."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from services.policy.ranks.meshes import ReplicaMeshes, bounds, of_rank
from services.policy.ranks.orders import AnyOrder, Form, Revoke
from shared.mesh import MeshError
from shared.mesh.membership import MeshMembership
from shared.messages import FormMesh, MeshFailed, MeshFormed, MeshIdentity, MeshMember, RevokeMesh

WORLD = 2


class Replica:
    """Both ranks of a replica in this process; orders reach rank 1 at once, unless it is `deaf`."""

    def __init__(self, name: str, rendezvous: Any, recipe: Any) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.deaf = False
        first, second = (MeshMember(name, 1, rank) for rank in range(WORLD))
        self.rank_0 = ReplicaMeshes(first, rendezvous.request, self.said.put, recipe, self, WORLD)
        self.rank_1 = MeshMembership(
            second, rendezvous.request, lambda message: self.rank_0.hear(1, message), **bounds(recipe)
        )

    def tell(self, order: AnyOrder) -> None:
        if isinstance(order, Form) and not self.deaf:
            self.rank_1.form(of_rank(order.mesh, 1))
        elif isinstance(order, Revoke):
            self.rank_1.revoke(order.mesh)

    def hear(self) -> Any:
        return self.said.get(timeout=20)


@pytest.fixture
def replicas(tools: Any) -> Iterator[tuple[Replica, Replica]]:
    rendezvous, recipe = tools.rendezvous(), tools.recipe()
    pair = Replica("a", rendezvous, recipe), Replica("b", rendezvous, recipe)
    yield pair
    for replica in pair:
        replica.rank_0.close("the test is over")


def issued(epoch: int, purpose: Any = "gradients", timeout_s: float = 20.0) -> FormMesh:
    members = [MeshMember(name, 1, 0) for name in ("a", "b")]
    return FormMesh(MeshIdentity(purpose, epoch, "gloo", f"id-{epoch}".encode(), members), timeout_s)


def formed(replicas: tuple[Replica, Replica], epoch: int = 1) -> None:
    for replica in replicas:
        replica.rank_0.form(issued(epoch))
    assert [replica.hear() for replica in replicas] == [MeshFormed(epoch)] * 2


def test_each_rank_stands_in_a_group_with_its_like_and_the_controller_hears_it_once(
    replicas: tuple[Replica, Replica],
) -> None:
    formed(replicas)
    for rank in range(WORLD):
        groups = [(r.rank_0 if rank == 0 else r.rank_1).get(1) for r in replicas]
        assert [group.rank for group in groups] == [0, 1]
        assert {member.rank for group in groups for member in group.identity.members} == {rank}
    ids = {replicas[0].rank_0.get(1).identity.unique_id, replicas[0].rank_1.get(1).identity.unique_id}
    assert len(ids) == WORLD
    assert all(replica.said.empty() for replica in replicas)


def test_an_order_that_comes_again_is_answered_again_once(replicas: tuple[Replica, Replica]) -> None:
    formed(replicas)
    replicas[0].rank_0.form(issued(1))
    assert replicas[0].hear() == MeshFormed(1)
    assert replicas[0].said.empty()


def test_a_rank_that_does_not_meet_its_like_fails_the_epoch_for_all(replicas: tuple[Replica, Replica]) -> None:
    a, b = replicas
    b.deaf = True
    a.rank_0.form(issued(1, timeout_s=0.5))
    b.rank_0.form(issued(1, timeout_s=20.0))
    told = a.hear()
    assert isinstance(told, MeshFailed) and told.cause.startswith("rank 1: ")
    with pytest.raises(MeshError, match="rank 1 failed"):
        a.rank_0.get(1)
    assert a.said.empty()
    assert b.said.empty(), "its rank 1 does not stand"


def test_an_operation_that_fails_on_one_rank_ends_the_epoch_on_the_other(replicas: tuple[Replica, Replica]) -> None:
    formed(replicas)
    a, _ = replicas
    with pytest.raises(MeshError, match="bad luck"), a.rank_1.using(1):
        raise MeshError("bad luck")
    assert a.hear() == MeshFailed(1, "rank 1: bad luck")
    with pytest.raises(MeshError, match="rank 1 failed: bad luck"):
        a.rank_0.get(1)
    assert a.said.empty()


def test_a_revoke_reaches_all_ranks(replicas: tuple[Replica, Replica]) -> None:
    formed(replicas)
    for replica in replicas:
        replica.rank_0.revoke(RevokeMesh(1, "b was lost"))
        for meshes in (replica.rank_0, replica.rank_1):
            with pytest.raises(MeshError, match="b was lost"):
                meshes.get(1)
        assert replica.said.empty()


def test_a_weights_mesh_is_one_group_of_all_ranks_and_their_receiver(
    replicas: tuple[Replica, Replica], tools: Any
) -> None:
    source, other = replicas
    identity = issued(2, "weights").identity
    members = [MeshMember("a", 1, 0), MeshMember("a", 1, 1), MeshMember("b", 1, 0)]
    message = FormMesh(msgspec.structs.replace(identity, members=members), 20.0)
    receiver = MeshMembership(other.rank_0._member, other.rank_0._request, other.said.put, **bounds(tools.recipe()))
    source.rank_0.form(message)
    receiver.form(message)
    assert [source.hear(), other.hear()] == [MeshFormed(2)] * 2
    assert [group.get(2).rank for group in (source.rank_0, source.rank_1, receiver)] == [0, 1, 2]
    with pytest.raises(MeshError, match="bad luck"), source.rank_1.using(2):
        raise MeshError("bad luck")
    assert source.hear() == MeshFailed(2, "rank 1: bad luck")
    with pytest.raises(MeshError, match="rank 1 failed: bad luck"):
        source.rank_0.get(2)
    assert source.said.empty()
    receiver.close("the test is over")


def test_a_state_mesh_is_of_rank_0_alone(replicas: tuple[Replica, Replica]) -> None:
    for replica in replicas:
        replica.rank_0.form(issued(3, "state"))
    assert [replica.hear() for replica in replicas] == [MeshFormed(3)] * 2
    with pytest.raises(MeshError, match="never formed here"):
        replicas[0].rank_1.get(3)
    with pytest.raises(MeshError, match="bad luck"), replicas[0].rank_0.using(3):
        raise MeshError("bad luck")
    assert replicas[0].hear() == MeshFailed(3, "bad luck")
