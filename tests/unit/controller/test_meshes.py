"""Meshes: every attempt has an epoch of its own, the first error ends it for all, and a retry waits."""

from __future__ import annotations

import pytest

from services.controller.core.events import MeshIdMinted
from services.controller.core.meshes import RETRY_MOST_S, RETRY_S, Meshes
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


def forming(rollouts: int = 2, **tables: dict[str, object] | None) -> World:
    """A world whose members were told to form the first mesh and do not answer."""
    world = small_world(rollouts=rollouts, **tables)
    for model in world.models.values():
        model.silent = {FormMesh}
    world.deliver()
    assert [mesh.state for mesh in world.core.state.meshes.meshes.values()] == ["forming"]
    return world


def epochs(world: World, name: str) -> list[int]:
    return [order.identity.epoch for order in world.models[name].told(FormMesh)]


def test_a_mesh_is_formed_when_every_member_says_so_each_once() -> None:
    meshes = Meshes()
    mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS, 10.0)
    meshes.minted(mesh.epoch, b"id", 20.0)
    meshes.member_formed(mesh.epoch, "policy-0")
    meshes.member_formed(mesh.epoch, "policy-0")
    meshes.member_formed(mesh.epoch, "a stranger")
    assert mesh.state == "forming"
    meshes.member_formed(mesh.epoch, "rollout-0")
    assert mesh.state == "formed"


def test_epochs_and_unique_ids_are_never_used_again() -> None:
    meshes = Meshes()
    seen = set()
    for _ in range(5):
        mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS, 10.0)
        seen.add(mesh.epoch)
        meshes.revoke(mesh.epoch, 0.0, failed=True)
    assert seen == {1, 2, 3, 4, 5}


def test_a_revoked_mesh_is_never_anything_else_again() -> None:
    meshes = Meshes()
    mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS, 10.0)
    meshes.revoke(mesh.epoch, 0.0, failed=False)
    meshes.minted(mesh.epoch, b"late", 20.0)
    for member in MEMBERS:
        meshes.member_formed(mesh.epoch, member.replica)
    assert (mesh.state, meshes.meshes, meshes.of("weights", "rollout")) == ("revoked", {}, None)
    assert meshes.revoke(mesh.epoch, 0.0, failed=True) is None


def test_failures_in_a_row_wait_ever_longer_and_success_begins_anew() -> None:
    meshes = Meshes()
    waits = []
    for _ in range(7):
        mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS, 10.0)
        meshes.revoke(mesh.epoch, 100.0, failed=True)
        waits.append(meshes.retries["rollout"].not_before - 100.0)
    assert waits == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S, RETRY_MOST_S, RETRY_MOST_S, RETRY_MOST_S]
    mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS[:1], 10.0)
    meshes.minted(mesh.epoch, b"id", 20.0)
    meshes.member_formed(mesh.epoch, "policy-0")
    mesh = meshes.begin("weights", "rollout", "gloo", MEMBERS, 10.0)
    meshes.revoke(mesh.epoch, 200.0, failed=True)
    assert meshes.retries["rollout"].not_before == 200.0 + RETRY_S


def test_the_source_is_rank_0_and_everyone_is_told_the_same_identity() -> None:
    world = forming()
    orders = [world.models[name].told(FormMesh) for name in ("policy-0", "rollout-0", "rollout-1")]
    assert orders[0] == orders[1] == orders[2]
    identity = orders[0][0].identity
    assert [member.replica for member in identity.members] == ["policy-0", "rollout-0", "rollout-1"]
    assert (identity.epoch, identity.unique_id) == (1, b"id 1")


def test_nobody_is_told_to_form_a_mesh_before_its_id_is_minted() -> None:
    world = small_world()
    world._do = lambda effect: None if isinstance(effect, MintMeshId) else World._do(world, effect)  # type: ignore[method-assign]
    world.deliver()
    assert epochs(world, "policy-0") == []
    world.step(MeshIdMinted(at=world.now, epoch=1, unique_id=b"late"))
    assert epochs(world, "policy-0") == [1]


def test_no_weights_travel_before_every_member_stands() -> None:
    world = forming()
    world.say(world.models["policy-0"], MeshFormed(1))
    world.say(world.models["rollout-0"], MeshFormed(1))
    assert not world.models["policy-0"].told(SendWeights)
    world.say(world.models["rollout-1"], MeshFormed(1))
    assert world.models["policy-0"].told(SendWeights)
    assert world.models["rollout-1"].told(ReceiveWeights)


def test_the_first_error_of_a_member_revokes_the_mesh_to_everyone() -> None:
    world = forming()
    assert world.say(world.models["rollout-1"], MeshFailed(1, "connection refused")) == "fresh"
    for model in world.models.values():
        assert model.told(RevokeMesh) == [RevokeMesh(1, "rollout-1: connection refused")]
    assert ForgetMesh(1) in world.effects
    assert world.say(world.models["rollout-0"], MeshFailed(1, "peer closed")) == "duplicate"
    assert world.say(world.models["policy-0"], MeshFormed(1)) == "epoch"


def test_after_a_failure_a_new_epoch_forms_but_not_at_once() -> None:
    world = forming()
    world.say(world.models["rollout-1"], MeshFailed(1, "no route"))
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
    assert revoke.cause == "rollout-0, rollout-1 did not form it within timeouts.mesh_s"


@pytest.mark.parametrize("who", ["policy-0", "rollout-0"])
def test_a_member_that_is_lost_ends_the_mesh_for_the_others_without_a_pause(who: str) -> None:
    world = forming()
    world.lose(who)
    others = [model for name, model in world.models.items() if name != who]
    for model in others:
        assert [order.epoch for order in model.told(RevokeMesh)] == [1]
    assert all(retry.not_before == 0.0 for retry in world.core.state.meshes.retries.values())


def test_a_mesh_is_used_again_while_its_members_stay_the_same() -> None:
    world = small_world(rollouts=2)
    world.deliver()
    assert world.ended is not None
    assert epochs(world, "rollout-0") == [1]
    assert len(world.models["policy-0"].told(SendWeights)) >= 2


def test_a_new_member_gets_a_new_epoch_and_the_old_one_is_revoked() -> None:
    world = small_world(train={"batches": 6})
    world.run(lambda: world.core.state.version == 1)
    world.join("rollout-1", "rollout")
    world.deliver()
    assert len(set(epochs(world, "rollout-0"))) == len(epochs(world, "rollout-0")) > 1
    causes = {order.cause for order in world.models["rollout-0"].told(RevokeMesh)}
    assert causes == {"membership changed"}
    assert world.ended is not None and world.ended.outcome == "complete"


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
