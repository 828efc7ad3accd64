"""The launcher and the person of a simulation: starts controllers and replicas, restarts what ends, asks questions.

As `deploy.local.supervisor`: exit code 0 is final, a fenced process is gone for good, anything else is started again
under the same name after a pause. A run that was stopped or failed is resumed, a full disk mended, by a person who
takes some seconds for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.controller.core.outcome import EndRun
from shared.bus.wire import Frames
from shared.messages import (
    PROTOCOL,
    AnyMessage,
    DatasetIdentity,
    Envelope,
    Refused,
    ReplicaExited,
    ResumeRun,
    Role,
    ScaleFleet,
    Wanted,
    WantedRequest,
)
from tests.simulation.checks import Checks
from tests.simulation.controller import ControllerProcess, Outputs
from tests.simulation.disk import Image
from tests.simulation.folder import CheckpointFolder
from tests.simulation.meshes import DataPlane
from tests.simulation.network import Link, Network
from tests.simulation.plan import DATASETS, Plan
from tests.simulation.policy import Policy
from tests.simulation.process import EXIT_DONE, EXIT_FENCED, Rank
from tests.simulation.rollout import Rollout
from tests.simulation.world import World

ROLES: tuple[Role, ...] = ("policy", "rollout", "evaluator")
PATIENT_S = 60.0
"""How long a person tries to have the run go on at the end of the faults."""
LOOK_S = 1.0
"""How often the controller is asked which replicas it wants, once somebody has scaled the fleet."""
TOLERATED = ("hyperparameter", "state", "replica", "role")
"""What a person may be refused for."""
LATE_S = 60.0
"""A run may fail of what faults did to it, but not so long after the last one."""


class Fleet:
    """Every process of a simulated run."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.checks = Checks(world, plan)
        self.checks.fleet = self
        self.network = Network(world, plan.recipe.bus.lost_after_s)
        self.data_plane = DataPlane(world)
        self.folder = CheckpointFolder(plan.recipe.checkpoint.keep)
        self.image = Image()
        self.outputs = Outputs()
        self.controller: ControllerProcess | None = None
        self.superseded: list[ControllerProcess] = []
        self.processes: dict[str, list[Rank]] = {}
        self.zombies: list[Rank] = []
        self.services: dict[int, Policy | Rollout] = {}
        self.mischief = 1.0
        self.calm_since: float | None = None
        self.complete = False
        self.paused = False
        self.nans = self.bad_digests = self.bad_copies = self.bad_checkpoints = 0
        self.bad_states = self.torn_sums = 0
        self.on_commit: list[Callable[[], None]] = []
        self._wanted: dict[str, int] = dict(plan.replicas)
        self._restarts: dict[str, int] = {}
        self._by_hand: dict[str, None] = {}
        self._reconciling = False
        self._ending = False
        self._chance = world.chance("launcher")
        self.start_controller()
        for name in plan.replicas:
            world.after(self._chance.random(), lambda name=name: self.start(name))  # type: ignore[misc]

    # --- controllers --------------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        """A new process takes the disk."""
        if self.controller is not None and self.controller.alive:
            return
        self._ending = False
        self.controller = ControllerProcess(
            self.world,
            self.plan,
            self.image,
            self.network,
            self.outputs,
            self.checks,
            self.data_plane,
            self._controller_ended,
        )
        self.controller.boot()

    def supersede(self, seconds: float, stay: Callable[[str], bool]) -> None:
        """A second controller takes the disk while the old one lives on, for ranks that `stay` with it."""
        old = self.controller
        if old is None or not old.alive or old.bus is None or self._ending:
            return
        self.world.say(f"{old.name} is superseded")
        old.fenced = True
        self.superseded.append(old)
        self.controller = None
        for link in list(self.network.links):
            if link.listener is old and not stay(link.name):
                link.cut()
        self.start_controller()
        self.world.after(seconds, lambda: old.die("nobody needs it any more"))

    def _controller_ended(self, process: ControllerProcess, how: str, end: EndRun | None) -> None:
        if process is not self.controller:
            return
        if how == "complete":
            self.complete = True
        elif end is not None:
            if how == "failed" and self.calm_since is not None and self.world.now > self.calm_since + LATE_S:
                self.checks.broken(f"the run failed long after the last fault: {end.cause}")
            self._ending = True
            self.world.after(self.plan.recipe.timeouts.exit_s, self._resume)
        elif how == "disk":
            self.world.after(2.0, self._mend)
        else:
            self.world.after(0.1 + 1.5 * self._chance.random(), self.start_controller)

    def _mend(self) -> None:
        self.image.room = None
        self.start_controller()

    def _resume(self) -> None:
        """Start everything again, as `orrery resume` does."""
        self.world.say("the run is resumed")
        for ranks in list(self.processes.values()):
            for process in list(ranks):
                process.kill(EXIT_FENCED, "still there when the run was resumed")
        self.start_controller()
        if self.calm_since is not None:
            self._steer_back()
        for name in self._wanted:
            self.world.after(self._chance.random(), lambda name=name: self.start(name))  # type: ignore[misc]

    # --- replicas -----------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start the processes of a replica, unless they run, or nobody wants them any more."""
        if name not in self._wanted or self.processes.get(name) or self._ending or self.complete:
            return
        self._start(name, self._wanted[name], DATASETS)

    def start_stranger(self, name: str, datasets: tuple[DatasetIdentity, ...], seconds: float) -> None:
        """Start a replica that nobody asked for, and end it after a while unless it has ended by itself."""
        if self.processes.get(name) or self._ending or self.complete:
            return
        self._start(name, 1, datasets)
        for process in self.named(name):
            self.world.after(seconds, lambda process=process: process.kill(EXIT_FENCED, "unasked for"))  # type: ignore[misc]

    def _start(self, name: str, size: int, datasets: tuple[DatasetIdentity, ...]) -> None:
        """A policy's ranks begin together; those of an engine are started by rank 0 (see `start_workers`)."""
        role: Role = next(role for role in ROLES if name.startswith(role))
        first = Rank(self, role, name, 0, size, self.world.count("nonce"), datasets)
        self.processes[name] = [first]
        self.services[first.pid] = Policy(first) if role == "policy" else Rollout(first)
        if role == "policy":
            self.start_workers(first)

    def start_workers(self, first: Rank) -> None:
        """The other ranks of a replica begin."""
        for rank in range(1, first.ranks):
            process = Rank(self, first.role, first.replica, rank, first.ranks, first.nonce, first.datasets)
            siblings = self.zombies if first in self.zombies else self.processes[first.replica]
            siblings.append(process)

    def want(self, name: str, ranks: int) -> None:
        """Somebody starts this replica by hand, and again whenever it ends."""
        self._by_hand[name] = None
        self._wanted[name] = ranks
        self.start(name)

    def terminate(self, name: str) -> None:
        """SIGTERM for the first rank of a replica."""
        for process in self.named(name)[:1]:
            service = self.services.get(process.pid)
            if service is not None:
                process.when_awake(service.terminate)

    def reconcile(self) -> None:
        """From now on ask the controller which replicas it wants, as the supervisor does."""
        if not self._reconciling:
            self._reconciling = True
            self._look()

    def _look(self) -> None:
        running = [name for name in self._wanted if self.processes.get(name)]

        def take(answer: AnyMessage) -> None:
            if isinstance(answer, Wanted) and answer.replicas and not self._ending:
                self._take_wanted(answer, running)

        self.ask(WantedRequest(), LOOK_S, take)
        if not self.complete:
            self.world.after(LOOK_S, self._look)

    def _take_wanted(self, answer: Wanted, running: list[str]) -> None:
        for name in answer.replicas:
            if name not in self._wanted and name not in self._by_hand:
                self._wanted[name] = self.plan.replicas.get(name, 1)
                if name not in running:
                    self.start(name)
        for name in [name for name in self._wanted if name not in self._by_hand and name not in answer.replicas]:
            del self._wanted[name]
            if name not in answer.draining:
                self.terminate(name)

    def unwant(self, name: str) -> None:
        """This replica shall leave of its own will."""
        if self._wanted.pop(name, None) is None:
            return
        for process in list(self.processes.get(name, [])):
            service = self.services.get(process.pid)
            if isinstance(service, Rollout):
                process.when_awake(lambda service=service: service.drain("a person asked it to leave"))  # type: ignore[misc]

    def usurp(self, name: str) -> None:
        """A new process takes the name of one that still lives."""
        self.zombies += self.processes.pop(name, [])
        self.start(name)

    def ended(self, process: Rank, code: int) -> None:
        """A process is gone: the launcher starts the replica again.

        The others follow rank 0. The end of another is seen by rank 0 soon if it is on its machine, which it says; or
        by nobody but the controller.
        """
        self.services.pop(process.pid, None)
        self.checks.ended(process)
        if process in self.zombies:
            self.zombies.remove(process)
            return
        ranks = self.processes.get(process.replica, [])
        if process not in ranks:
            return
        ranks.remove(process)
        if not ranks:
            self.processes.pop(process.replica, None)
        if process.rank == 0:
            self.world.after(0.2, lambda: [r.kill(code, "its rank 0 is gone") for r in list(ranks)] and None)
        elif self._chance.random() < 0.5:
            for first in [sibling for sibling in ranks if sibling.rank == 0]:
                first.later(0.2, lambda first=first: first.fail(f"rank {process.rank} ended"))  # type: ignore[misc]
        if self.mischief and self._chance.random() < 0.5 and code != EXIT_DONE:
            self.world.after(0.3, lambda: self.ask(ReplicaExited(process.replica, process.pid, code)))
        if process.rank == 0 and not self._ending:
            restarts = self._restarts[process.replica] = self._restarts.get(process.replica, 0) + 1
            pause = 0.5 + min(0.3 * restarts, 2.0) * self._chance.random()
            self.world.after(pause, lambda: self.start(process.replica))

    def named(self, name: str) -> list[Rank]:
        """The processes of a replica, living ones."""
        return [process for process in self.processes.get(name, []) if process.alive]

    def mesh_users(self) -> Iterator[tuple[Rank, dict[int, float]]]:
        """Who has operations on meshes under way, and since when."""
        for service in self.services.values():
            if service.meshes.using and service.process.open:
                yield service.process, service.meshes.using

    # --- mischief that services ask about -----------------------------------------------------------------------------

    def undisturbed(self, process: Rank, since: float) -> bool:
        """Whether nothing has been wrong that could have kept a message of the controller from this process."""
        controller = self.controller
        connected = controller is not None and controller.alive and process.link.listener is controller
        awake = process.open and not process.frozen and not process.hung
        return (
            awake
            and connected
            and controller is not None
            and max(controller.began_at, process.woke_at, process.link.troubled_at) < since
        )

    def committed(self) -> None:
        """A step was committed, in memory as yet."""
        hooks, self.on_commit = self.on_commit, []
        for hook in hooks:
            hook()

    def votes_nan(self) -> bool:
        """Whether these gradients shall not be finite."""
        self.nans, now = max(self.nans - 1, 0), self.nans
        return now > 0

    def checkpoint_fails(self) -> bool:
        """Whether this checkpoint shall not be written."""
        self.bad_checkpoints, now = max(self.bad_checkpoints - 1, 0), self.bad_checkpoints
        return now > 0

    def corrupt(self, chain: str) -> str:
        """What arrives of these weights."""
        self.bad_digests, now = max(self.bad_digests - 1, 0), self.bad_digests
        return chain + " with an error" if now else chain

    def spoil(self, chain: str) -> str:
        """What is left of these weights in the copy that a replica keeps for others."""
        self.bad_copies, now = max(self.bad_copies - 1, 0), self.bad_copies
        return chain + " with a flipped bit" if now else chain

    def garble(self, chain: str) -> str:
        """What arrives of the state of a policy."""
        self.bad_states, now = max(self.bad_states - 1, 0), self.bad_states
        return chain + " with an error" if now else chain

    def sum_breaks(self) -> bool:
        """Whether this sum of gradients shall break."""
        self.torn_sums, now = max(self.torn_sums - 1, 0), self.torn_sums
        return now > 0

    def calm(self) -> None:
        """No faults from here on."""
        self.world.say("faults are over")
        self.calm_since = self.world.now
        self.mischief = 0.0
        self.nans = self.bad_digests = self.bad_copies = self.bad_checkpoints = 0
        self.bad_states = self.torn_sums = 0
        self._steer_back()
        self.on_commit.clear()
        self.network.calm()
        self.image.room = None
        for controller in [self.controller, *self.superseded]:
            if controller is not None:
                controller.crash_points.clear()
                controller.disk_delay_s = 0.0
        for name in self.plan.speed:
            self.plan.speed[name] = min(self.plan.speed[name], 2.0)

    # --- a person -----------------------------------------------------------------------------------------------------

    def _steer_back(self) -> None:
        """A person undoes what was asked of the run, so that it can come to its end."""
        if self.paused:
            self.ask(ResumeRun(), PATIENT_S)
        if self._reconciling:
            self.ask(ScaleFleet({"rollout": self._count("rollout")}), PATIENT_S)
            if self._count("evaluator"):
                self.ask(ScaleFleet({"evaluator": self._count("evaluator")}), PATIENT_S)

    def _count(self, role: str) -> int:
        return sum(name.startswith(role) for name in self.plan.replicas)

    def ask(
        self, message: AnyMessage, timeout_s: float = 10.0, hear: Callable[[AnyMessage], None] = lambda answer: None
    ) -> None:
        """Ask the controller a question, again and again until it is answered; `hear` gets the answer."""
        number = self.world.count("person")
        answered: list[AnyMessage] = []

        def take(envelope: Envelope, frames: Frames) -> None:
            if envelope.reply_to == number and not answered:
                answered.append(envelope.body)
                if isinstance(envelope.body, Refused) and envelope.body.fault not in TOLERATED:
                    self.checks.broken(f"{message} was refused: {envelope.body}")
                hear(envelope.body)

        link = Link(self.network, "person", f"person/{number}".encode(), take)
        until = self.world.now + timeout_s

        def say() -> None:
            if answered or self.world.now > until:
                link.close()
                return
            envelope = Envelope(
                protocol=PROTOCOL,
                term=0,
                sender="person",
                rank=0,
                incarnation=0,
                sequence=0,
                request=number,
                reply_to=0,
                body=message,
            )
            link.send(envelope, ())
            self.world.after(1.0, say)

        say()
