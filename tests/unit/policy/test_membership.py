"""Meshes of one rank: formed on a thread, found by epoch, revoked, never used twice."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import pytest
import torch

from shared.mesh import MeshError
from shared.messages import FormMesh, MeshFailed, MeshFormed, RevokeMesh


def test_forming_again_is_answered_again(pair: Any, tools: Any) -> None:
    a, _ = pair
    a.meshes.form(FormMesh(tools.identity(1, "a", "b"), 20.0))
    assert a.next() == MeshFormed(1)


def test_a_rank_that_is_no_member_says_so(tools: Any) -> None:
    stranger = tools.member("c", tools.rendezvous())
    stranger.meshes.form(FormMesh(tools.identity(1, "a", "b"), 5.0))
    answer = stranger.next()
    assert isinstance(answer, MeshFailed) and "none of the members" in answer.cause


def test_a_process_that_was_taken_for_lost_is_a_member_under_its_new_incarnation(tools: Any) -> None:
    rendezvous = tools.rendezvous()
    members = [tools.member(name, rendezvous) for name in ("a", "b")]
    identity = tools.identity(1, "a", "b")
    came_back = [msgspec.structs.replace(member, incarnation=7) for member in identity.members]
    for member in members:
        member.meshes.form(FormMesh(msgspec.structs.replace(identity, members=came_back), 20.0))
    assert [member.next() for member in members] == [MeshFormed(1), MeshFormed(1)]


def test_a_missing_member_fails_the_forming_within_its_timeout(tools: Any) -> None:
    lonely = tools.member("a", tools.rendezvous())
    lonely.meshes.form(FormMesh(tools.identity(1, "a", "b"), 0.2))
    answer = lonely.next()
    assert isinstance(answer, MeshFailed) and answer.epoch == 1


def test_an_epoch_that_was_revoked_while_forming_is_never_entered(tools: Any) -> None:
    rendezvous = tools.rendezvous()
    a, b = tools.member("a", rendezvous), tools.member("b", rendezvous)
    a.meshes.form(FormMesh(tools.identity(1, "a", "b"), 20.0))
    a.meshes.revoke(RevokeMesh(1, "b was lost"))
    b.meshes.form(FormMesh(tools.identity(1, "a", "b"), 20.0))
    assert b.next() == MeshFormed(1)
    with pytest.raises(MeshError, match="b was lost"):
        a.meshes.get(1)
    a.meshes.form(FormMesh(tools.identity(1, "a", "b"), 20.0))
    answer = a.next()
    assert isinstance(answer, MeshFailed) and "b was lost" in answer.cause


def test_a_revoke_frees_whoever_waits_in_an_operation(pair: Any) -> None:
    a, _ = pair
    caught: list[MeshError] = []
    mesh = a.meshes.get(1)
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        try:
            mesh.recv(torch.zeros(4), 1)
        except MeshError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    entered.wait(5)
    a.meshes.revoke(RevokeMesh(1, "b was lost"))
    waiting.join(5)
    assert not waiting.is_alive() and caught
    assert a.sent.empty()  # the controller revoked it: it needs no telling


def test_a_revoke_ends_a_sum_that_a_lost_member_will_never_join_within_a_second(tools: Any) -> None:
    names = ["a", "b", "c"]
    rendezvous = tools.rendezvous()
    members = [tools.member(name, rendezvous) for name in names]
    for member in members:
        member.meshes.form(FormMesh(tools.identity(1, *names), 20.0))
    assert [member.next() for member in members] == [MeshFormed(1)] * 3
    caught: list[MeshError] = []
    entered = [threading.Event() for _ in members[:2]]

    def add_up(index: int) -> None:
        mesh = members[index].meshes.get(1)
        entered[index].set()
        try:
            mesh.all_reduce(torch.ones(1 << 20))
        except MeshError as error:
            caught.append(error)

    threads = [threading.Thread(target=add_up, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for event in entered:
        event.wait(5)
    started = time.monotonic()
    for member in members[:2]:
        member.meshes.revoke(RevokeMesh(1, "c was lost"))
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - started < 1.0
    assert len(caught) == 2
    members[2].meshes.close("the test is over")


def test_an_error_in_use_ends_the_epoch_and_is_told_once(pair: Any) -> None:
    a, _ = pair

    def use() -> None:
        with a.meshes.using(1) as mesh:
            mesh.abort("cable cut")
            mesh.all_reduce(torch.ones(2))

    with pytest.raises(MeshError):
        use()
    answer = a.next()
    assert isinstance(answer, MeshFailed) and "cable cut" in answer.cause
    with pytest.raises(MeshError, match="new epoch"):
        use()
    assert a.sent.empty()


def test_an_unknown_epoch_is_refused_by_name(tools: Any) -> None:
    with pytest.raises(MeshError, match="no mesh of epoch 7"):
        tools.member("a", tools.rendezvous()).meshes.get(7)
