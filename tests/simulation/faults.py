"""Faults: what goes wrong when, drawn from the seed. Each stands for itself, so that a failing seed can be shrunk by
leaving some out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from shared.messages import (
    CheckpointRun,
    DatasetIdentity,
    DrainReplica,
    EvaluateRun,
    PauseRun,
    ResumeRun,
    ScaleFleet,
    SetHyperparameters,
    StatusRequest,
    StopRun,
)
from tests.simulation.controller import CrashPoint
from tests.simulation.fleet import Fleet
from tests.simulation.network import Weather
from tests.simulation.plan import DATASETS, Plan
from tests.simulation.process import EXIT_FAILED

OPERATIONS = [
    ("append", "before"), ("append", "middle"), ("append", "after"), ("sync", "before"), ("sync", "after"),
    ("replace", "before"), ("replace", "after"), ("delete", "before"), ("delete", "after"),
    ("send", "before"), ("send", "before"), ("send", "before"),
]  # fmt: skip
FOREIGN = (DatasetIdentity("train", 41, "cc"), DATASETS[1])


@dataclass(frozen=True)
class Fault:
    """Something goes wrong at `at`, for `seconds`; the rest depends on the kind."""

    kind: str
    at: float
    seconds: float = 0.0
    who: str = ""
    number: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.at:7.3f} s  {self.kind}"]
        parts += [self.who] if self.who else []
        parts += [f"for {self.seconds:.2f} s"] if self.seconds else []
        return " ".join(parts)


def draw_faults(seed: int, plan: Plan) -> list[Fault]:
    """The schedule of a seed: none at all in some, storms in others."""
    draw = random.Random(f"{seed}/faults")
    count = draw.choice([0, 1, 2, 4, 8, 16, 24, 32, 48])
    lasts = draw.uniform(10.0, 40.0)
    kinds = draw.sample(sorted(_KINDS), draw.randint(2, len(_KINDS)))  # some swarms of few kinds, some of all
    faults = []
    for _ in range(count):
        kind = draw.choice(kinds)
        who = draw.choice([*plan.replicas, "policy-0"])
        most = draw.choice([0.3, 2.0, 8.0])
        faults.append(
            Fault(kind, draw.uniform(0.0, lasts), draw.uniform(0.05, most), who, draw.randint(0, 60), draw.random())
        )
    if "policy-1" in plan.replicas:
        faults += _draw_policy_faults(seed, plan, lasts) if count else []
    faults += _draw_rank_faults(seed, plan, lasts) if count else []
    faults += _draw_steering(seed, plan, lasts)
    faults += _draw_departures(seed, plan, lasts)
    return sorted(faults, key=lambda fault: fault.at)


def _draw_policy_faults(seed: int, plan: Plan, lasts: float) -> list[Fault]:
    """More trouble for several policies, so that there is always one that joins; from a stream of its own."""
    draw = random.Random(f"{seed}/policy faults")
    policies = [name for name in plan.replicas if name.startswith("policy")]
    kinds = ["kill", "kill", "kill at commit", "freeze", "bad state", "torn sum", "torn sum"]
    return [
        Fault(
            draw.choice(kinds), draw.uniform(0.0, lasts), draw.uniform(0.05, 2.0), draw.choice(policies),
            draw.randint(0, 60), draw.random(),
        )
        for _ in range(draw.choice([2, 4, 8]))
    ]  # fmt: skip


def _draw_rank_faults(seed: int, plan: Plan, lasts: float) -> list[Fault]:
    """Trouble of one rank among several; from a stream of its own."""
    several = [name for name, ranks in plan.replicas.items() if ranks > 1]
    draw = random.Random(f"{seed}/rank faults")
    return [
        Fault(
            draw.choice(sorted(_RANK_KINDS)), draw.uniform(0.0, lasts), draw.uniform(0.05, 8.0), draw.choice(several),
            draw.randint(0, 60), draw.random(),
        )
        for _ in range(draw.choice([0, 2, 4]) if several else 0)
    ]  # fmt: skip


def _draw_steering(seed: int, plan: Plan, lasts: float) -> list[Fault]:
    """Persons steer some lives; from a stream of its own, so that the others are what they were before they could."""
    draw = random.Random(f"{seed}/steering")
    if draw.random() < 0.5:
        return []
    kinds = draw.sample(sorted(_STEERING), draw.randint(1, len(_STEERING)))
    return [
        Fault(
            draw.choice(kinds),
            draw.uniform(0.0, lasts),
            draw.uniform(0.5, 6.0),
            draw.choice([*plan.replicas, "policy-0"]),
            draw.randint(0, 60),
            draw.random(),
        )
        for _ in range(draw.choice([1, 3, 6, 12]))
    ]


def _draw_departures(seed: int, plan: Plan, lasts: float) -> list[Fault]:
    """Rollouts that leave in good order in the middle of their samples; from a stream of its own."""
    draw = random.Random(f"{seed}/departures")
    rollouts = [name for name in plan.replicas if name.startswith("rollout")]
    if plan.recipe.run.deterministic or len(rollouts) < 2 or draw.random() < 0.3:
        return []
    count = draw.choice([2, 6, 12, 24])
    return [Fault("terminate", draw.uniform(0.0, lasts + 10.0), 0.0, draw.choice(rollouts)) for _ in range(count)]


def strike(fleet: Fleet, fault: Fault) -> None:
    """Let it happen."""
    if not fleet.complete and fleet.calm_since is None:
        fleet.world.say(f"FAULT {fault}")
        (_KINDS | _STEERING | _POLICY_KINDS | _RANK_KINDS)[fault.kind](fleet, fault)


# --- processes --------------------------------------------------------------------------------------------------------


def _kill(fleet: Fleet, fault: Fault) -> None:
    ranks = fleet.named(fault.who)
    if ranks:
        ranks[fault.number % len(ranks)].kill(EXIT_FAILED, "killed")


def _kill_at_commit(fleet: Fleet, fault: Fault) -> None:
    def soon() -> None:
        fleet.world.after(fault.share * fault.seconds, lambda: _kill(fleet, fault))

    fleet.on_commit.append(soon)


def _freeze(fleet: Fleet, fault: Fault) -> None:
    for process in fleet.named(fault.who)[: 1 + fault.number % 3]:
        process.freeze(fault.seconds * 2)


def _freeze_rank(fleet: Fleet, fault: Fault) -> None:
    ranks = fleet.named(fault.who)
    if ranks:
        ranks[fault.number % len(ranks)].freeze(fault.seconds)


def _cut_rank(fleet: Fleet, fault: Fault) -> None:
    name = f"{fault.who}/{fault.number % fleet.plan.replicas[fault.who]}"
    fleet.network.partition(fault.seconds, lambda link: link == name)


def _hang(fleet: Fleet, fault: Fault) -> None:
    for process in fleet.named(fault.who)[:1]:
        process.hang(fault.seconds * 4)


def _usurp(fleet: Fleet, fault: Fault) -> None:
    if fault.number % 2:
        _freeze(fleet, fault)
    fleet.usurp(fault.who)


def _usurp_at_crash(fleet: Fleet, fault: Fault) -> None:
    """Old and new process of a replica meet in front of a new controller, whose disk is slow."""
    fleet.usurp(fault.who)
    _crash(fleet, fault)
    fleet.world.after(0.1 + fault.seconds, lambda: _slow_disk(fleet, fault))


def _slow(fleet: Fleet, fault: Fault) -> None:
    fleet.plan.speed[fault.who] = 1.0 + 8.0 * fault.share


def _leave(fleet: Fleet, fault: Fault) -> None:
    if not fault.who.startswith("policy"):
        ranks = fleet.plan.replicas[fault.who]
        fleet.unwant(fault.who)
        fleet.world.after(fault.seconds + 0.5, lambda: fleet.want(fault.who, ranks))


def _join_storm(fleet: Fleet, fault: Fault) -> None:
    if fleet.plan.recipe.run.deterministic:
        return
    judges = fleet.plan.recipe.judge == "evaluator" and fault.number % 3 == 0
    for number in range(1 + fault.number % 6):
        name = f"{'evaluator' if judges else 'rollout'}-{10 + number}"
        fleet.world.after(number * 0.05, lambda name=name: fleet.want(name, 1 + fault.number % 2))  # type: ignore[misc]
        fleet.world.after(fault.seconds + number * 0.1, lambda name=name: fleet.unwant(name))  # type: ignore[misc]


def _foreign_data(fleet: Fleet, fault: Fault) -> None:
    """A replica reads other rows under the same name: it must be refused for as long as it does."""
    if fleet.checks.records > 20:  # the first registrant's data is the law: it must not be this one
        fleet.start_stranger("rollout-20", FOREIGN, fault.seconds)


def _second_policy(fleet: Fleet, fault: Fault) -> None:
    """One that nobody asked for: it joins the others, and ends; a deterministic run refuses it."""
    fleet.start_stranger("policy-7", DATASETS, fault.seconds)


# --- controller, disk, clock ------------------------------------------------------------------------------------------


def _crash(fleet: Fleet, fault: Fault) -> None:
    if fleet.controller is not None:
        fleet.controller.die("crash", power=fault.share < 0.5)


def _crash_at(fleet: Fleet, fault: Fault) -> None:
    if fleet.controller is not None:
        operation, moment = OPERATIONS[fault.number % len(OPERATIONS)]
        fleet.controller.crash_points.append(
            CrashPoint(operation, moment, int(fault.share * 12), fault.number % 2 == 0)
        )


def _supersede(fleet: Fleet, fault: Fault) -> None:
    fleet.supersede(fault.seconds, _some(fleet, fault))


def _disk_full(fleet: Fleet, fault: Fault) -> None:
    fleet.image.room = int(fault.share * 3000)


def _slow_disk(fleet: Fleet, fault: Fault) -> None:
    controller = fleet.controller
    if controller is not None:
        controller.disk_delay_s = fault.share
        fleet.world.after(fault.seconds, lambda: setattr(controller, "disk_delay_s", 0.0))


def _clock_jump(fleet: Fleet, fault: Fault) -> None:
    fleet.plan.wall_shift_s += (fault.share - 0.5) * 10 ** (fault.number % 6)


# --- network ----------------------------------------------------------------------------------------------------------


def _weather(fleet: Fleet, fault: Fault) -> None:
    draw = random.Random(f"{fault}")
    fleet.network.weathers.append(
        Weather(
            until=fleet.world.now + fault.seconds * 2,
            hits=_some(fleet, fault),
            lose=draw.choice([0.0, 0.05, 0.3]),
            double=draw.choice([0.0, 0.1]),
            delay=draw.choice([0.0, 0.2]),
            delay_s=draw.choice([0.02, 0.5, 2.0]),
            chance=draw,
        )
    )


def _partition(fleet: Fleet, fault: Fault) -> None:
    fleet.network.partition(fault.seconds * 1.5, _some(fleet, fault))


def _reconnect(fleet: Fleet, fault: Fault) -> None:
    hits = _some(fleet, fault)
    for link in [link for link in fleet.network.links if hits(link.name)]:
        link.cut()


def _some(fleet: Fleet, fault: Fault) -> Callable[[str], bool]:
    """All links, one replica's, one rank's, or a random half."""
    match fault.number % 4:
        case 0:
            return lambda name: True
        case 1:
            return lambda name: name.startswith(fault.who)
        case 2:
            return lambda name: name == f"{fault.who}/{fault.number % 3}"
        case _:
            return lambda name: random.Random(f"{fault}/{name}").random() < 0.5


# --- what replicas and persons do -------------------------------------------------------------------------------------


def _nan(fleet: Fleet, fault: Fault) -> None:
    fleet.nans += 1 + fault.number % 2


def _bad_digest(fleet: Fleet, fault: Fault) -> None:
    fleet.bad_digests += 1 + fault.number % 3


def _bad_copy(fleet: Fleet, fault: Fault) -> None:
    fleet.bad_copies += 1 + fault.number % 3


def _bad_state(fleet: Fleet, fault: Fault) -> None:
    fleet.bad_states += 1


def _torn_sum(fleet: Fleet, fault: Fault) -> None:
    """A connection between policies breaks, and whoever notices says so."""
    fleet.torn_sums += 1 + fault.number % 2


def _bad_checkpoint(fleet: Fleet, fault: Fault) -> None:
    fleet.bad_checkpoints += 1 + fault.number % 2


def _stop(fleet: Fleet, fault: Fault) -> None:
    fleet.ask(StopRun("a person stops the run"))


def _change(fleet: Fleet, fault: Fault) -> None:
    changes = [
        {"train.lr": 1e-4}, {"rollout.temperature": 0.7}, {"train.samples": 3}, {"train.lr": -1.0}, {"run.seed": 3},
        {"checkpoint.every": 1 + fault.number % 3},
    ]  # fmt: skip
    change = changes[fault.number % len(changes)]
    if fleet.plan.recipe.train is None and any(name.startswith("train.") for name in change):
        return
    fleet.ask(SetHyperparameters(change, fault.number % 7 if fault.share < 0.5 else None))  # type: ignore[arg-type]


def _status(fleet: Fleet, fault: Fault) -> None:
    fleet.ask(StatusRequest())


_RANK_KINDS: dict[str, Callable[[Fleet, Fault], None]] = {
    "kill rank": _kill,
    "freeze rank": _freeze_rank,
    "cut rank": _cut_rank,
}
_POLICY_KINDS: dict[str, Callable[[Fleet, Fault], None]] = {"bad state": _bad_state, "torn sum": _torn_sum}


def _revise(fleet: Fleet, fault: Fault) -> None:
    changes = [{"train.max_staleness": fault.number % 5}, {"evaluation.every": 1 + fault.number % 3}]
    fleet.ask(SetHyperparameters(changes[fault.number % 2], fault.number % 7 if fault.share < 0.5 else None))  # type: ignore[arg-type]


def _terminate(fleet: Fleet, fault: Fault) -> None:
    """SIGTERM: the replica leaves in good order, and is started again."""
    fleet.terminate(fault.who)


def _pause(fleet: Fleet, fault: Fault) -> None:
    fleet.paused = True
    fleet.ask(PauseRun("lunch"))
    fleet.world.after(fault.seconds, lambda: fleet.ask(ResumeRun()))


def _checkpoint(fleet: Fleet, fault: Fault) -> None:
    fleet.ask(CheckpointRun())


def _evaluate(fleet: Fleet, fault: Fault) -> None:
    fleet.ask(EvaluateRun())


def _drain(fleet: Fleet, fault: Fault) -> None:
    fleet.reconcile()
    fleet.ask(DrainReplica(fault.who, "a person drains it"))


def _scale(fleet: Fleet, fault: Fault) -> None:
    fleet.reconcile()
    fleet.ask(ScaleFleet({"rollout": 1 + fault.number % 5}))


_STEERING: dict[str, Callable[[Fleet, Fault], None]] = {
    "revise": _revise,
    "terminate": _terminate,
    "pause": _pause,
    "checkpoint": _checkpoint,
    "evaluate": _evaluate,
    "drain": _drain,
    "scale": _scale,
}
_KINDS: dict[str, Callable[[Fleet, Fault], None]] = {
    "kill": _kill,
    "kill at commit": _kill_at_commit,
    "freeze": _freeze,
    "hang": _hang,
    "usurp": _usurp,
    "usurp at crash": _usurp_at_crash,
    "slow": _slow,
    "leave": _leave,
    "join storm": _join_storm,
    "foreign data": _foreign_data,
    "second policy": _second_policy,
    "crash": _crash,
    "crash at": _crash_at,
    "supersede": _supersede,
    "disk full": _disk_full,
    "slow disk": _slow_disk,
    "clock jump": _clock_jump,
    "weather": _weather,
    "partition": _partition,
    "reconnect": _reconnect,
    "nan": _nan,
    "bad digest": _bad_digest,
    "bad copy": _bad_copy,
    "bad checkpoint": _bad_checkpoint,
    "stop": _stop,
    "change": _change,
    "status": _status,
}
