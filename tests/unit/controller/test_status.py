"""What `orrery status` is told: plain values that any tool can print."""

from __future__ import annotations

import msgspec

from services.controller.liveness import Liveness
from services.controller.status import status
from tests.unit.controller.world import World, recipe, small_world


def of(world: World, liveness: Liveness | None = None) -> dict[str, object]:
    return status(world.core.state, world.core.recipe, liveness or Liveness(10.0), {"attempt": 2}, 50.0)


def test_a_status_is_plain_and_travels() -> None:
    world = small_world(evaluation={"suites": {"heldout": {"problems": 3}}})
    world.deliver()
    run = of(world)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(run)) == run
    assert (run["stage"], run["outcome"], run["version"], run["settled_version"]) == ("over", "complete", 3, 3)
    assert [(e["version"], e["why"], e["n"]) for e in run["evaluations"]] == [(0, "first", 3), (3, "last", 3)]  # type: ignore[attr-defined]
    assert run["refused"] == {"attempt": 2}


def test_every_replica_that_was_seen_is_listed_with_what_it_holds_and_does() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    world.join("rollout-0", "rollout", slow=True)
    world.join("rollout-1", "rollout")
    world.deliver()
    world.lose("rollout-1")
    liveness = Liveness(10.0)
    liveness.hear(("rollout-0", 1, 0), 48.0)
    liveness.note(("rollout-0", 1, 0), "generating", 5)
    replicas = {replica["name"]: replica for replica in of(world, liveness)["replicas"]}  # type: ignore[attr-defined]
    assert list(replicas) == ["policy-0", "rollout-0", "rollout-1"]
    assert (replicas["rollout-0"]["doing"], replicas["rollout-0"]["heard_s"]) == ("generating", 2.0)
    assert replicas["rollout-0"]["leases"] == len(world.models["rollout-0"].working)
    assert (replicas["rollout-1"]["state"], replicas["rollout-1"]["version"]) == ("lost", None)
    assert replicas["policy-0"]["version"] == world.core.state.version


def test_groups_are_counted_by_where_they_are() -> None:
    world = World(recipe())
    world.join("policy-0", "policy")
    slow = world.join("rollout-0", "rollout", slow=True)
    world.deliver()
    world.finish(slow)
    world.deliver()
    assert of(world)["groups"] == {"leased": 7, "reported": 1}


def test_the_stage_in_force_is_told_with_its_batches() -> None:
    world = small_world()
    run = of(World(recipe()))
    assert (run["stage"], run["batch"], run["batches"]) == ("train", 0, 3)
    world.deliver()
    run = of(world)
    assert (run["stage"], run["batch"], run["batches"]) == ("over", None, None)


def test_meshes_are_listed_live_and_revoked() -> None:
    world = small_world()
    world.run(lambda: bool(world.core.state.meshes.meshes))
    (mesh,) = of(world)["meshes"]  # type: ignore[misc]
    assert (mesh["epoch"], mesh["purpose"], mesh["members"]) == (1, "weights", ["policy-0", "rollout-0"])
    world.deliver()
    world.lose("rollout-0")
    states = [mesh["state"] for mesh in of(world)["meshes"]]  # type: ignore[attr-defined]
    assert states[-1] == "revoked"


def test_the_time_that_replicas_tell_of_is_passed_on_by_kind_of_work() -> None:
    world = World(recipe())
    world.join("rollout-0", "rollout")
    world.deliver()
    liveness = Liveness(10.0)
    liveness.hear(("rollout-0", 1, 0), 49.0)
    liveness.note(("rollout-0", 1, 0), "generating", 5, {"generating": 3.0, "judging": 0.5, "encoding": 0.25})
    (replica,) = of(world, liveness)["replicas"]  # type: ignore[misc]
    assert replica["seconds"] == {"generate": 3.0, "reward": 0.5, "other": 0.25}
