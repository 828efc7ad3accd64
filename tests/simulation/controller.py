"""A simulated controller process: the real core, journal, spool, shell and router sessions on virtual disk and network.

It mirrors `services.controller.server`: messages are decided on while the disk syncs, and what follows from them leaves
after the commit that they belong to. It can be made to crash at any operation on its disk, and at any message it sends.
One that was *superseded* (a newer controller has taken the disk) lives on, talks on, and dies when it next tries to
write: the fence is the disk's, as the lock on the run folder is in a real run.
"""

from __future__ import annotations

import errno
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.controller.core.core import Core
from services.controller.core.events import AnyEvent
from services.controller.core.outcome import AnyFact, EndRun
from services.controller.disk import Disk
from services.controller.journal import Journal
from services.controller.recovery import open_run
from services.controller.shell import Clock, Shell
from services.controller.spool import Spool
from shared.bus.router_sessions import Incoming, RouterSessions
from shared.bus.wire import Frames
from shared.messages import Envelope
from tests.simulation.checks import Checks
from tests.simulation.disk import Handle, Image
from tests.simulation.meshes import DataPlane
from tests.simulation.minting import Minter
from tests.simulation.network import Network
from tests.simulation.plan import Plan
from tests.simulation.world import Violation, World

TICK_S = 0.2
BATCH = 256
WALL = 1_700_000_000.0
RUN = "simulated"


class Killed(BaseException):
    """The process ends here and now."""


@dataclass
class CrashPoint:
    """Crash at the `skip`-th coming operation of this kind, at this moment of it; `power` takes the cache too."""

    operation: str
    moment: str
    skip: int
    power: bool


class Outputs:
    """metrics.jsonl and eval/: they outlive the processes."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}
        self.evaluations: dict[tuple[int, int, str], dict[str, Any]] = {}

    def metrics(self, line: dict[str, Any]) -> None:
        """Keep a committed step's line."""
        self.lines.setdefault((line["lineage"], line["step"]), line)

    def evaluation(self, result: dict[str, Any]) -> None:
        """Keep a verdict."""
        self.evaluations[result["lineage"], result["version"], result["suite"]] = result


class _Journal(Journal):
    """Tells what was appended, and what has become durable."""

    def __init__(self, disk: Disk, segment_bytes: int, appended: Callable[..., None], durable: Callable[[int], None]):
        self._appended, self._made_durable = appended, durable
        super().__init__(disk, segment_bytes)

    def append(self, term: int, event: AnyEvent, facts: list[AnyFact]) -> None:
        """As the base, and tell."""
        super().append(term, event, facts)
        self._appended(self.number, event, facts)

    def flush(self) -> None:
        """As the base, and tell."""
        super().flush()
        self._made_durable(self.durable)


class _Bus(RouterSessions):
    """The real sessions; what may be acknowledged is checked against the disk."""

    def __init__(self, term: int, process: ControllerProcess) -> None:
        super().__init__(term, process.plan.recipe.bus, process.transmit, lambda: process.world.now)
        self._process = process

    def durable(self, peer: bytes, sequence: int, session: int | None = None) -> None:
        """As the base, after a check that it is true."""
        self._process.check_durable(peer, sequence, session)
        super().durable(peer, sequence, session)


class ControllerProcess:
    """One term. `ended` is told how the process ended: "crash", "disk", or the run's outcome."""

    def __init__(
        self,
        world: World,
        plan: Plan,
        image: Image,
        network: Network,
        outputs: Outputs,
        checks: Checks,
        plane: DataPlane,
        ended: Callable[[ControllerProcess, str, EndRun | None], None],
    ) -> None:
        self.world, self.plan, self.image, self.network, self.checks = world, plan, image, network, checks
        self.name = f"controller#{world.count('controller')}"
        self.alive = True
        self.began_at = world.now
        self.fenced = False
        self.over = False
        self.crash_points: list[CrashPoint] = []
        self.disk_delay_s = 0.0
        self._ended = ended
        self._minter = Minter(world, plane)
        self._outputs = outputs
        self._chance = world.chance("controller")
        self._writer = world.chance("writer")
        self._queue: deque[Incoming] = deque()
        self._busy = False
        self._goodbye_until: float | None = None
        self._record_of: dict[tuple[bytes, int], dict[int, int]] = {}
        self._durable_number = 0
        self.core: Core | None = None
        self.bus: _Bus | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Open the run, begin a term, listen."""
        self._guarded(self._boot)

    def _boot(self) -> None:
        self._journal = _Journal(self._handle("journal"), self.plan.segment_bytes, self._appended, self._synced)
        self._durable_number = self._journal.number
        self.core = open_run(self.plan.recipe, Path(RUN), self._journal, self._outputs)  # type: ignore[arg-type]
        spool = Spool(self._handle("spool"), self.plan.segment_bytes)
        self.checks.opened(self.core, self._journal, spool)
        if self.core.state.stages.name == "over":
            self.over = True
            self.die("complete", EndRun("complete", ""))
            return
        self.bus = _Bus(self.core.state.term + 1, self)
        clock = Clock(lambda: WALL + self.world.now + self.plan.wall_shift_s, lambda: self.world.now)
        self._shell = Shell(self.core, self._journal, spool, self._outputs, self.bus, clock, self._minter)  # type: ignore[arg-type]
        self._shell.begin(RUN)
        while True:  # nobody is connected yet: no time passes that matters
            self._shell.seal()
            self._shell.sync()
            self._shell.release()
            if not self._shell.unsynced:
                break
        self.world.say(f"{self.name} listens, term {self.bus.term}")
        self.network.listen(self)
        self.world.after(TICK_S, self._tick)

    def die(self, how: str, end: EndRun | None = None, *, power: bool = False) -> None:
        """The process ends; connections break. With `power`, the disk forgets what was not synced."""
        if not self.alive:
            return
        self.alive = False
        self._minter.close()
        self.world.say(f"{self.name} ends: {how}" + (" (power lost)" if power else ""))
        if power:
            self.image.lose_power(self._chance)
        self.network.drop_connections(self)
        self._ended(self, how, end)

    def _guarded(self, action: Callable[[], None]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Killed:
            pass  # whoever raised it has seen to the end
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EROFS):
                raise Violation(f"{self.name} ended with {error!r}") from error
            self.die("disk" if error.errno == errno.ENOSPC else "fenced")
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{self.name} ended with {type(error).__name__}: {error}") from error

    def _handle(self, folder: str) -> Handle:
        return Handle(self.image, folder, self._at_operation, lambda: self.fenced)

    def _at_operation(self, operation: str, name: str, moment: str) -> None:
        if not self.alive:
            raise Killed
        for point in self.crash_points:
            if (point.operation, point.moment) == (operation, moment):
                point.skip -= 1
                if point.skip < 0:
                    self.crash_points.remove(point)
                    self.world.say(f"{self.name} crashes {moment} {operation} {name}")
                    self.die("crash", power=point.power)
                    raise Killed

    # --- turns --------------------------------------------------------------------------------------------------------

    def arrive(self, peer: bytes, envelope: Envelope, frames: Frames) -> None:
        """The network brings a message."""
        bus = self.bus
        assert bus is not None

        def hear() -> None:
            incoming = bus.hear(peer, envelope, frames)
            if incoming is not None:
                self._queue.append(incoming)
                self._turn()

        self._guarded(hear)

    def _tick(self) -> None:
        if not self.alive:
            return
        self.world.after(TICK_S, self._tick)
        assert self.bus is not None
        self._guarded(self.bus.resend)
        self._turn()

    def _turn(self) -> None:
        self._guarded(self._take)

    def _take(self) -> None:
        for _ in range(min(BATCH, len(self._queue))):
            if self._shell.crowded:
                break
            incoming = self._queue.popleft()
            sequence = incoming.envelope.sequence
            if not sequence:
                self._shell.take(incoming)
                continue
            numbers = self._record_of.setdefault((incoming.peer, incoming.session), {})
            numbers[sequence] = sys.maxsize  # not taken yet
            self._shell.take(incoming)
            numbers[sequence] = self._journal.number
            self.checks.taken(incoming.peer, incoming.envelope.body)
        self._shell.tick()
        if not self._busy:
            self._commit()

    def _commit(self) -> None:
        self._shell.seal()
        if self._shell.unsynced:
            self._busy = True
            delay = (0.001 + 0.01 * self._chance.random()) + self.disk_delay_s * self._chance.random()
            self.world.after(delay, lambda: self._guarded(self._sync))
            if self._writer.random() < 0.5:  # it comes before the sync
                self.world.after(delay * self._writer.random(), lambda: self._guarded(self._shell.write))
            return
        self._release()

    def _sync(self) -> None:
        self._shell.sync()
        self._busy = False
        # A paused process, or a slow thread: what is durable may be long so before its consequences leave.
        if self._chance.random() < 0.1:
            self._busy = True
            self.world.after(0.02 * self._chance.random(), lambda: self._guarded(self._resume))
            return
        self._release()

    def _resume(self) -> None:
        self._busy = False
        self._release()

    def _release(self) -> None:
        self._shell.release()
        assert self.core is not None
        if not self.fenced:
            self.checks.rested(self.core, self.world.now)
        if self._shell.unsynced:
            self._commit()
        elif self._shell.ending is not None:
            self._end()
        elif self._queue:
            self.world.after(0.0, self._turn)

    def _end(self) -> None:
        if self._goodbye_until is None:
            self._goodbye_until = self.world.now + self.plan.recipe.timeouts.exit_s / 2
            self.world.say(f"{self.name}: the run is {self._shell.ending}")
        if self.world.now >= self._goodbye_until or not self._shell.peers:
            self._shell.save_snapshot()
            self.over = True
            assert self._shell.ending is not None
            self.die(self._shell.ending.outcome, self._shell.ending)

    # --- what leaves, and what is checked -----------------------------------------------------------------------------

    def transmit(self, peer: bytes, envelope: Envelope, frames: Frames) -> None:
        """Put a message on its way."""
        self._at_operation("send", type(envelope.body).__name__, "before")
        self.checks.leaves(self.name, envelope, self._durable_number)
        for link in self.network.links:
            if link.peer == peer:
                link.receive(self, envelope, frames)
                break

    def check_durable(self, peer: bytes, sequence: int, session: int | None) -> None:
        """Whatever is acknowledged must be on the disk."""
        if session is None:
            raise Violation(f"{self.name} acknowledges without naming the session")
        numbers = self._record_of.get((peer, session), {})
        for known in [known for known in numbers if known <= sequence]:
            number = numbers.pop(known)
            if number > self._durable_number:
                raise Violation(
                    f"{self.name} acknowledges message {known} of {peer!r}, but what it led to is not durable: record "
                    f"{number}, of which {self._durable_number} are"
                )

    def _appended(self, number: int, event: AnyEvent, facts: list[AnyFact]) -> None:
        assert self.core is not None
        if not self.fenced:  # what a superseded controller decides from here on never becomes true
            self.checks.stepped(self.core, number, event, facts)

    def _synced(self, number: int) -> None:
        self._durable_number = number
        self.checks.durable(number)
