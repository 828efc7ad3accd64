"""Random histories of a world: messages in any order between replicas, slow work, losses, crashes, failures."""

from __future__ import annotations

import random
from dataclasses import dataclass

from shared.messages import MeshFailed
from tests.unit.controller.world import World, recipe

MOST_MOVES = 20_000


@dataclass(frozen=True)
class Chances:
    """How likely each trouble is, at every move."""

    rollout_lost: float = 0.0
    policy_lost: float = 0.0
    partition: float = 0.0
    crash: float = 0.0
    mesh_failed: float = 0.0
    not_finite: float = 0.0
    disk_full: float = 0.0
    hand_over: float = 0.0
    time: float = 0.02


ALL = Chances(0.01, 0.004, 0.004, 0.01, 0.01, 0.03, 0.05, 0.2)


def wander(seed: int, chances: Chances, *, rollouts: int = 2, replay: bool = False, **tables: object) -> World:
    """A run of slow rollouts under random troubles, to its end."""
    chance = random.Random(seed)
    world = World(recipe(**tables), check_replay=replay)  # type: ignore[arg-type]

    def policy(**named: object) -> None:
        world.join(
            "policy-0", "policy",
            finite=lambda step: chance.random() >= chances.not_finite,
            disk_full=lambda: chance.random() < chances.disk_full,
            **named,
        )  # fmt: skip

    def likely(what: float) -> bool:
        return chance.random() < what

    policy()
    for number in range(rollouts):
        world.join(f"rollout-{number}", "rollout", slow=True)
    for _ in range(MOST_MOVES):
        if world.ended is not None:
            return world
        if likely(chances.rollout_lost):
            name = f"rollout-{chance.randrange(rollouts)}"
            if world.state_of(name) not in ("lost", "left"):
                world.lose(name)
            world.join(name, "rollout", slow=True)
        elif likely(chances.policy_lost):
            if world.state_of("policy-0") not in ("lost", "left"):
                world.lose("policy-0")
            policy()
        elif likely(chances.partition):
            model = chance.choice([model for model in world.models.values() if model.alive])
            if world.state_of(model.name) not in ("lost", "left"):
                world.lose(model.name, dead=False)
        elif likely(chances.crash):
            world.crash(rejoin=False)
        elif likely(chances.mesh_failed) and world.core.state.meshes.meshes:
            epoch = next(iter(world.core.state.meshes.meshes))
            mesh = world.core.state.meshes.meshes[epoch]
            world.send(world.models[chance.choice(mesh.members).replica], MeshFailed(epoch, "reset by peer"))
        elif likely(chances.time):
            world.pass_time(chance.choice([0.1, 1.0, 20.0]))
        _move(world, chance, chances.hand_over)
    raise AssertionError(f"seed {seed}: the run did not end: {world.core.state.stages}, {world.core.state.steps}")


def _move(world: World, chance: random.Random, hand_over: float) -> None:
    """Somebody comes back, says the next thing, finishes some work, or leaves it part-way."""
    fleet = world.core.state.fleet.replicas
    away = [m for m in world.models.values() if m.alive and not (fleet[m.name].live and fleet[m.name].confirmed)]
    working = [model for model in world.models.values() if model.working and model.alive]
    if away and chance.random() < 0.3:
        world.register(chance.choice(away))
    elif not world.idle and chance.random() < 0.7:
        world.deliver(limit=1, pick=chance.choice)
    elif working:
        model = chance.choice(working)
        key = chance.choice(list(model.working))
        if hand_over and model.working[key][0].purpose == "train" and chance.random() < hand_over:
            world.send(model, model.hand_over(key))
        else:
            world.finish(model, key)
    elif world.idle and not away:
        world.pass_time(max(world.core.next_deadline() - world.now, 0.0) + 0.001)
