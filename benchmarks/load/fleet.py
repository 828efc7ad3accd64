"""Many replicas in one process: real sessions (`shared.bus.session`) over one DEALER each, without models or threads.

They register, heartbeat, load, form meshes, take weights and pass them on as ordered; what they are leased they keep
until told to work.

The parent steers the process with one JSON line on stdin for each question, answered by one line on stdout:

    {"do": "opened", "term": 1}               -> {"count": 250, "last": 12.5}       sessions; when the last one opened
    {"do": "leased"}                          -> {"count": 500}
    {"do": "work", "rate": 50, "seconds": 10} -> {"acked": [...], "leased": [...]}  seconds from a report to its
                                                 acknowledgement, and to the next lease
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import time
from collections import deque

import zmq

from benchmarks.load.work import DATASET, DIGEST, Work
from shared.bus import WireFault, wire
from shared.bus.instructions import Deliver, Freed, Instruction, Opened, Transmit
from shared.bus.session import ReplicaSession
from shared.bus.sockets import configure_dealer
from shared.bus.standing import Passport, Standing
from shared.config import Recipe, load_recipe
from shared.messages import (
    AnyMessage,
    FormMesh,
    Grant,
    Lease,
    LoadState,
    MeshFormed,
    ReceiveWeights,
    SendWeights,
    StateLoaded,
    WeightsLoaded,
    WeightsSent,
)

MAX_BYTES = 256 << 20
LOOK_S = 0.25
"""Each session looks at its clocks so often."""


class Member:
    """One replica."""

    def __init__(self, name: str, address: str, recipe: Recipe, context: zmq.Context) -> None:
        bus = recipe.bus
        nonce = secrets.randbits(63)
        self.session = ReplicaSession(
            Passport("rollout", name, 0, 1, nonce, os.getpid(), "load", [DATASET]),
            Standing(),
            heartbeat_s=bus.heartbeat_s,
            resend_s=bus.resend_s,
            lost_after_s=bus.lost_after_s,
            window=bus.window,
        )
        self.socket = context.socket(zmq.DEALER)
        configure_dealer(self.socket, bus)
        self.socket.set(zmq.ROUTING_ID, f"{name}/0/{nonce:x}".encode())
        self.socket.connect(address)
        self.opened: dict[int, float] = {}
        self.grants: deque[Grant] = deque()
        self.reported: deque[float] = deque()
        self.awaited: deque[float] = deque()
        self.acked: list[float] = []
        self.leased: list[float] = []

    def carry_out(self, instructions: list[Instruction]) -> None:
        """What the session wants."""
        for instruction in instructions:
            match instruction:
                case Transmit(envelope, frames):
                    try:
                        self.socket.send_multipart(wire.encode(envelope, frames, MAX_BYTES), zmq.NOBLOCK, copy=False)
                    except zmq.Again:
                        self.session.not_sent(envelope)
                case Opened():
                    self.opened[self.session.term] = time.monotonic()
                case Freed(count):
                    now = time.monotonic()
                    for _ in range(min(count, len(self.reported))):
                        self.acked.append(now - self.reported.popleft())
                case Deliver(delivery):
                    self._obey(delivery.message)

    def _obey(self, message: AnyMessage) -> None:
        match message:
            case LoadState(position=position):
                self.say(StateLoaded(position))
            case FormMesh(identity=identity):
                self.say(MeshFormed(identity.epoch))
            case ReceiveWeights(epoch=epoch, position=position):
                self.say(WeightsLoaded(epoch, position, DIGEST, 0.0))
            case SendWeights(epoch=epoch, position=position):
                self.say(WeightsSent(epoch, position, DIGEST, 0, 0.0))
            case Lease(grants=grants):
                self.grants.extend(grants)
                now = time.monotonic()
                for _ in range(min(len(grants), len(self.awaited))):
                    self.leased.append(now - self.awaited.popleft())

    def say(self, message: AnyMessage, frames: list[bytes] | None = None) -> None:
        """Something reliable."""
        self.carry_out(self.session.push(message, frames or [], time.monotonic()))

    def report(self, work: Work) -> None:
        """Hand in the oldest lease."""
        now = time.monotonic()
        self.reported.append(now)
        self.awaited.append(now)
        self.say(work.report(self.grants.popleft()), work.payload)

    def hear(self) -> None:
        """Take everything that has arrived."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                envelope, frames = wire.decode(parts, MAX_BYTES)
            except WireFault as fault:
                sys.exit(f"the controller said something malformed: {fault}")
            self.carry_out(self.session.hear(envelope, frames, time.monotonic(), room=True))


class Fleet:
    """All members, their sockets, and the parent's questions."""

    def __init__(self, address: str, recipe: Recipe, names: list[str]) -> None:
        context = zmq.Context()
        assert recipe.train is not None
        self._work = Work(samples=recipe.train.samples, tokens=4, prompt=4)
        self._members = [Member(name, address, recipe, context) for name in names]
        self._by_socket = {member.socket: member for member in self._members}
        self._poller = zmq.Poller()
        for member in self._members:
            self._poller.register(member.socket, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)
        self._look_at = [(time.monotonic() + LOOK_S * random.random(), member) for member in self._members]
        self._looks = deque(sorted(self._look_at, key=lambda look: look[0]))

    def run(self) -> None:
        """Until stdin ends."""
        now = time.monotonic()
        for member in self._members:
            member.carry_out(member.session.register(now))
        while True:
            asked = self._turn(LOOK_S)
            if asked is None:
                continue
            if not asked:
                return
            question = json.loads(asked)
            match question["do"]:
                case "opened":
                    times = [m.opened[question["term"]] for m in self._members if question["term"] in m.opened]
                    answer: dict[str, object] = {"count": len(times), "last": max(times, default=0.0)}
                case "leased":
                    answer = {"count": sum(len(member.grants) for member in self._members)}
                case _:
                    answer = self._do_work(question["rate"], question["seconds"])
            print(json.dumps(answer), flush=True)

    def _do_work(self, rate: float, seconds: float) -> dict[str, object]:
        """Report from members in random order, evenly in time; what came back within a second after the last counts."""
        start, reported = time.monotonic(), 0
        while (now := time.monotonic()) < start + seconds + 1.0:
            if now < start + seconds and reported < (now - start) * rate:
                able = [member for member in self._members if member.grants and not member.awaited]
                if able:
                    random.choice(able).report(self._work)
                reported += 1
            self._turn(min(LOOK_S, 1 / rate))
        acked = [seconds for member in self._members for seconds in member.acked]
        leased = [seconds for member in self._members for seconds in member.leased]
        return {"acked": acked, "leased": leased}

    def _turn(self, wait_s: float) -> str | None:
        """Hear and look at clocks; a line of the parent ("" at its end), or None."""
        now = time.monotonic()
        while self._looks[0][0] <= now:
            _, member = self._looks.popleft()
            member.carry_out(member.session.tick(now))
            self._looks.append((now + LOOK_S, member))
        wait_s = min(wait_s, self._looks[0][0] - now)
        asked = None
        for socket, _ in self._poller.poll(max(1, round(1000 * wait_s))):
            if isinstance(socket, int):
                asked = sys.stdin.readline()
            else:
                self._by_socket[socket].hear()
        return asked


def main() -> None:
    """`--first 0 --count 250`: replicas load-0 ... load-249."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--controller", required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    given = parser.parse_args()
    names = [f"load-{index}" for index in range(given.first, given.first + given.count)]
    Fleet(given.controller, load_recipe(given.recipe, given.set), names).run()


if __name__ == "__main__":
    main()
