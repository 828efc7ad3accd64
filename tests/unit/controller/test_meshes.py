"""Meshes: every attempt has an epoch of its own, the first error ends it for all, and a retry waits."""

from __future__ import annotations

import pytest

from services.controller.core.events import MeshIdMinted
from services.controller.core.meshes import RETRY_MOST_S, RETRY_S, Mesh, Meshes
from services.controller.core.outcome import ForgetMesh, MintMeshId
from shared.messages import (
    FormMesh,
    MeshFailed,
    MeshFormed,
    MeshMember,
    ReceiveWeights,
    RevokeMesh,
    SendWeights,
)
from tests.unit.controller.world import World, small_world

MEMBERS = [MeshMember("policy-0", 1, 0), MeshMember("rollout-0", 1, 0)]


def forming(rollouts: int = 1, **tables: dict[str, object] | None) -> World:
    """A world whose members were told to form the first meshes and do not answer."""
    world = small_world(rollouts=rollouts, **tables)
    for model in world.models.values():
        model.silent = {FormMesh}
    world.deliver()
    assert {mesh.state for mesh in world.core.state.meshes.meshes.values()} == {"forming"}
    return world


def epochs(world: World, name: str) -> list[int]:
    return [order.identity.epoch for order in world.models[name].told(FormMesh)]


def begun(meshes: Meshes, purpose: str = "weights", members: list[MeshMember] = MEMBERS) -> Mesh:
    return meshes.begin(purpose, "gloo", members, 10.0)  # type: ignore[arg-type]


def test_a_mesh_is_formed_when_every_member_says_so_each_once() -> None:
    meshes = Meshes()
    mesh = begun(meshes)
    meshes.minted(mesh.epoch, b"id", 20.0)
    words = ["policy-0", "policy-0", "a stranger"]
    assert not any(meshes.member_formed(mesh.epoch, name) for name in words)
    assert mesh.state == "forming"
    assert meshes.member_formed(mesh.epoch, "rollout-0")
    assert mesh.state == "formed"


def test_epochs_and_unique_ids_are_never_used_again() -> None:
    meshes = Meshes()
    seen = set()
    for _ in range(5):
        mesh = begun(meshes)
        seen.add(mesh.epoch)
        meshes.revoke(mesh.epoch, 0.0, failed=True)
    assert seen == {1, 2, 3, 4, 5}


def test_a_revoked_mesh_is_never_anything_else_again() -> None:
    meshes = Meshes()
    mesh = begun(meshes)
    meshes.revoke(mesh.epoch, 0.0, failed=False)
    meshes.minted(mesh.epoch, b"late", 20.0)
    for member in MEMBERS:
        meshes.member_formed(mesh.epoch, member.replica)
    assert (mesh.state, meshes.meshes, meshes.of("weights", "policy-0", "rollout-0")) == ("revoked", {}, None)
    assert (meshes.held_by("policy-0"), meshes.unformed) == ([], {})
    assert meshes.revoke(mesh.epoch, 0.0, failed=True) is None


def test_a_mesh_is_found_by_its_members_by_its_ends_and_while_it_forms() -> None:
    meshes = Meshes()
    trio = [MeshMember("policy-0", 1, 0), MeshMember("policy-1", 1, 0), MeshMember("policy-2", 1, 0)]
    first, second, gradients = begun(meshes), begun(meshes), begun(meshes, "gradients", trio)
    assert meshes.epochs_of("policy-0") == [1, 2, 3]
    assert meshes.held_by("policy-1") == [gradients]
    assert meshes.of("weights", "policy-0", "rollout-0") is second, "the newest"
    assert meshes.of("weights", "rollout-0", "policy-0") is None
    assert list(meshes.unformed) == [1, 2, 3]
    meshes.revoke(second.epoch, 0.0, failed=False)
    assert meshes.of("weights", "policy-0", "rollout-0") is first


def test_failures_in_a_row_wait_ever_longer_and_success_begins_anew() -> None:
    meshes = Meshes()
    waits = []
    for _ in range(7):
        meshes.revoke(begun(meshes).epoch, 100.0, failed=True)
        waits.append(meshes.retries["rollout-0"].not_before - 100.0)
    assert waits == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S, RETRY_MOST_S, RETRY_MOST_S, RETRY_MOST_S]
    mesh = begun(meshes)
    meshes.minted(mesh.epoch, b"id", 20.0)
    for member in MEMBERS:
        meshes.member_formed(mesh.epoch, member.replica)
    meshes.revoke(begun(meshes).epoch, 200.0, failed=True)
    assert meshes.retries["rollout-0"].not_before == 200.0 + RETRY_S


def test_a_receiver_pauses_for_itself_and_a_mesh_of_gradients_for_its_purpose() -> None:
    meshes = Meshes()
    meshes.revoke(begun(meshes).epoch, 100.0, failed=True)
    assert not meshes.may_begin("rollout-0", 100.0)
    assert meshes.may_begin("rollout-1", 100.0)
    assert meshes.may_begin("gradients", 100.0)
    meshes.revoke(begun(meshes, "gradients").epoch, 100.0, failed=True)
    assert not meshes.may_begin("gradients", 100.0)
    meshes.forget("rollout-0")
    assert meshes.may_begin("rollout-0", 100.0)


def test_the_source_is_rank_0_and_both_are_told_the_same_identity() -> None:
    world = forming()
    orders = [world.models[name].told(FormMesh) for name in ("policy-0", "rollout-0")]
    assert orders[0] == orders[1]
    identity = orders[0][0].identity
    assert [member.replica for member in identity.members] == ["policy-0", "rollout-0"]
    assert (identity.epoch, identity.unique_id) == (1, b"id 1")


def test_nobody_is_told_to_form_a_mesh_before_its_id_is_minted() -> None:
    world = small_world()
    world._do = lambda effect: None if isinstance(effect, MintMeshId) else World._do(world, effect)  # type: ignore[method-assign]
    world.deliver()
    assert epochs(world, "policy-0") == []
    world.step(MeshIdMinted(at=world.now, epoch=1, unique_id=b"late"))
    assert epochs(world, "policy-0") == [1]


def test_no_weights_travel_before_both_members_stand() -> None:
    world = forming()
    world.say(world.models["policy-0"], MeshFormed(1))
    assert not world.models["policy-0"].told(SendWeights)
    world.say(world.models["rollout-0"], MeshFormed(1))
    assert world.models["policy-0"].told(SendWeights)
    assert world.models["rollout-0"].told(ReceiveWeights)


def test_the_first_error_of_a_member_revokes_the_mesh_to_everyone() -> None:
    world = forming(rollouts=2)
    assert world.say(world.models["rollout-1"], MeshFailed(2, "connection refused")) == "fresh"
    for name in ("policy-0", "rollout-1"):
        assert world.models[name].told(RevokeMesh) == [RevokeMesh(2, "rollout-1: connection refused")]
    assert ForgetMesh(2) in world.effects
    assert world.say(world.models["policy-0"], MeshFailed(2, "peer closed")) == "duplicate"
    assert world.say(world.models["policy-0"], MeshFormed(2)) == "epoch"
    assert not world.models["rollout-0"].told(RevokeMesh), "another receiver's mesh is its own"


def test_after_a_failure_a_new_epoch_forms_but_not_at_once() -> None:
    world = forming()
    world.say(world.models["rollout-0"], MeshFailed(1, "no route"))
    assert epochs(world, "policy-0") == [1]
    for model in world.models.values():
        model.silent = set()
    world.pass_time(RETRY_S / 2)
    assert epochs(world, "policy-0") == [1]
    world.pass_time(RETRY_S)
    assert epochs(world, "policy-0")[:2] == [1, 2]
    assert world.ended is not None and world.ended.outcome == "complete"


def test_a_mesh_that_does_not_form_in_time_is_revoked_naming_who_is_missing() -> None:
    world = forming(timeouts={"mesh_s": 15.0})
    world.say(world.models["policy-0"], MeshFormed(1))
    world.pass_time(16.0)
    [revoke] = world.models["policy-0"].told(RevokeMesh)
    assert isinstance(revoke, RevokeMesh)
    assert revoke.cause == "rollout-0 did not form it within timeouts.mesh_s"


@pytest.mark.parametrize("who", ["policy-0", "rollout-0"])
def test_a_member_that_is_lost_ends_its_meshes_for_the_others_without_a_pause(who: str) -> None:
    world = forming(rollouts=2)
    world.lose(who)
    revoked = {name: [order.epoch for order in world.models[name].told(RevokeMesh)] for name in world.models}
    expected = {"policy-0": [[], [1], [2]], "rollout-0": [[1], [], []]}[who]
    assert [revoked[name] for name in ("policy-0", "rollout-0", "rollout-1")] == expected
    assert not world.core.state.meshes.retries


def test_a_mesh_is_used_again_while_its_members_stay_the_same() -> None:
    world = small_world(rollouts=2)
    world.deliver()
    assert world.ended is not None
    assert (epochs(world, "rollout-0"), epochs(world, "rollout-1")) == ([1], [2])
    assert len(world.models["policy-0"].told(SendWeights)) >= 4


def test_a_new_member_gets_a_mesh_of_its_own_and_no_other_is_touched() -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 1)
    world.join("rollout-1", "rollout")
    world.deliver()
    assert epochs(world, "rollout-0") == [1]
    assert len(epochs(world, "rollout-1")) == 1
    assert not world.models["rollout-0"].told(RevokeMesh)
    assert world.ended is not None and world.ended.outcome == "complete"


def test_nobody_stands_in_more_than_a_handful_of_meshes() -> None:
    world = small_world(rollouts=12, weights={"fanout": 1}, train={"batches": 8})
    most = 0
    while world.ended is None and not world.idle:
        world.deliver(limit=1)
        most = max(most, *(len(world.core.state.meshes.epochs_of(name)) for name in world.models))
    assert world.ended is not None and world.ended.outcome == "complete"
    assert most <= 4


def test_a_mesh_of_weights_that_is_in_use_makes_no_room_for_others() -> None:
    world = small_world(rollouts=6, weights={"fanout": 6})
    for model in world.models.values():
        model.silent = {ReceiveWeights}
    world.deliver()
    assert len(world.core.state.meshes.epochs_of("policy-0")) == 6
    assert not world.models["policy-0"].told(RevokeMesh)


def test_a_forming_mesh_is_void_in_a_new_term_and_a_formed_one_lives() -> None:
    world = forming()
    world.crash()
    assert 1 not in world.core.state.meshes.meshes
    assert world.say(world.models["policy-0"], MeshFormed(1)) == "epoch"
    world.deliver()
    assert epochs(world, "policy-0") == [1, 2]

    world = small_world(train={"batches": 4})
    world.run(lambda: world.core.state.version == 2)
    world.crash()
    world.deliver()
    assert world.ended is not None and world.ended.outcome == "complete"
    assert epochs(world, "policy-0") == [1]
