"""One simulated rank: the real `ReplicaSession` on a simulated link, and an inbox, as `BusClient` keeps them.

A process can be killed, frozen (it does nothing at all, and hears what gathered when it thaws) or hung (its bus says
heartbeats, its service does nothing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.bus.instructions import Answer, Deliver, FencedOff, Freed, Instruction, Opened, Rejected, Transmit
from shared.bus.session import Phase, ReplicaSession
from shared.bus.standing import Passport, Standing
from shared.bus.wire import Frames
from shared.messages import AnyMessage, DatasetIdentity, Envelope, Goodbye, Refused, Registered, ReplicaFailed, Role
from tests.simulation.network import Link

if TYPE_CHECKING:
    from tests.simulation.fleet import Fleet

TICK_S = 0.2
EXIT_DONE, EXIT_FAILED, EXIT_FATAL, EXIT_FENCED = 0, 1, 3, 4


class Rank:
    """A process. `service` is told what is delivered; ranks other than 0 have none. `ended` is told the exit code.

    `nonce` is that of the replica's start; `on_welcome` is told when it is registered for the first time.
    """

    def __init__(
        self,
        fleet: Fleet,
        role: Role,
        replica: str,
        rank: int,
        ranks: int,
        nonce: int,
        datasets: tuple[DatasetIdentity, ...],
    ) -> None:
        self.fleet, self.world = fleet, fleet.world
        self.role, self.replica, self.rank, self.ranks = role, replica, rank, ranks
        self.datasets = datasets
        settings = fleet.plan.recipe.bus
        self.nonce, self.pid = nonce, self.world.count("process")
        self.name = f"{replica}/{rank}*{nonce}"
        self.alive, self.frozen, self.hung = True, False, False
        self.woke_at = 0.0
        self.standing = Standing(lambda: self.world.now)
        self.session = ReplicaSession(
            Passport(role, replica, rank, ranks, nonce, self.pid, "here", datasets, fleet.plan.device(replica, rank)),
            self.standing,
            heartbeat_s=settings.heartbeat_s,
            resend_s=settings.resend_s,
            lost_after_s=settings.lost_after_s,
            window=settings.window,
        )
        self.inbox: deque[tuple[AnyMessage, Frames]] = deque()
        self.on_message: Callable[[], None] = self.inbox.clear
        self.on_exit: Callable[[str], None] = lambda cause: None
        self.on_welcome: Callable[[], None] = lambda: None
        self.welcomed = False
        self._settings = settings
        self._unsent: deque[tuple[AnyMessage, Frames]] = deque()
        self._in_flight = 0
        self._unacknowledged: deque[AnyMessage] = deque()
        self._answers: dict[int, Callable[[AnyMessage], None]] = {}
        self._gathered: list[Callable[[], None]] = []
        self._leaving: tuple[int, float] | None = None
        self._connected_at = self._started_at = self.world.now
        self.link = Link(fleet.network, f"{replica}/{rank}", f"{replica}/{rank}/{nonce:x}".encode(), self._take)
        self._carry_out(self.session.register(self.world.now))
        self.world.after(TICK_S * self.world.chance("ticks").random(), self._tick)

    # --- life ---------------------------------------------------------------------------------------------------------

    def kill(self, code: int, cause: str) -> None:
        """The process is gone."""
        if not self.alive:
            return
        self.alive = False
        self.world.say(f"{self.name} ends with code {code}: {cause}")
        self.link.close()
        self.on_exit(cause)
        self.fleet.ended(self, code)

    def freeze(self, seconds: float) -> None:
        """Stop the whole process for a while."""
        self.frozen = True
        self.world.after(seconds, self._thaw)

    def hang(self, seconds: float) -> None:
        """Stop the service for a while; the bus goes on."""
        self.hung = True
        self.world.after(seconds, self._recover)

    def leave(self, code: int, cause: str) -> None:
        """Say goodbye, wait a little until all is acknowledged, exit."""
        if self._leaving is None:
            self.send(Goodbye(cause))
            self._leaving = (code, self.world.now + 3.0)

    def fail(self, cause: str) -> None:
        """Say what cannot be mended, wait a little until that is acknowledged, exit."""
        if self._leaving is None:
            self.send(ReplicaFailed(cause, fatal=False))
            self._leaving = (EXIT_FAILED, self.world.now + 3.0)

    def when_awake(self, action: Callable[[], None]) -> None:
        """Do something now, or when this process runs again; never when it is dead."""
        if self.alive:
            if self.frozen or self.hung:
                self._gathered.append(action)
            else:
                action()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something in a while, if this process runs then."""
        self.world.after(delay_s, lambda: self.when_awake(action))

    def _thaw(self) -> None:
        self.frozen = False
        self._wake()

    def _recover(self) -> None:
        self.hung = False
        self._wake()

    def _wake(self) -> None:
        if self.frozen or self.hung:
            return
        self.woke_at = self.world.now
        gathered, self._gathered = self._gathered, []
        for action in gathered:
            self.when_awake(action)
        if self.alive:
            self.on_message()

    # --- the bus ------------------------------------------------------------------------------------------------------

    def send(self, message: AnyMessage, frames: Frames = ()) -> None:
        """As `BusClient.send`, except that a full window makes the message wait here."""
        if self.alive:
            self._unsent.append((message, frames))
            self._fill_window()

    def ask(self, message: AnyMessage, timeout_s: float, answer: Callable[[AnyMessage | None], None]) -> None:
        """As `BusClient.request`: `answer` gets the answer, the refusal, or None after the timeout."""
        number, instructions = self.session.ask(message, self.world.now)
        self._answers[number] = answer
        self._carry_out(instructions)

        def give_up() -> None:
            waiting = self._answers.pop(number, None)
            if waiting is not None:
                self.session.withdraw(number)
                waiting(None)

        self.later(timeout_s, give_up)

    def _fill_window(self) -> None:
        while self._unsent and self._in_flight < self._settings.window and self.alive:
            message, frames = self._unsent.popleft()
            self._in_flight += 1
            self._unacknowledged.append(message)
            self._carry_out(self.session.push(message, frames, self.world.now))

    def _take(self, envelope: Envelope, frames: Frames) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._gathered.append(lambda: self._take(envelope, frames))
            return
        room = len(self.inbox) < self._settings.window
        self._carry_out(self.session.hear(envelope, frames, self.world.now, room=room))

    def _tick(self) -> None:
        if not self.alive:
            return
        self.world.after(TICK_S, self._tick)
        if self.frozen:
            return
        now = self.world.now
        if not self.welcomed and now - self._started_at > self.fleet.plan.recipe.timeouts.register_s:
            self.kill(EXIT_FAILED, "nobody answered Register (timeouts.register_s)")
            return
        if now - max(self._connected_at, self.session.heard_at) > self._settings.lost_after_s:
            self.link.cut()
            self._connected_at = now
        self._carry_out(self.session.tick(now))
        if self._leaving is not None and (self._in_flight == 0 or now > self._leaving[1]):
            self.kill(self._leaving[0], "it left")

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if not self.alive:
                return
            match instruction:
                case Transmit(envelope, frames):
                    if not self.link.send(envelope, frames):
                        self.session.not_sent(envelope)
                case Deliver(delivery):
                    self._deliver(delivery.message, delivery.frames)
                case Freed(count):
                    self._in_flight -= count
                    for _ in range(count):
                        self.fleet.checks.acknowledged(self, self._unacknowledged.popleft())
                    self._fill_window()
                case Answer(request, message):
                    answer = self._answers.pop(request, None)
                    if answer is not None:
                        self.when_awake(lambda answer=answer, message=message: answer(message))  # type: ignore[misc]
                case Opened(registered, first):
                    self._open(registered, first)
                case Rejected(refused):
                    if self.welcomed:
                        self._deliver(refused, ())
                    else:
                        self.kill(EXIT_FAILED, f"not wanted: {refused.fault}: {refused.got}")
                case FencedOff(refused):
                    self.kill(EXIT_FENCED, f"fenced: {refused.got}")

    def _open(self, registered: Registered, first: bool) -> None:
        self.fleet.checks.welcomed(self, registered.incarnation, self.session.term)
        self.world.say(f"{self.name} is incarnation {registered.incarnation} in term {self.session.term}")
        self.welcomed = True
        if first:
            self.when_awake(self.on_welcome)
        else:
            self._deliver(registered, ())

    def _deliver(self, message: AnyMessage, frames: Frames) -> None:
        if isinstance(message, Refused):
            self.world.say(f"{self.name} was refused: {message.fault}: expected {message.expected}, got {message.got}")
        self.inbox.append((message, frames))
        if not (self.frozen or self.hung):
            self.on_message()

    @property
    def open(self) -> bool:
        """Whether it has a session as far as it knows."""
        return self.alive and self.session.phase is Phase.OPEN
