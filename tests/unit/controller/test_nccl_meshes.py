"""Meshes of NCCL: who meets by it, with which ids, what becomes of an attempt without one, and of mixed versions."""

from __future__ import annotations

import pytest

from services.controller.core.events import MeshIdFailed
from services.controller.core.meshes import RETRY_S
from services.controller.core.outcome import EndMint, ForgetMesh, MintMeshId
from shared.messages import Device, FormMesh, MeshFormed, RevokeMesh, SendWeights
from tests.unit.controller.world import Model, World, recipe

VERSION = "2.32.3"


def gpu(name: str, nccl: str = VERSION) -> dict[int, Device]:
    return {0: Device(name, nccl)}


def world_of(backend: str, policy: dict[int, Device], rollout: dict[int, Device], *, mints: bool = True) -> World:
    world = World(recipe(weights={"backend": backend}, timeouts={"mint_s": 5.0}))
    if not mints:
        deliver = world._do
        world._do = lambda effect: None if isinstance(effect, MintMeshId) else deliver(effect)  # type: ignore[method-assign]
    world.join("rollout-0", "rollout", devices=rollout)
    world.join("policy-0", "policy", devices=policy)
    world.deliver()
    return world


def backends(world: World) -> list[str]:
    return [order.identity.backend for order in world.models["policy-0"].told(FormMesh)]


@pytest.mark.parametrize(
    ("backend", "policy", "rollout", "taken"),
    [
        ("auto", gpu("a"), gpu("b"), "nccl"),
        ("auto", gpu("a"), gpu("a"), "gloo"),
        ("auto", gpu("a"), {}, "gloo"),
        ("auto", {}, {}, "gloo"),
        ("gloo", gpu("a"), gpu("b"), "gloo"),
        ("nccl", gpu("a"), gpu("b"), "nccl"),
    ],
)
def test_auto_takes_nccl_where_every_member_has_a_gpu_of_its_own(
    backend: str, policy: dict[int, Device], rollout: dict[int, Device], taken: str
) -> None:
    world = world_of(backend, policy, rollout)
    assert backends(world)[:1] == [taken]
    assert world.models["policy-0"].told(SendWeights), "and the weights travel"


def test_one_id_is_asked_for_of_the_version_that_the_members_have() -> None:
    world = world_of("auto", gpu("a"), gpu("b"))
    asked = [effect for effect in world.effects if isinstance(effect, MintMeshId)]
    assert asked[0] == MintMeshId(1, "nccl", 1, VERSION)


def test_every_rank_of_replicas_with_several_has_a_gradients_group_and_an_id_of_its_own() -> None:
    world = World(recipe(weights={"backend": "auto"}, policy={"replicas": 2}))
    for name in ("policy-0", "policy-1"):
        model = world.join(
            name, "policy", ranks=2, devices={rank: Device(f"{name}.{rank}", VERSION) for rank in range(2)}
        )
        world.register(model, 1)
    world.join("rollout-0", "rollout", devices=gpu("r"))
    world.deliver()
    orders = [order.identity for order in world.models["policy-1"].told(FormMesh)]
    gradients = next(identity for identity in orders if identity.purpose == "gradients")
    assert gradients.backend == "nccl"
    assert len(gradients.further_ids) == 1
    assert gradients.further_ids[0] != gradients.unique_id
    assert all(not identity.further_ids for identity in orders if identity.purpose != "gradients")


def test_what_minted_the_id_may_go_when_all_members_stand_and_not_before() -> None:
    world = World(recipe(weights={"backend": "nccl"}))
    for name, role in (("rollout-0", "rollout"), ("policy-0", "policy")):
        world.join(name, role, devices=gpu(name), silent={FormMesh})
    world.deliver()
    world.say(world.models["policy-0"], MeshFormed(1))
    assert EndMint(1) not in world.effects
    world.say(world.models["rollout-0"], MeshFormed(1))
    assert EndMint(1) in world.effects
    assert ForgetMesh(1) not in world.effects


def test_an_attempt_without_an_id_fails_by_name_and_the_next_one_waits() -> None:
    world = world_of("nccl", gpu("a"), gpu("b"), mints=False)
    world.step(MeshIdFailed(at=world.now, epoch=1, cause="no libnccl"))
    assert world.core.state.meshes.meshes == {}
    assert ForgetMesh(1) in world.effects
    assert world.models["policy-0"].told(RevokeMesh) == [RevokeMesh(1, "no libnccl")]
    world.pass_time(2 * RETRY_S)
    assert [effect.epoch for effect in world.effects if isinstance(effect, MintMeshId)] == [1, 2]


def test_a_mint_that_does_not_answer_ends_at_its_timeout_by_its_name() -> None:
    world = world_of("nccl", gpu("a"), gpu("b"), mints=False)
    world.pass_time(4.9)
    assert not world.models["policy-0"].told(RevokeMesh)
    world.pass_time(0.2)
    causes = [order.cause for order in world.models["policy-0"].told(RevokeMesh)]
    assert causes == ["the controller waited for its unique id past timeouts.mint_s"]


def test_a_minter_that_dies_before_all_have_met_ends_the_attempt() -> None:
    world = World(recipe(weights={"backend": "nccl"}))
    for name, role in (("rollout-0", "rollout"), ("policy-0", "policy")):
        world.join(name, role, devices=gpu(name), silent={FormMesh})
    world.deliver()
    world.step(MeshIdFailed(at=world.now, epoch=1, cause="killed by SIGKILL"))
    assert world.models["rollout-0"].told(RevokeMesh) == [RevokeMesh(1, "killed by SIGKILL")]
    world.step(MeshIdFailed(at=world.now, epoch=1, cause="again"))
    assert len(world.models["rollout-0"].told(RevokeMesh)) == 1


def registering(world: World, name: str, devices: dict[int, Device], ranks: int = 1) -> Model:
    return Model(world, name, "rollout", nonce=99, devices=devices, ranks=ranks)


def test_another_version_is_refused_with_both_named() -> None:
    world = world_of("auto", gpu("a"), gpu("b"))
    newcomer = registering(world, "rollout-1", gpu("c", "2.30.7"))
    refusal = world.core.judge_registration(newcomer.register())
    assert refusal is not None
    assert (refusal.fault, refusal.expected, refusal.got) == ("nccl", "NCCL 2.32.3, as policy-0 has", "NCCL 2.30.7")
    assert "weights.nccl_library" in refusal.advice


def test_a_rank_beside_another_version_of_its_own_replica_is_refused_too() -> None:
    world = World(recipe(weights={"backend": "auto"}))
    model = world.join("policy-0", "policy", ranks=2, devices=gpu("a") | {1: Device("b", "2.30.7")})
    refusal = world.core.judge_registration(model.register(1))
    assert refusal is not None
    assert refusal.fault == "nccl"


def test_the_same_version_a_rank_without_a_gpu_and_a_new_start_with_another_version_are_taken() -> None:
    world = world_of("auto", gpu("a"), {})
    for devices in (gpu("c"), {}):
        assert world.core.judge_registration(registering(world, "rollout-1", devices).register()) is None
    world.lose("policy-0")
    assert world.core.judge_registration(registering(world, "rollout-1", gpu("c", "2.30.7")).register()) is None


def test_where_meshes_must_be_nccls_a_rank_without_a_gpu_is_refused() -> None:
    world = World(recipe(weights={"backend": "nccl"}))
    refusal = world.core.judge_registration(registering(world, "rollout-0", {}).register())
    assert refusal is not None
    assert (refusal.fault, refusal.got) == ("nccl", "rank 0 without one")
