"""Rank 0's side of a replica of several ranks: it starts the others, gives them orders, ends with the first of them.

    main thread: do, finish, together     any thread: tell     crew's thread: answers, and the ends of members (pidfd)

Ranks live and die together. When a member has died or failed, or the replica was fenced, the crew's thread kills all
members, which may hang in a collective, and leaves the main thread, which may hang in one too, a moment to end this
process in good order; then it does so itself. Invariants: no member outlives rank 0 (the kernel kills those of its
node with it, the others lose their standard input); what is waited for is named in every error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import zmq

from services.policy.device import CPU
from services.policy.ranks.channel import CrewChannel
from services.policy.ranks.group import Meeting, form_world, leave_world
from services.policy.ranks.nodes import Nodes, address_for_nodes
from services.policy.ranks.orders import (
    AnyAnswer,
    AnyOrder,
    Done,
    Failed,
    Here,
    Leave,
    RanksError,
    Start,
    Told,
)
from shared.arrays import Frame
from shared.bus import BusClient, BusError
from shared.config import Recipe
from shared.engines.ranks import invitation
from shared.mesh import MeshError
from shared.messages import MeshFailed, MeshFormed, ReplicaFailed
from shared.service import EXIT_FATAL, EXIT_FENCED, EXIT_RESTART, PARENT_VARIABLE
from shared.signals import NUMBERS
from shared.telemetry import get_logger

MEMBER = (sys.executable, "-m", "services.policy.ranks")
LOOK_MS = 100
"""How often the crew's thread looks whether it shall end."""
GRACE_S = 1.0
"""What the main thread has to end this process by itself, once the replica is over."""
LAST_WORDS_S = 2.0
"""What the controller has to acknowledge why."""

Report = Callable[[int, MeshFormed | MeshFailed], None]


@dataclass
class _Member:
    rank: int
    process: subprocess.Popen[bytes]
    watch: int
    """pidfd: readable once the process has ended."""


class Crew:
    """Ranks 1 to `world` - 1 of this replica. Use it as a context manager, in the main thread.

    `client` is rank 0's, started, and `device` where it computes; `nodes` says where ranks run, all here if it is None;
    `command` is how a member is started. RecipeError for an interface that the other nodes cannot reach.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        client: BusClient,
        nodes: Nodes | None = None,
        device: torch.device = CPU,
        command: Sequence[str] = MEMBER,
    ) -> None:
        self.world = recipe.policy.parallel.ranks
        self._recipe, self._run_folder, self._client = recipe, run_folder, client
        self.nodes = nodes or Nodes.here(self.world)
        self._device, self._command = device, command
        interface = recipe.weights.interface if self.nodes.far else None
        address = address_for_nodes(interface) if interface else None
        self._channel = CrewChannel(interface)
        self._meeting = Meeting(self.world, address)
        self._here: set[int] = set()
        self._members: list[_Member] = []
        self._changed = threading.Condition()
        self._number = 0
        self._answers: dict[int, Done | Failed] = {}
        self._awaited, self._patience = "", ""
        self._over: RanksError | None = None
        self._closed = threading.Event()
        self._obeys = False  # all members take orders: what ends in good order can be told so
        self._report: Report | None = None
        self._on_end: Callable[[RanksError], None] | None = None
        self._thread = threading.Thread(target=self._watch, name="crew", daemon=True)

    def __enter__(self) -> Crew:
        """Start the members; the kernel ties them to this thread's life."""
        try:
            for rank in range(1, self.world):
                self._members.append(self._start(rank))
            self._thread.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._obeys = self._obeys and kind is None
        self.close()

    def form_world(self) -> None:
        """Wait until all members are ranks of the replica, and make the process group with them; RanksError."""
        self.wait_for_all()
        interface, timeout_s = self._recipe.weights.interface, self._recipe.timeouts.step_s
        store, device = self._meeting.store(), self._device
        form_world(0, self.world, store, interface=interface, timeout_s=timeout_s, device=device)
        self._obeys = True

    def wait_for_all(self) -> None:
        """Wait until all members have said that they are there; RanksError names those that have not."""
        limit_s = self._recipe.timeouts.load_s
        with self._changed:
            self._changed.wait_for(lambda: self._over is not None or len(self._here) == self.world - 1, limit_s)
            self._raise_if_over()
            absent = [rank for rank in range(1, self.world) if rank not in self._here]
        if absent:
            where = sorted({self.nodes.names[rank] for rank in absent} - {""})
            raise RanksError(
                f"rank 0 waited {limit_s:g} s (timeouts.load_s) for rank {', '.join(map(str, absent))} to start"
                f"{' on ' + ', '.join(where) if where else ''}: nothing came; see its log"
            )

    def listen(self, report: Report, on_end: Callable[[RanksError], None]) -> None:
        """Have `report` told what members say of their meshes, and `on_end` why the replica is over."""
        self._report, self._on_end = report, on_end

    # --- orders -------------------------------------------------------------------------------------------------------

    def tell(self, order: AnyOrder) -> None:
        """Send an order that nobody answers; from any thread."""
        if self._over is None:
            self._channel.send(0, order)

    def do(self, order: AnyOrder, frames: Sequence[Frame] = ()) -> None:
        """Send an order to all members; `finish` waits for their answers."""
        with self._changed:
            self._raise_if_over()
            self._number += 1
            self._answers, self._awaited = {}, type(order).__name__
            self._patience = order.patience
        self._channel.send(self._number, order, frames)

    def finish(self) -> list[Done]:
        """What all members answer to the last order, within its timeout. RanksError; MeshError if one met that."""
        limit_s = float(getattr(self._recipe.timeouts, self._patience))
        with self._changed:
            answered = self._changed.wait_for(
                lambda: self._over is not None or len(self._answers) == self.world - 1, limit_s
            )
            self._raise_if_over()
            answers = [self._answers[rank] for rank in sorted(self._answers)]
            late = [rank for rank in range(1, self.world) if rank not in self._answers]
        if not answered:
            self._obeys = False
            ranks = ", ".join(map(str, late))
            raise RanksError(
                f"rank 0 waited {limit_s:g} s (timeouts.{self._patience}) for rank {ranks} to carry out "
                f"{self._awaited}: no answer came; see its log"
            )
        self._channel.hide()  # who has answered an order is connected both ways
        for answer in answers:
            if isinstance(answer, Failed):
                raise MeshError(f"rank {answer.rank}: {answer.cause}")
        return [answer for answer in answers if isinstance(answer, Done)]

    @contextmanager
    def together(self, order: AnyOrder, frames: Sequence[Frame] = ()) -> Iterator[list[Done]]:
        """What rank 0 does within, the members do too; the list has their answers at the end.

        Why the replica is over says more than what rank 0 noticed of it, and is raised instead.
        """
        self.do(order, frames)
        answers: list[Done] = []
        try:
            yield answers
        except MeshError:
            with suppress(MeshError):
                self.finish()
            raise
        except (RanksError, RuntimeError) as error:  # the latter is what a collective raises when a rank has gone
            self._obeys = False
            with self._changed:
                self._changed.wait_for(lambda: self._over is not None, GRACE_S)
            raise self._over or error from error
        except BaseException:
            self._obeys = False  # they may wait in a collective
            raise
        answers += self.finish()

    def end(self, cause: str, code: int) -> None:
        """The replica is over: kill the members, and end this process with `code` if its main thread does not.

        Called from a thread that may wait a moment; the first cause stands.
        """
        with self._changed:
            if self._over is not None or self._closed.is_set():
                return
            self._over = RanksError(cause, fatal=code == EXIT_FATAL)
            self._changed.notify_all()
        self._kill()
        get_logger().error("this replica is over, with all its ranks", why=cause)
        if self._on_end is not None:
            self._on_end(self._over)
        if self._closed.wait(GRACE_S):
            return
        get_logger().warning("the main thread does not end, perhaps in a collective: the process does", code=code)
        if code != EXIT_FENCED:
            with suppress(BusError):
                self._client.send(ReplicaFailed(cause, code == EXIT_FATAL), timeout_s=LAST_WORDS_S)
                self._client.close(f"this replica ends with code {code}", LAST_WORDS_S)
        self._channel.hide()
        leave_at_once(code)

    def close(self) -> None:
        """End the members: those that still obey in good order, the others not."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._obeys and self._over is None:
            with suppress(RanksError):
                self.tell(Leave())
                deadline = time.monotonic() + self._recipe.timeouts.exit_s / 2
                for member in self._members:
                    with suppress(subprocess.TimeoutExpired):
                        member.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        if self._thread.is_alive():
            self._thread.join()
        leave_world()
        self._channel.close()
        for member in self._members:
            os.close(member.watch)
            with suppress(BrokenPipeError):
                member.process.stdin.close()  # type: ignore[union-attr]  # a pipe
        self._meeting.close()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _start(self, rank: int) -> _Member:
        replica = self._client.passport.replica
        start = Start(
            recipe=self._recipe.model_dump(exclude_none=True),
            run_folder=str(self._run_folder),
            replica=replica,
            rank=rank,
            world=self.world,
            far=sorted(self.nodes.far),
            meet=self._channel.meet(rank),
            store=self._meeting.path,
            invitation=invitation(self._client, self._recipe.timeouts.register_s),
            gpu=self.nodes.place(rank) if self._device.type == "cuda" else None,
        )
        # blocked until it ignores them: a signal to the process group is for rank 0 alone
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        try:
            process = subprocess.Popen(
                [*self.nodes.there(rank), *self._command, f"{replica}.{rank}"],
                stdin=subprocess.PIPE,
                env=os.environ | ({} if rank in self.nodes.far else {PARENT_VARIABLE: str(os.getpid())}),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        member = _Member(rank, process, os.pidfd_open(process.pid))
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # one that has ended already is seen by its descriptor
            process.stdin.write(msgspec.json.encode(start) + b"\n")
            process.stdin.flush()  # it stays open: a far rank ends when it closes
        return member

    def _kill(self) -> None:
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.process.wait()

    # --- the crew's thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poller = zmq.Poller()
        poller.register(self._channel.answers, zmq.POLLIN)
        for member in self._members:
            poller.register(member.watch, zmq.POLLIN)
        while not self._closed.is_set():
            ready = dict(poller.poll(LOOK_MS))
            try:
                while (answer := self._channel.receive()) is not None:
                    self._take(answer)
            except RanksError as error:
                self.end(str(error), EXIT_RESTART)
            for member in self._members:
                if member.watch in ready:
                    code = member.process.wait()
                    where = f" on {self.nodes.names[member.rank]}" if member.rank in self.nodes.far else ""
                    cause = f"rank {member.rank}{where} (process {member.process.pid}) ended: {_how(code)}"
                    self.end(cause, EXIT_FENCED if code == EXIT_FENCED else EXIT_RESTART)
            if self._over is not None:
                return

    def _take(self, answer: AnyAnswer) -> None:
        if isinstance(answer, Here):
            self._channel.connect(answer.rank, answer.orders)
            with self._changed:
                self._here.add(answer.rank)
                self._changed.notify_all()
        elif isinstance(answer, Told):
            if self._report is not None:
                self._report(answer.rank, answer.message)
        elif isinstance(answer, Failed) and answer.kind != "mesh":
            self.end(f"rank {answer.rank}: {answer.cause}", EXIT_FATAL if answer.kind == "fatal" else EXIT_RESTART)
        else:
            with self._changed:
                if answer.number == self._number:
                    self._answers[answer.rank] = answer
                    self._changed.notify_all()

    def _raise_if_over(self) -> None:
        if self._over is not None:
            raise self._over


def leave_at_once(code: int) -> None:
    """End this process, whatever its threads do."""
    sys.stderr.flush()
    os._exit(code)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
